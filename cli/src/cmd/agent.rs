//! `anabranch agent`: the sidecar of one engine, which runs already or is started by the agent.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anabranch_agent::config::{AgentConfig, BadConfig, EngineSpec};
use anabranch_agent::{LinkKind, Listen, LogprobsMode};
use anabranch_runtime::Exit;
use anabranch_runtime::signal::ShutdownSignals;
use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, OrExit, Outcome, exit_of};
use crate::link::ManagerArgs;

/// Flags of `anabranch agent`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    anabranch agent --manager http://10.0.0.1:5000 --engine sglang=http://127.0.0.1:30000\n  \
    anabranch agent --manager file:/shared/manager.json -- python -m sglang.launch_server --model-path M")]
pub struct Args {
    #[command(flatten)]
    manager: ManagerArgs,
    /// An engine that runs: sglang=http://HOST:PORT
    #[arg(long, required_unless_present = "command", conflicts_with = "command")]
    engine: Option<String>,
    /// Name of the engine, stable over restarts [default: host name and engine port]
    #[arg(long)]
    id: Option<String>,
    /// Property for placement, KEY=VALUE; colocated=true: on the trainer's own GPUs; may be given more than once
    #[arg(long, value_parser = label)]
    label: Vec<(String, String)>,
    /// GPUs that the engine uses, for tokens per second and GPU
    #[arg(long, default_value_t = 0)]
    gpus: u32,
    /// Address at which peers fetch weights from this agent; port 0 takes a free one [default: it serves none]
    #[arg(long, visible_alias = "weights-listen")]
    listen: Option<SocketAddr>,
    /// tcp (in the clear), tls or quic; may be given more than once, best first [default: tcp on loopback, else tls]
    #[arg(long, requires = "listen", value_name = "LINK")]
    weights_link: Vec<LinkKind>,
    /// Addresses that peers shall dial, if not the listener's own; may be given more than once
    #[arg(long, requires = "listen")]
    advertise: Vec<String>,
    /// Directory in which weights are staged for the engine to read
    #[arg(long, default_value = "/dev/shm")]
    staging: PathBuf,
    /// Copy each version, also if another agent of this host has it in memory
    #[arg(long)]
    no_sharing: bool,
    /// Seconds that running samples may go on after SIGTERM
    #[arg(long, default_value_t = 30)]
    drain_deadline: u64,
    /// raw, tempered or processed, if the engine itself cannot say [default: what it says, else tempered]
    #[arg(long, alias = "logprob-convention")]
    logprobs_mode: Option<LogprobsMode>,
    /// The trainer loads this engine itself (NCCL, CUDA IPC) and attests the versions
    #[arg(long)]
    weights_by_trainer: bool,
    /// API key of an engine that was started with --api-key
    #[arg(long, env = "ANABRANCH_ENGINE_API_KEY", hide_env_values = true)]
    engine_api_key: Option<String>,
    /// Tokens kept for a re-attach, in MiB
    #[arg(long)]
    buffer_mib: Option<usize>,
    /// Seconds that a new engine process may take until it answers
    #[arg(long)]
    engine_start_timeout: Option<u64>,
    /// Starts, watches, restarts and stops this engine; flags that it needs are added, and said
    #[arg(last = true)]
    command: Vec<String>,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    run_agent(args.config().or_exit(Exit::Usage)?).await
}

/// Runs the agent until it has left; a first signal drains it.
pub async fn run_agent(config: AgentConfig) -> Outcome {
    let mut signals = ShutdownSignals::install().or_exit(Exit::Io)?;
    let stop = CancellationToken::new();
    let mut agent = std::pin::pin!(anabranch_agent::run(config, stop.clone()));
    let ended = tokio::select! {
        ended = &mut agent => ended,
        signal = signals.recv() => {
            tracing::info!(signal, "draining; a second signal leaves at once");
            stop.cancel();
            tokio::select! {
                ended = &mut agent => ended,
                signal = signals.recv() => {
                    return Err(Failure::new(Exit::TryAgain, format!("left at once: {signal}, twice")));
                }
            }
        }
    };
    ended.map(|()| Exit::Ok).map_err(|error| Failure::new(exit_of(error.exit_code()), error))
}

// === impl Args ===

impl Args {
    fn config(self) -> Result<AgentConfig, BadConfig> {
        let engine = match &self.engine {
            Some(engine) => EngineSpec::parse(engine)?,
            None => EngineSpec::command(self.command)?,
        };
        let (links, advertise) = (self.weights_link, self.advertise);
        let listen = self.listen.map(|at| Listen { at, links, advertise });
        let base = AgentConfig::new(self.manager.manager, engine);
        Ok(AgentConfig {
            token: self.manager.token,
            id: self.id,
            labels: self.label.into_iter().collect(),
            gpus: self.gpus,
            listen,
            staging: self.staging,
            share: !self.no_sharing,
            drain_deadline: Duration::from_secs(self.drain_deadline),
            logprobs_mode: self.logprobs_mode,
            weights_by_trainer: self.weights_by_trainer,
            engine_api_key: self.engine_api_key,
            buffer_bytes: self.buffer_mib.map_or(base.buffer_bytes, |mib| mib << 20),
            engine_start_timeout: self
                .engine_start_timeout
                .map_or(base.engine_start_timeout, Duration::from_secs),
            ..base
        })
    }
}
