//! `anabranch engines`: lists the attached engines, and sends one away.

use anabranch_proto::pb;
use anabranch_runtime::Exit;
use anabranch_views::EngineView;
use serde_json::{Value, json};

use crate::failure::Outcome;
use crate::link::ManagerArgs;
use crate::table::{cells, table};

/// Flags of `anabranch engines`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Shows every engine with its state, version and load
    List {
        #[command(flatten)]
        manager: ManagerArgs,
        /// The engines as JSON, for scripts
        #[arg(long)]
        json: bool,
    },
    /// Lets an engine's samples run on until the deadline, moves the rest, sends it away
    Drain {
        #[command(flatten)]
        manager: ManagerArgs,
        /// The engine's id, as `engines list` shows it
        id: String,
        /// In seconds; default the manager's own
        #[arg(long, default_value_t = 0)]
        deadline: u32,
        #[arg(long)]
        json: bool,
    },
    /// Sends an engine away at once; its samples continue elsewhere
    Remove {
        #[command(flatten)]
        manager: ManagerArgs,
        /// The engine's id, as `engines list` shows it
        id: String,
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    use pb::engines_request::Kind;
    match args.what {
        What::List { manager, json } => list(&manager, json).await,
        What::Drain { manager, id, deadline, json } => {
            let deadline_ms = deadline.saturating_mul(1000);
            send_away(&manager, Kind::Drain, id, deadline_ms, json).await
        }
        What::Remove { manager, id, json } => send_away(&manager, Kind::Remove, id, 0, json).await,
    }
}

async fn list(manager: &ManagerArgs, as_json: bool) -> Outcome {
    let mut admin = manager.admin().await?;
    if as_json {
        println!("{}", Value::from(admin.engines_json().await?));
        return Ok(Exit::Ok);
    }
    let state = admin.state().await?;
    if state.engines.is_empty() {
        eprintln!("no engine is attached; requests wait until one is");
        return Ok(Exit::Ok);
    }
    let head = cells(["ENGINE", "STATE", "VERSION", "RUNNING", "KV", "TOKENS", "KIND", ""]);
    let rows: Vec<_> = std::iter::once(head).chain(state.engines.iter().map(row)).collect();
    print!("{}", table(&rows));
    Ok(Exit::Ok)
}

fn row(engine: &EngineView) -> Vec<String> {
    let mut note = engine.state.why().to_owned();
    if let Some(load) = &engine.load {
        note = format!("{} {}", load.stage, load.version);
        if !load.error.is_empty() {
            note = format!("{note}: {}", load.error);
        }
    }
    vec![
        engine.id.clone(),
        engine.state.to_string(),
        engine.version_text(),
        engine.running.to_string(),
        format!("{:.0}%", engine.kv_used * 100.0),
        engine.tokens.to_string(),
        engine.kind.clone(),
        note,
    ]
}

async fn send_away(
    manager: &ManagerArgs,
    kind: pb::engines_request::Kind,
    engine: String,
    deadline_ms: u32,
    as_json: bool,
) -> Outcome {
    let mut admin = manager.admin().await?;
    let request = pb::EnginesRequest { kind: kind as i32, engine: engine.clone(), deadline_ms };
    let said = admin.engines(request).await?;
    if as_json {
        println!("{}", json!({"engine": engine, "said": said}));
    } else {
        println!("{said}");
    }
    Ok(Exit::Ok)
}
