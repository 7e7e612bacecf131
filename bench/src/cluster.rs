//! A real cluster on this machine: one manager and some engines, each with its agent, as processes of this very
//! binary. Owns their command lines, logs, lives and counters; what is done to them is the run's business.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_engine::synthetic::SyntheticParams;
use anabranch_runtime::{Announce, Drain, Endpoint};
use anyhow::{Context, bail};

use crate::meter::Meter;
use crate::proxy::Proxy;
use crate::tap::Tap;

pub mod proc;

pub use proc::{Proc, Usage};

/// Longest time that the manager may take to listen.
const MANAGER_START: Duration = Duration::from_secs(30);
/// Time that a process has to end after SIGTERM.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// Sizes and settings of a cluster.
#[derive(Clone)]
pub struct Config {
    /// Folder of logs, counters and everything else that the processes write.
    pub dir: PathBuf,
    /// Number of engines, each with its agent.
    pub engines: u32,
    /// The oracle that the engines run.
    pub model: SyntheticParams,
    /// Tokens per second of each running sample.
    pub rate: f64,
    /// Tokens per chunk of an engine's stream.
    pub chunk: u32,
    /// Samples that an engine runs at a time.
    pub max_running: u32,
    /// Longest prompt with its answer, in tokens.
    pub context: u32,
    /// Connections between agents and manager.
    pub links: Links,
    /// Log filter of every process.
    pub log: String,
}

/// Kind of the connections between the agents and the manager.
#[derive(Clone)]
pub enum Links {
    /// Each agent has a proxy, so that its link can be cut.
    Proxied,
    /// The first agent has a proxy that listens in; the others connect directly.
    FirstTapped(Arc<Tap>),
}

/// The processes of a running cluster.
pub struct Cluster {
    config: Config,
    drain: Drain,
    exe: PathBuf,
    url: String,
    /// Commands that run beside; removed when they ended.
    aside: Vec<Proc>,
    /// The manager.
    pub manager: Proc,
    /// The engines with their agents.
    pub nodes: Vec<Node>,
}

/// One engine and its agent.
pub struct Node {
    /// The engine's id.
    pub id: String,
    /// Process of the engine.
    pub engine: Proc,
    /// Process of the agent.
    pub agent: Proc,
    /// Address of the engine, the same in all its lives.
    pub engine_addr: SocketAddr,
    /// Proxy between agent and manager, if there is one.
    pub proxy: Option<Proxy>,
    /// The engine's counters, one file for each life.
    pub meters: Vec<Meter>,
}

