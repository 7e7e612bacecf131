//! `anabranch demo`: a whole elastic RL job on this machine. The job is the demo crate's.

use anabranch_demo::{DemoArgs, DemoError};
use anabranch_runtime::Exit;

use crate::failure::{Failure, Outcome};

/// Flags of `anabranch demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    demo: DemoArgs,
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    let as_json = args.demo.json;
    let outcome = anabranch_demo::run(args.demo).await.map_err(failure)?;
    println!("{}", if as_json { &outcome.json } else { &outcome.text });
    Ok(if outcome.kept_promises { Exit::Ok } else { Exit::Failed })
}

fn failure(error: DemoError) -> Failure {
    let exit = match &error {
        DemoError::Interrupted(_) => Exit::TryAgain,
        DemoError::Data(_) => Exit::Data,
        DemoError::Write { .. } | DemoError::Cluster(_) => Exit::CannotCreate,
        _ => Exit::Failed,
    };
    Failure::new(exit, error)
}
