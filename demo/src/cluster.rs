//! The demo's processes on this machine: one manager, engines with their agents, all of this very
//! binary. Owns command lines, ports, logs and lives; when what is started or killed is the script's.

mod dirs;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_runtime::process::{Output, Signal, StartError};
use anabranch_runtime::{Announce, Child, Drain};

pub use dirs::Dirs;

/// Longest time that the manager may take to listen.
const MANAGER_START: Duration = Duration::from_secs(20);
/// Time between two looks at a process that starts or ends.
const POLL: Duration = Duration::from_millis(20);
/// Time that a process has to end after SIGTERM; then it is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(3);
/// Last lines of a log that an error repeats.
const TAIL_LINES: usize = 6;

/// Reason why the demo's processes do not run.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A folder or file cannot be made.
    #[error("cannot make {path}: {source}")]
    Make { path: PathBuf, source: io::Error },
    /// The path of the running program is unknown.
    #[error("cannot find this program's own file, to start it as manager and engines: {0}")]
    NoExe(io::Error),
    /// No port of loopback can be bound.
    #[error("no free port on loopback: {0}")]
    NoPort(io::Error),
    /// A process cannot be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A process ended by itself, or was not ready in time.
    #[error("{name} {how}; its log is {log}{tail}")]
    NotUp { name: String, how: String, log: PathBuf, tail: String },
    /// A process cannot be signalled.
    #[error("cannot signal {name}: {source}")]
    Signal { name: String, source: io::Error },
}

/// Settings with which every engine of the demo generates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineFlags {
    /// Tokens per second of each running sample: slow enough that answers are cut in the middle.
    pub rate: f64,
    /// Tokens per stream chunk.
    pub chunk: u32,
    /// Samples that an engine runs at a time; more wait.
    pub max_running: u32,
}

/// Owner of the GPUs that an engine runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// GPUs of the engine alone.
    Spare,
    /// GPUs of the trainer, which loads the engine's weights and takes the GPUs back to train.
    Colocated,
}

/// The manager and the engines with their agents, as child processes.
pub struct Cluster {
    exe: PathBuf,
    dirs: Arc<Dirs>,
    flags: EngineFlags,
    drain: Drain,
    manager: Child,
    url: String,
    nodes: BTreeMap<String, Node>,
}

/// One engine with its agent.
struct Node {
    url: String,
    engine: Child,
    agent: Child,
}

impl Cluster {
    /// Starts the manager; returns when it listens.
    pub async fn start(
        dirs: Arc<Dirs>,
        flags: EngineFlags,
        log: &str,
    ) -> Result<Self, ClusterError> {
        let exe = std::env::current_exe().map_err(ClusterError::NoExe)?;
        dirs.open_shm()?;
        let drain = Drain::new();
        let mut command = subcommand(&exe, "manager", log);
        command.args(["--listen", "127.0.0.1:0", "--announce"]).arg(dirs.announce());
        command.arg("--state-dir").arg(dirs.state());
        let output = Output::File(dirs.log("manager"));
        let mut manager = Child::start("manager", command, output, &drain).await?;
        let url = announced(&mut manager, &dirs).await?;
        Ok(Self { exe, dirs, flags, drain, manager, url, nodes: BTreeMap::new() })
    }

    /// URL at which the manager listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Folders that the processes write to.
    pub fn dirs(&self) -> &Dirs {
        &self.dirs
    }

    /// Starts an engine with the start-up weights, and its agent, which attaches as soon as it is up.
    pub async fn attach(&mut self, id: &str, place: Place) -> Result<(), ClusterError> {
        let addr = free_addr()?;
        let url = format!("http://{addr}");
        let engine = self.start_engine(id, &addr).await?;
        let agent = self.start_agent(id, place, &url).await?;
        self.nodes.insert(id.to_owned(), Node { url, engine, agent });
        Ok(())
    }

    async fn start_engine(&self, id: &str, addr: &str) -> Result<Child, ClusterError> {
        let name = format!("{id}.engine");
        let mut command = subcommand(&self.exe, "engine", "info");
        command.arg("--model").arg(format!("hf:{}", self.dirs.model().display()));
        command.args(["--listen", addr]);
        command.args(["--rate", &self.flags.rate.to_string()]);
        command.args(["--chunk", &self.flags.chunk.to_string()]);
        command.args(["--max-running", &self.flags.max_running.to_string()]);
        command.arg("--meter").arg(self.dirs.meter(id));
        let output = Output::File(self.dirs.log(&name));
        Ok(Child::start(&name, command, output, &self.drain).await?)
    }

    async fn start_agent(&self, id: &str, place: Place, url: &str) -> Result<Child, ClusterError> {
        let name = format!("{id}.agent");
        let mut command = subcommand(&self.exe, "agent", "info");
        command.arg("--manager").arg(format!("file:{}", self.dirs.announce().display()));
        command.args(["--engine", &format!("sglang={url}"), "--id", id]);
        command.arg("--staging").arg(self.dirs.shm());
        // Engines fetch a version from each other, too.
        command.args(["--listen", "127.0.0.1:0"]);
        if place == Place::Colocated {
            command.args(["--label", "colocated=true", "--weights-by-trainer"]);
        }
        let output = Output::File(self.dirs.log(&name));
        Ok(Child::start(&name, command, output, &self.drain).await?)
    }