impl Cluster {
    /// Starts all processes; returns when the manager listens. Engines attach as soon as they are up.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        std::fs::create_dir_all(config.staging())
            .with_context(|| format!("making {}", config.staging().display()))?;
        let exe = std::env::current_exe().context("finding this program")?;
        let manager = Proc::new("manager", &config.dir);
        let mut cluster = Self {
            drain: Drain::new(),
            exe,
            url: String::new(),
            aside: Vec::new(),
            manager,
            nodes: Vec::new(),
            config,
        };
        cluster.start_manager().await?;
        for index in 1..=cluster.config.engines {
            let node = cluster.node(index).await?;
            cluster.nodes.push(node);
            let at = cluster.nodes.len() - 1;
            cluster.start_engine(at).await?;
            cluster.start_agent(at).await?;
        }
        Ok(cluster)
    }

    /// URL of the manager.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Starts the engine at index `at`.
    pub async fn start_engine(&mut self, at: usize) -> anyhow::Result<()> {
        let mut command = self.command("engine");
        let node = &mut self.nodes[at];
        let meter = self.config.dir.join(format!("{}-made-{}", node.id, node.engine.lives() + 1));
        node.meters.push(Meter::at(meter.clone()));
        self.config.engine_flags(&mut command, node.engine_addr, &meter);
        node.engine.start(command, &self.drain).await
    }

    /// Starts the agent at index `at`.
    pub async fn start_agent(&mut self, at: usize) -> anyhow::Result<()> {
        let mut command = self.command("agent");
        let node = &mut self.nodes[at];
        let manager = node
            .proxy
            .as_ref()
            .map_or(self.url.clone(), |proxy| format!("http://{}", proxy.addr()));
        command.args(["--manager", &manager, "--id", &node.id]);
        command.args(["--engine", &format!("sglang=http://{}", node.engine_addr)]);
        command.arg("--staging").arg(self.config.staging());
        node.agent.start(command, &self.drain).await
    }

    /// Starts another command of this binary, as a person would; its output goes to `NAME.log`.
    pub async fn run_aside(&mut self, name: &str, args: &[&str]) -> anyhow::Result<()> {
        let mut proc = Proc::new(name, &self.config.dir);
        let mut command = Command::new(&self.exe);
        command.args(args).env("ANABRANCH_LOG", &self.config.log);
        proc.start(command, &self.drain).await?;
        self.aside.push(proc);
        Ok(())
    }

    /// Notes which processes ended, and starts those again that have been down for `rest`.
    pub async fn tend(&mut self, rest: Duration) -> anyhow::Result<()> {
        if self.manager.reap(false)? {
            bail!("the manager ended; its log is {}", self.manager.log().display());
        }
        for aside in &mut self.aside {
            aside.reap(true)?;
        }
        self.aside.retain(Proc::is_up);
        for at in 0..self.nodes.len() {
            let node = &mut self.nodes[at];
            node.engine.reap(true)?;
            node.agent.reap(true)?;
            let due = |proc: &Proc| proc.down_for().is_some_and(|down| down >= rest);
            let (engine, agent) = (due(&node.engine), due(&node.agent));
            if engine {
                self.start_engine(at).await?;
            }
            if agent {
                self.start_agent(at).await?;
            }
        }
        Ok(())
    }

    /// CPU and memory used so far by (manager, all agents, all engines).
    pub fn usage(&mut self) -> (Usage, Usage, Usage) {
        let sum = |all: &mut dyn Iterator<Item = Usage>| {
            all.fold(Usage::default(), |a, b| Usage {
                cpu: a.cpu + b.cpu,
                peak_rss_bytes: a.peak_rss_bytes.max(b.peak_rss_bytes),
            })
        };
        let agents = sum(&mut self.nodes.iter_mut().map(|node| node.agent.observe()));
        let engines = sum(&mut self.nodes.iter_mut().map(|node| node.engine.observe()));
        (self.manager.observe(), agents, engines)
    }

    /// Tokens that the engines made for streams, over all their lives.
    pub fn made(&self) -> anyhow::Result<u64> {
        let meters = self.nodes.iter().flat_map(|node| &node.meters);
        meters.map(Meter::made).sum()
    }

    /// Ends all processes.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        for node in &mut self.nodes {
            node.agent.kill().await?;
            node.engine.kill().await?;
        }
        self.manager.terminate(STOP_DEADLINE).await?;
        if let Err(late) = self.drain.close(STOP_DEADLINE).await {
            tracing::warn!(%late, "some tasks did not end");
        }
        // Nobody is left to use it; where it cannot be removed, the next reboot does.
        let _ = std::fs::remove_dir_all(self.config.staging());
        Ok(())
    }

    async fn start_manager(&mut self) -> anyhow::Result<()> {
        let announce = self.config.dir.join("announce.json");
        let mut command = self.command("manager");
        command.args(["--listen", "127.0.0.1:0", "--announce"]).arg(&announce);
        self.manager.start(command, &self.drain).await?;
        let started = Instant::now();
        self.url = loop {
            if let Ok(announce) = Announce::read(&announce) {
                break announce.url;
            }
            if self.manager.reap(false)? || started.elapsed() > MANAGER_START {
                bail!("the manager does not start; its log is {}", self.manager.log().display());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        Ok(())
    }

    async fn node(&self, index: u32) -> anyhow::Result<Node> {
        let id = format!("e{index}");
        let tap = match &self.config.links {
            Links::Proxied => Some(None),
            Links::FirstTapped(tap) if index == 1 => Some(Some(tap.clone())),
            Links::FirstTapped(_) => None,
        };
        let proxy = match tap {
            Some(tap) => Some(Proxy::start(self.manager_addr()?, tap, &self.drain).await?),
            None => None,
        };
        Ok(Node {
            engine: Proc::new(format!("engine-{id}"), &self.config.dir),
            agent: Proc::new(format!("agent-{id}"), &self.config.dir),
            engine_addr: free_addr()?,
            proxy,
            meters: Vec::new(),
            id,
        })
    }

    fn manager_addr(&self) -> anyhow::Result<SocketAddr> {
        match Endpoint::parse(&self.url)? {
            Endpoint::Plain(at) => Ok(at.to_string().parse()?),
            other => bail!("the manager announced {other}, which no plain proxy can pass on"),
        }
    }

    fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.exe);
        command.arg(subcommand).env("ANABRANCH_LOG", &self.config.log);
        command
    }
}

impl Config {
    /// Ids of the engines.
    pub fn engine_ids(&self) -> Vec<String> {
        (1..=self.engines).map(|index| format!("e{index}")).collect()
    }

    fn staging(&self) -> PathBuf {
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm } else { self.dir.as_path() };
        base.join(format!("anabranch-bench-{}", std::process::id()))
    }

    fn engine_flags(&self, command: &mut Command, addr: SocketAddr, meter: &Path) {
        let SyntheticParams { vocab, eos_id, mean_len } = self.model;
        command.args(["--model", "synthetic", "--listen", &addr.to_string(), "--faults"]);
        let flags = [
            ("--rate", self.rate.to_string()),
            ("--chunk", self.chunk.to_string()),
            ("--max-running", self.max_running.to_string()),
            ("--context-capacity", self.context.to_string()),
            ("--vocab", vocab.to_string()),
            ("--eos-id", eos_id.to_string()),
        ];
        flags.iter().for_each(|(flag, value)| {
            command.args([flag, value.as_str()]);
        });
        if let Some(mean) = mean_len {
            command.args(["--mean-len", &mean.to_string()]);
        }
        command.arg("--meter").arg(meter);
    }
}

/// Address on loopback that is free now; an engine keeps its port over all its lives.
fn free_addr() -> anyhow::Result<SocketAddr> {
    let socket = TcpListener::bind(("127.0.0.1", 0)).context("looking for a free port")?;
    Ok(socket.local_addr()?)
}
