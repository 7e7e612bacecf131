//! The sidecar of one inference engine: attaches the engine to a manager, runs samples on it, keeps
//! its weights current, and leaves without losing a token. Decides no placement and generates
//! nothing.
//!
//! ```text
//!   manager ◄── join (Control, Data) ──► core ◄── generate ◄── engine/sglang ◄── engine
//!                                         │  ▲                                     ▲
//!                                         ▼  └── watch: is it there, is it the same ┤
//!                                       driver ── load, weights (transfer) ────────┘
//! ```
#![warn(missing_docs)]

pub mod config;
pub mod error;

pub mod core;
pub mod engine;

mod calls;
mod driver;
mod generate;
mod join;
mod launch;
mod shared;
mod watch;
mod weights;

pub use anabranch_proto::LogprobsMode;
pub use anabranch_transfer::{LinkKind, Listen};
pub use config::{AgentConfig, BadConfig, EngineSpec, EngineUrl};
pub use error::AgentError;

use std::sync::Arc;
use std::time::Duration;

use anabranch_runtime::{Clock, Drain, Endpoint, JoinToken};
use tokio_util::sync::CancellationToken;

use crate::core::{Core, CoreConfig, Event, ExitReason};
use crate::driver::Driver;
use crate::engine::Engine;
use crate::engine::relay::Relay;
use crate::engine::sglang::Sglang;
use crate::join::Manager;
use crate::launch::Launch;
use crate::shared::Shared;
use crate::watch::Watch;
use crate::weights::Weights;

/// Runs one agent until its engine or its manager ends it. Cancelling `shutdown` begins a drain
/// with the configured deadline. The error says why the agent ended and what to do.
pub async fn run(config: AgentConfig, shutdown: CancellationToken) -> Result<(), AgentError> {
    raise_file_limit();
    if let Some(listen) = config.listen.as_ref().filter(|listen| !listen.is_dialable()) {
        return Err(BadConfig::NoAddress(listen.at).into());
    }
    let (url, launch) = match &config.engine {
        EngineSpec::Relay => {
            let id = config.id.clone().unwrap_or_else(|| format!("relay-{}", host_name()));
            return run_with(&config, id, Relay::default(), None, "no engine", shutdown).await;
        }
        EngineSpec::Sglang(url) => (url.clone(), None),
        EngineSpec::Command(words) => {
            let launch = Launch::new(words)?;
            (launch.url.clone(), Some(launch))
        }
    };
    let id = config.id.clone().unwrap_or_else(|| format!("{}-{}", host_name(), url.port()));
    let api_key = config.engine_api_key.clone();
    let engine = Sglang::new(&url, api_key, config.logprobs_mode);
    run_with(&config, id, engine, launch, &url.to_string(), shutdown).await
}

async fn run_with<E: Engine>(
    config: &AgentConfig,
    id: String,
    engine: E,
    launch: Option<Launch>,
    url: &str,
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    let manager = manager(config)?;
    let id = checked_id(id)?;
    let weights = open_weights(config, &id)?;
    let shared = Arc::new(Shared::new(core(config, &id, &weights), Clock::start()));
    let engine = Arc::new(engine);
    tracing::info!(engine = id, url, manager = config.manager, "agent starts");

    let drain = Drain::new();
    let watch = Watch {
        shared: shared.clone(),
        engine: engine.clone(),
        weights: weights.clone(),
        launch,
        start_timeout: config.engine_start_timeout,
        drain: drain.clone(),
        url: url.to_owned(),
    };
    let watcher = drain.spawn("watch", watch.run());
    let leave = leave_task(shared.clone(), shutdown, config.drain_deadline, drain.clone());
    drain.spawn("shutdown", leave);
    let mut driver = Driver::new(shared, engine, weights, manager, drain.clone());
    let exit = tokio::select! {
        exit = driver.run() => outcome(exit),
        // The watcher ends on its own only when the engine cannot be started at all.
        ended = watcher => match ended {
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(())) | Err(_) => Ok(()),
        },
    };
    close(&drain).await?;
    exit
}

/// Time for all tasks to end, the stop of the engine process included.
const CLOSE: Duration = Duration::from_secs(15);