    /// HTTP address of the engine `id`; `None` if there is no such engine.
    pub fn engine_url(&self, id: &str) -> Option<&str> {
        self.nodes.get(id).map(|node| node.url.as_str())
    }

    /// Sends SIGKILL to the engine process alone: its agent lives on and tells the manager.
    pub async fn kill_engine(&mut self, id: &str) -> Result<(), ClusterError> {
        let Some(node) = self.nodes.get_mut(id) else { return Ok(()) };
        let killed = node.engine.kill().await;
        killed.map(drop).map_err(|source| ClusterError::Signal { name: id.to_owned(), source })
    }

    /// Ends the remaining processes of an engine that has left the manager.
    pub async fn bury(&mut self, id: &str) -> Result<(), ClusterError> {
        let Some(mut node) = self.nodes.remove(id) else { return Ok(()) };
        for child in [&mut node.agent, &mut node.engine] {
            let ended = child.kill().await;
            ended.map_err(|source| ClusterError::Signal { name: id.to_owned(), source })?;
        }
        Ok(())
    }

    /// Fails, with the end of the log, if the manager ended by itself.
    pub fn check(&mut self) -> Result<(), ClusterError> {
        still_up(&mut self.manager, &self.dirs)
    }

    /// Fails, with the end of the log, if the engine `id` or its agent ended by itself.
    pub fn check_node(&mut self, id: &str) -> Result<(), ClusterError> {
        let Some(node) = self.nodes.get_mut(id) else { return Ok(()) };
        still_up(&mut node.engine, &self.dirs)?;
        still_up(&mut node.agent, &self.dirs)
    }

    /// Ends all processes: agents, engines, then the manager.
    pub async fn stop(mut self) -> Result<(), ClusterError> {
        for node in self.nodes.values() {
            // All at once; each is waited for below.
            let _ = node.agent.signal(Signal::KILL);
            let _ = node.engine.signal(Signal::KILL);
        }
        for (id, mut node) in std::mem::take(&mut self.nodes) {
            for child in [&mut node.agent, &mut node.engine] {
                let ended = child.wait().await;
                ended.map_err(|source| ClusterError::Signal { name: id.clone(), source })?;
            }
        }
        let ended = self.manager.terminate(STOP_DEADLINE).await;
        let signal = |source| ClusterError::Signal { name: "manager".to_owned(), source };
        ended.map(drop).map_err(signal)
    }
}

/// Tokens that the streams of the engine `id` ever made, from a file that outlives a kill. `None`: no engine of ours.
pub fn tokens_made(dirs: &Dirs, id: &str) -> Option<u64> {
    let bytes = fs::read(dirs.meter(id)).ok()?;
    bytes.first_chunk::<8>().map(|word| u64::from_le_bytes(*word))
}

fn subcommand(exe: &Path, name: &str, log: &str) -> Command {
    let mut command = Command::new(exe);
    command.arg(name);
    // A level that the user set holds for all processes.
    if std::env::var_os(anabranch_runtime::telemetry::LOG_ENV).is_none() {
        command.env(anabranch_runtime::telemetry::LOG_ENV, log);
    }
    // Engines share the cores with the trainer: more threads each would only contend.
    command.env("RAYON_NUM_THREADS", "1");
    command
}

async fn announced(manager: &mut Child, dirs: &Dirs) -> Result<String, ClusterError> {
    let started = Instant::now();
    loop {
        if let Ok(announce) = Announce::read(&dirs.announce()) {
            return Ok(announce.url);
        }
        still_up(manager, dirs)?;
        if started.elapsed() > MANAGER_START {
            let how = format!("does not listen after {} s", MANAGER_START.as_secs());
            return Err(not_up("manager", how, dirs));
        }
        tokio::time::sleep(POLL).await;
    }
}

fn still_up(child: &mut Child, dirs: &Dirs) -> Result<(), ClusterError> {
    match child.try_wait() {
        Ok(None) => Ok(()),
        Ok(Some(status)) => Err(not_up(child.name(), format!("ended early ({status})"), dirs)),
        Err(source) => Err(ClusterError::Signal { name: child.name().to_owned(), source }),
    }
}

fn not_up(name: &str, how: String, dirs: &Dirs) -> ClusterError {
    let log = dirs.log(name);
    let text = fs::read_to_string(&log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    let tail = last.iter().map(|line| format!("\n    {line}")).collect();
    ClusterError::NotUp { name: name.to_owned(), how, log, tail }
}

/// Address on loopback that is free now; the engine binds it a moment later.
fn free_addr() -> Result<String, ClusterError> {
    let socket = TcpListener::bind(("127.0.0.1", 0)).map_err(ClusterError::NoPort)?;
    Ok(socket.local_addr().map_err(ClusterError::NoPort)?.to_string())
}
