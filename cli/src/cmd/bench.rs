//! `anabranch bench`: measures, or breaks, a cluster of real processes. The runs are the bench crate's.

use anabranch_bench::chaos::{self, ChaosArgs};
use anabranch_bench::core::{self, CoreArgs};
use anabranch_bench::stream::{self, StreamArgs};
use anabranch_bench::transfer::{self, TransferArgs};
use anabranch_bench::verify::{self, VerifyArgs};
use anabranch_runtime::Exit;

use crate::failure::{Failure, Outcome};

/// Flags of `anabranch bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Measures what manager and agents cost per token, and how late tokens are
    Stream(StreamArgs),
    /// Measures the manager's core and ledger without sockets, by kind of event and size of the fleet
    Core(CoreArgs),
    /// Injects one random fault a second, and a version every few seconds; every token is verified
    Chaos(ChaosArgs),
    /// Measures the transfer engine: speed, fan-out, deltas, faults, each a ratio within one run
    Transfer(TransferArgs),
    /// One host of the transfer bench, which starts it
    #[command(hide = true)]
    TransferNode,
    /// Verifies recorded trajectories; `stream` and `chaos` start it as a process of its own
    Verify(VerifyArgs),
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    let passed = match args.what {
        What::Stream(args) => Box::pin(stream::run(args)).await,
        What::Core(args) => core::run(&args),
        What::Chaos(args) => Box::pin(chaos::run(args)).await,
        What::Transfer(args) => Box::pin(transfer::run(args)).await,
        What::TransferNode => transfer::node::run(),
        What::Verify(args) => verify::print(&args),
    };
    match passed {
        Ok(true) => Ok(Exit::Ok),
        Ok(false) => Ok(Exit::Failed),
        Err(error) => Err(Failure::new(Exit::Internal, format!("{error:#}"))),
    }
}
