//! One process of the cluster over all its lives: started, signalled, accounted for, started again. Decides nothing.
//!
//! ```text
//!   Down{since} -- start --> Up{child} -- it ended, or was killed --> Down{since}
//! ```

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anabranch_runtime::Drain;
use anabranch_runtime::process::{Child, Output, Signal};
use anyhow::Context;

use crate::procfs;

/// One process with its log and counters, over all its lives.
#[derive(Debug)]
pub struct Proc {
    name: String,
    log: PathBuf,
    state: State,
    lives: u32,
    /// Processes that ended without being asked to, and how they ended.
    surprises: Vec<String>,
    usage: Usage,
}

// A handful of processes: the size of one does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum State {
    Down { since: Instant },
    Up { child: Box<Child>, cpu: Duration },
}

/// CPU and memory of all lives together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// User and system time.
    pub cpu: Duration,
    /// Highest resident size of any life.
    pub peak_rss_bytes: u64,
}

impl Proc {
    /// A process that is down, with its log file in `dir`.
    pub fn new(name: impl Into<String>, dir: &std::path::Path) -> Self {
        let name = name.into();
        Self {
            log: dir.join(format!("{name}.log")),
            name,
            state: State::Down { since: Instant::now() },
            lives: 0,
            surprises: Vec::new(),
            usage: Usage::default(),
        }
    }

    /// Starts the process; appends what it prints to its log file.
    pub async fn start(&mut self, command: Command, drain: &Drain) -> anyhow::Result<()> {
        let output = Output::File(self.log.clone());
        let child = Child::start(&self.name, command, output, drain).await?;
        self.lives += 1;
        self.state = State::Up { child: Box::new(child), cpu: Duration::ZERO };
        Ok(())
    }

    /// The log file.
    pub fn log(&self) -> &std::path::Path {
        &self.log
    }

    /// Times that the process was started.
    pub fn lives(&self) -> u32 {
        self.lives
    }

    /// Ends that nobody asked for, in words.
    pub fn surprises(&self) -> &[String] {
        &self.surprises
    }

    /// True if the process runs, as far as the last look tells.
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }

    /// Time since the process ended; `None` while it runs.
    pub fn down_for(&self) -> Option<Duration> {
        match self.state {
            State::Down { since } => Some(since.elapsed()),
            State::Up { .. } => None,
        }
    }

    /// Reads the counters, also those of a process that ended just now.
    pub fn observe(&mut self) -> Usage {
        if let State::Up { child, cpu } = &mut self.state {
            *cpu = procfs::cpu_time(child.id()).unwrap_or(*cpu).max(*cpu);
            let peak = procfs::peak_rss_bytes(child.id()).unwrap_or(0);
            self.usage.peak_rss_bytes = self.usage.peak_rss_bytes.max(peak);
            return Usage { cpu: self.usage.cpu + *cpu, ..self.usage };
        }
        self.usage
    }

    /// True if the process ended by itself since the last look. An end that is not `expected` is noted as a surprise.
    pub fn reap(&mut self, expected: bool) -> anyhow::Result<bool> {
        self.observe();
        let State::Up { child, .. } = &mut self.state else { return Ok(false) };
        let Some(status) =
            child.try_wait().with_context(|| format!("waiting for {}", self.name))?
        else {
            return Ok(false);
        };
        if !expected {
            self.surprises.push(format!("{} (life {}) ended: {status}", self.name, self.lives));
        }
        self.ended();
        Ok(true)
    }

    /// Sends `signal` to the whole process group; does nothing if the process is down.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        if let State::Up { child, .. } = &self.state {
            child.signal(signal).with_context(|| format!("signalling {}", self.name))?;
        }
        Ok(())
    }

    /// Sends SIGKILL and waits for the end.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.observe();
        if let State::Up { child, .. } = &mut self.state {
            child.kill().await.with_context(|| format!("killing {}", self.name))?;
            self.ended();
        }
        Ok(())
    }

    /// Sends SIGTERM, and SIGKILL after `deadline`; waits for the end.
    pub async fn terminate(&mut self, deadline: Duration) -> anyhow::Result<()> {
        self.observe();
        if let State::Up { child, .. } = &mut self.state {
            child.terminate(deadline).await.with_context(|| format!("ending {}", self.name))?;
            self.ended();
        }
        Ok(())
    }

    fn ended(&mut self) {
        if let State::Up { cpu, .. } = self.state {
            self.usage.cpu += cpu;
            self.state = State::Down { since: Instant::now() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy() -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        command
    }

    #[tokio::test]
    async fn the_time_of_every_life_is_added_up() {
        let (dir, drain) = (tempfile::tempdir().unwrap(), Drain::new());
        let mut proc = Proc::new("busy", dir.path());
        let mut before = Duration::ZERO;
        for _ in 0..2 {
            proc.start(busy(), &drain).await.unwrap();
            while proc.observe().cpu < before + Duration::from_millis(50) {
                tokio::task::yield_now().await;
            }
            proc.kill().await.unwrap();
            before = proc.observe().cpu;
        }
        assert!(before >= Duration::from_millis(100), "{before:?}");
        assert!(!proc.is_up() && proc.down_for().is_some() && proc.lives() == 2);
        assert!(proc.surprises().is_empty());
    }

    #[tokio::test]
    async fn an_end_that_nobody_asked_for_is_told() {
        let (dir, drain) = (tempfile::tempdir().unwrap(), Drain::new());
        let mut proc = Proc::new("short", dir.path());
        let mut command = Command::new("sh");
        command.args(["-c", "exit 3"]);
        proc.start(command, &drain).await.unwrap();
        while !proc.reap(false).unwrap() {
            tokio::task::yield_now().await;
        }
        assert!(proc.surprises()[0].contains("exit status: 3"), "{:?}", proc.surprises());
    }
}
