//! The one binary. Turns arguments into the settings of the crates that do the work, and errors into
//! messages and exit statuses; holds no logic of its own.

mod cmd;
mod failure;
mod link;
mod progress;
mod prompts;
mod table;

use std::process::ExitCode;

use anabranch_runtime::Exit;
use anabranch_runtime::telemetry::{self, LogFormat};
use clap::Parser;
use failure::{OrExit, Outcome};

/// Streaming rollouts for LLM reinforcement learning, on engines that come and go.
#[derive(Debug, Parser)]
#[command(name = "anabranch", version, about, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Log filter: info, debug, anabranch_manager=debug,... [default: info, warn for short commands]
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    /// Write logs as one JSON object a line
    #[arg(long, global = true)]
    log_json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Runs the manager: admits prompts, places them on engines, streams trajectories back
    Manager(cmd::manager::Args),
    /// Attaches an engine to a manager, or starts one and attaches it
    Agent(cmd::agent::Args),
    /// Holds versions of the weights for engines that cannot reach the trainer
    Relay(cmd::relay::Args),
    /// Runs the embedded CPU engine
    Engine(cmd::engine::Args),
    /// Trains a small model with engines that come, get drained and get killed meanwhile
    Demo(cmd::demo::Args),
    /// Sends prompts, writes trajectories
    Submit(cmd::submit::Args),
    /// Publishes a safetensors directory as a new version of the weights
    Publish(cmd::publish::Args),
    /// Lists engines, drains or removes one
    Engines(cmd::engines::Args),
    /// Shows which engine is at which version
    Rollout(cmd::rollout::Args),
    /// Shows everything, live
    Watch(cmd::watch::Args),
    /// Measures, or breaks, a cluster of real processes
    Bench(cmd::bench::Args),
    /// Runs the deciding cores through seeded schedules of failures in virtual time
    Sim(cmd::sim::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return say_usage(&error),
    };
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            eprintln!("anabranch: {}", failure.text);
            failure.exit.into()
        }
    }
}

fn run(cli: Cli) -> Outcome {
    let format = if cli.log_json { LogFormat::Json } else { LogFormat::Text };
    let set = cli.log.is_some() || std::env::var_os(telemetry::LOG_ENV).is_some();
    let filter = match (&cli.log, cli.command.is_short() && !set) {
        (_, true) => Some("warn"),
        (log, false) => log.as_deref(),
    };
    telemetry::init(filter, format).or_exit(Exit::Usage)?;
    #[cfg(feature = "rdma")]
    anabranch_transfer_rdma::register();
    // An agent's work is many small wake-ups: on one thread they need no hand-over.
    let mut runtime = match cli.command {
        Command::Agent(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.enable_all().build().or_exit(Exit::Internal)?;
    // Each command's future is a different, large one: boxed, the largest does not sit on every stack.
    runtime.block_on(async move {
        match cli.command {
            Command::Manager(args) => Box::pin(cmd::manager::run(args)).await,
            Command::Agent(args) => Box::pin(cmd::agent::run(args)).await,
            Command::Relay(args) => Box::pin(cmd::relay::run(args)).await,
            Command::Engine(args) => Box::pin(cmd::engine::run(args)).await,
            Command::Demo(args) => Box::pin(cmd::demo::run(args)).await,
            Command::Submit(args) => Box::pin(cmd::submit::run(args)).await,
            Command::Publish(args) => Box::pin(cmd::publish::run(args)).await,
            Command::Engines(args) => Box::pin(cmd::engines::run(args)).await,
            Command::Rollout(args) => Box::pin(cmd::rollout::run(args)).await,
            Command::Watch(args) => Box::pin(cmd::watch::run(args)).await,
            Command::Bench(args) => Box::pin(cmd::bench::run(args)).await,
            Command::Sim(args) => Box::pin(cmd::sim::run(args)).await,
        }
    })
}

/// Prints clap's answer. Help and version end well; everything else is a wrong use.
fn say_usage(error: &clap::Error) -> ExitCode {
    // Where even that cannot be written, the status still tells.
    let _ = error.print();
    if error.use_stderr() { Exit::Usage.into() } else { Exit::Ok.into() }
}

// === impl Command ===

impl Command {
    /// True if the command's own output is what a person wants to see.
    fn is_short(&self) -> bool {
        !matches!(
            self,
            Command::Manager(_) | Command::Agent(_) | Command::Relay(_) | Command::Engine(_)
        )
    }
}