async fn close(drain: &Drain) -> Result<(), AgentError> {
    drain
        .close(CLOSE)
        .await
        .map_err(|stuck| AgentError::Stuck { tasks: stuck.names.join(", "), waited: stuck.waited })
}

async fn leave_task(
    shared: Arc<Shared>,
    shutdown: CancellationToken,
    within: Duration,
    drain: Drain,
) {
    tokio::select! {
        () = shutdown.cancelled() => {
            shared.handle(Event::LeaveAsked { why: "the agent was told to stop".to_owned(), within });
        }
        () = drain.cancelled() => {}
    }
}

fn manager(config: &AgentConfig) -> Result<Manager, AgentError> {
    let text = match config.manager.contains("://") || config.manager.starts_with("file:") {
        true => config.manager.clone(),
        false => format!("http://{}", config.manager),
    };
    let endpoint = Endpoint::parse(&text).map_err(|error| {
        AgentError::Manager(anabranch_runtime::ConnectError::Endpoint(error.into()))
    })?;
    Ok(Manager { endpoint, token: token(config)? })
}

fn token(config: &AgentConfig) -> Result<Option<JoinToken>, AgentError> {
    let parse =
        |text: &String| JoinToken::parse(text).map_err(|e| AgentError::Token(e.to_string()));
    config.token.as_ref().map(parse).transpose()
}

fn core(config: &AgentConfig, id: &str, weights: &Weights) -> Core {
    Core::new(CoreConfig {
        id: id.to_owned(),
        incarnation: unix_millis(),
        token: config.token.clone().unwrap_or_default(),
        labels: config.labels.clone(),
        gpus: config.gpus,
        addresses: weights.addresses(),
        host: weights.host(),
        weights_by_trainer: config.weights_by_trainer,
        buffer_bytes: config.buffer_bytes,
    })
}

/// Incarnation number of this life: later lives are larger, as long as the host's clock is roughly
/// right.
fn unix_millis() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(1, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn checked_id(id: String) -> Result<String, BadConfig> {
    let fits = !id.is_empty() && id.len() <= anabranch_proto::limits::MAX_ID_BYTES;
    match fits && id.chars().all(|c| c.is_ascii_graphic()) {
        true => Ok(id),
        false => Err(BadConfig::Id(id)),
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "host".to_owned(),
        name => name.to_owned(),
    }
}

fn open_weights(config: &AgentConfig, id: &str) -> Result<Arc<Weights>, AgentError> {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name = format!("anabranch-{}", id.chars().map(allowed).collect::<String>());
    warn_if_small(&config.staging);
    match Weights::open(&config.staging, &name, config.listen.as_ref(), config.share) {
        Ok(weights) => Ok(Arc::new(weights)),
        Err(weights::WeightsError::Stage(error)) => Err(AgentError::Staging(error.to_string())),
        Err(error) => Err(AgentError::Listen(error.to_string())),
    }
}

/// Size of /dev/shm in a container that asked for no more; no model fits there twice.
const CONTAINER_SHM_BYTES: u64 = 64 << 20;

fn warn_if_small(staging: &std::path::Path) {
    let Ok(stat) = rustix::fs::statvfs(staging) else { return };
    let bytes = stat.f_blocks.saturating_mul(stat.f_frsize);
    if bytes <= CONTAINER_SHM_BYTES {
        let mib = bytes >> 20;
        tracing::warn!(
            "{} has only {mib} MiB: weight updates need two versions there. Start the container with --shm-size (Docker), \
             or mount an emptyDir with medium: Memory (Kubernetes), or choose another --staging",
            staging.display()
        );
    }
}

/// Raises the soft limit of open files to the hard one: each running sample has a connection, and a
/// limit of 1024 would be met first.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

fn outcome(exit: ExitReason) -> Result<(), AgentError> {
    match exit {
        ExitReason::Drained | ExitReason::Left => Ok(()),
        ExitReason::DrainCut { running, unacknowledged_bytes } => {
            Err(AgentError::DrainCut { running, unacknowledged_bytes })
        }
        ExitReason::Refused { why } => Err(AgentError::Refused(why)),
        ExitReason::LogprobsMode { wanted, offered } => {
            Err(AgentError::LogprobsMode { wanted, offered })
        }
        ExitReason::Unverified { why } => Err(AgentError::Unverified(why)),
    }
}
