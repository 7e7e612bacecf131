//! The bench's end of a node: starts the process, sends orders, matches answers to them, kills it. Owns the process
//! and the task that reads its answers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::order::{Answer, Call, Order, Reply};

/// One host of a figure.
pub struct Host {
    /// Name of the host in logs and orders.
    pub name: String,
    child: Child,
    stdin: tokio::sync::Mutex<ChildStdin>,
    next: AtomicU64,
    waiting: Arc<Mutex<Waiting>>,
    _reader: JoinSet<()>,
}

/// Orders without an answer. Bounded by what the bench has asked for.
#[derive(Default)]
struct Waiting {
    orders: BTreeMap<u64, Sink>,
    over: bool,
}

struct Sink {
    progress: watch::Sender<u64>,
    done: oneshot::Sender<Result<Value, String>>,
}

/// An order whose answer is on its way.
pub struct Pending {
    host: String,
    /// Verified bytes so far, for a fetch.
    pub progress: watch::Receiver<u64>,
    done: oneshot::Receiver<Result<Value, String>>,
}

// === impl Host ===

impl Host {
    /// Starts `command`, which runs this program, perhaps in a namespace. Logs of the node are appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &PathBuf) -> anyhow::Result<Host> {
        let file = std::fs::File::options().create(true).append(true).open(log);
        let file = file.with_context(|| format!("opening {}", log.display()))?;
        command.args(["bench", "transfer-node"]).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let stdin = child.stdin.take().context("stdin was asked for")?;
        let stdout = child.stdout.take().context("stdout was asked for")?;
        let waiting = Arc::<Mutex<Waiting>>::default();
        let mut reader = JoinSet::new();
        reader.spawn(read(stdout, Arc::clone(&waiting)));
        Ok(Host {
            name: name.to_owned(),
            child,
            stdin: stdin.into(),
            next: AtomicU64::new(1),
            waiting,
            _reader: reader,
        })
    }

    /// Gives an order; the answer comes later.
    pub async fn send(&self, order: Order) -> anyhow::Result<Pending> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (progress, seen) = watch::channel(0);
        let (done, outcome) = oneshot::channel();
        {
            let mut waiting = lock(&self.waiting);
            if waiting.over {
                bail!("{} has ended", self.name);
            }
            waiting.orders.insert(id, Sink { progress, done });
        }
        let mut line = serde_json::to_vec(&Call { id, order })?;
        line.push(b'\n');
        let written = self.stdin.lock().await.write_all(&line).await;
        written.with_context(|| format!("{} takes no orders", self.name))?;
        Ok(Pending { host: self.name.clone(), progress: seen, done: outcome })
    }

    /// Gives an order and waits for its answer.
    pub async fn ask<T: DeserializeOwned>(&self, order: Order) -> anyhow::Result<T> {
        self.send(order).await?.answer().await
    }

    /// Process id; `None` if the process has ended.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.pid().and_then(|pid| Pid::from_raw(pid as i32));
        let pid = pid.with_context(|| format!("{} has ended", self.name))?;
        kill_process(pid, signal).with_context(|| format!("signalling {}", self.name))
    }

    /// Kills the process without a goodbye, as a machine that is taken away.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.with_context(|| format!("killing {}", self.name))
    }

    /// Ends the process by its stdin; it removes its staging area.
    pub async fn end(self) -> anyhow::Result<()> {
        let Host { name, mut child, stdin, .. } = self;
        drop(stdin);
        child.wait().await.map(drop).with_context(|| format!("waiting for {name}"))
    }
}

/// Hands the node's answers to their callers; when the node ends, fails all orders that still wait.
async fn read(stdout: ChildStdout, waiting: Arc<Mutex<Waiting>>) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(Reply { id, is }) = serde_json::from_str(&line) else {
            tracing::warn!(line, "a node said what is no reply");
            continue;
        };
        let mut waiting = lock(&waiting);
        let outcome = match is {
            Answer::Progress(bytes) => {
                if let Some(sink) = waiting.orders.get(&id) {
                    sink.progress.send_replace(bytes);
                }
                continue;
            }
            Answer::Done(value) => Ok(value),
            Answer::Failed(why) => Err(why),
        };
        if let Some(sink) = waiting.orders.remove(&id) {
            sink.done.send(outcome).ok();
        }
    }
    let mut waiting = lock(&waiting);
    waiting.over = true;
    waiting.orders.clear();
}

fn lock(waiting: &Mutex<Waiting>) -> std::sync::MutexGuard<'_, Waiting> {
    waiting.lock().expect("held only to look up")
}

// === impl Pending ===

impl Pending {
    /// Waits for the answer. Fails if the node refused the order or ended.
    pub async fn answer<T: DeserializeOwned>(mut self) -> anyhow::Result<T> {
        self.answer_in_place().await
    }

    /// Like [`Pending::answer`] without consuming the order; to be called once.
    pub async fn answer_in_place<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let outcome = (&mut self.done).await.map_err(|_| anyhow!("{} ended", self.host))?;
        let value = outcome.map_err(|why| anyhow!("{}: {why}", self.host))?;
        serde_json::from_value(value).with_context(|| format!("{} answered otherwise", self.host))
    }

    /// Waits until so many bytes are verified, or the order is over.
    pub async fn reaches(&mut self, bytes: u64) {
        self.progress.wait_for(|at| *at >= bytes).await.ok();
    }
}
