//! The stream of finished trajectories, each exactly once. A task of its own keeps credit topped up,
//! acknowledges and re-attaches, while the trainer computes; dropping the consumer stops it.

mod assembly;
mod credit;
mod link;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anabranch_proto::{Version, pb};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use crate::config::millis;
use crate::error::Error;
use crate::job::Job;
use crate::trajectory::Trajectory;
use credit::Amount;
use link::Link;

/// How samples are packed to micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pack {
    /// Samples of a batch, over all shards. Default 1.
    pub min: u32,
    /// Batches have a multiple of so many samples; the rest is carried over. Default 1.
    pub multiple_of: u32,
    /// A group's samples come in one batch. Default false.
    pub whole_groups: bool,
    /// A smaller batch is sent after so long. Default zero: never.
    pub max_wait: Duration,
}

/// Which part of every batch this process takes. All shards see the same sequence of batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub index: u32,
    pub count: u32,
}

/// What may wait here, received and not yet taken. One batch more than this may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub bytes: u64,
    pub samples: u64,
    /// How long a lost manager is looked for before [`Consumer::next`] gives up.
    pub lost_after: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Delivery {
    Batch(Batch),
    /// Comes after the step's last batch.
    StepDone(StepDone),
    Advice(Advice),
}

/// A micro-batch, or this shard's part of one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Counts up by one. What [`Consumer::commit`] takes.
    pub seq: u64,
    pub step: u64,
    pub last_of_step: bool,
    pub trajectories: Vec<Trajectory>,
    pub samples_of_all_shards: u32,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepDone {
    pub step: u64,
    /// Samples.
    pub delivered: u64,
    /// Groups with fewer samples than asked for.
    pub short: Vec<Short>,
    /// Groups of which nothing was delivered.
    pub dropped: Vec<Short>,
    /// The step's last batch.
    pub last_seq: u64,
    pub tokens: u64,
    pub discarded_tokens: u64,
    pub max_lag: u32,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Short {
    pub key: String,
    pub delivered: u32,
    pub n: u32,
    pub why: String,
    /// Tokens of the samples that are missing: dropping long ones biases what is learned.
    pub lengths: Vec<u32>,
}

/// The manager's view on when to switch mode. Nothing has to follow it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advice {
    pub mode: String,
    pub why: String,
}

/// One attachment to the job's stream.
pub struct Consumer {
    // Unbounded in type only: batches are bounded by credit, and the rest is small and per step.
    inbox: mpsc::UnboundedReceiver<Result<(Delivery, Amount), Error>>,
    shared: Arc<Shared>,
    commits: watch::Sender<Option<(u64, Version)>>,
    sent: watch::Receiver<u64>,
    /// Aborts the task when dropped.
    _task: JoinSet<()>,
}

/// What the caller took since the link last looked.
#[derive(Debug, Default)]
struct Shared {
    taken: Mutex<Amount>,
    changed: Notify,
}

// === impl Consumer ===

impl Consumer {
    pub(crate) fn start(job: Job, pack: Pack, shard: Shard, window: Window) -> Result<Self, Error> {
        shard.check()?;
        window.check()?;
        let (outbox, inbox) = mpsc::unbounded_channel();
        let (commits, commits_seen) = watch::channel(None);
        let (sent_out, sent) = watch::channel(0);
        let shared = Arc::new(Shared::default());
        let link = Link::new(job, (pack, shard, window), shared.clone(), outbox);
        let mut task = JoinSet::new();
        task.spawn(link.run(commits_seen, sent_out));
        Ok(Self { inbox, shared, commits, sent, _task: task })
    }

    /// The next batch or piece of news. After an error the consumer is finished. Dropping the future
    /// loses nothing.
    pub async fn next(&mut self) -> Result<Delivery, Error> {
        let (delivery, cost) = self.inbox.recv().await.unwrap_or(Err(Error::Closed))?;
        self.shared.take(cost);
        Ok(delivery)
    }

    /// Says that batches up to `seq` are inside a checkpoint whose weights are `version`, so that the
    /// manager may forget them. Returns when that is on its way.
    pub async fn commit(&self, seq: u64, version: Version) -> Result<(), Error> {
        self.commits.send_modify(|newest| {
            if newest.is_none_or(|(at, _)| at <= seq) {
                *newest = Some((seq, version));
            }
        });
        let mut sent = self.sent.clone();
        sent.wait_for(|sent| *sent >= seq).await.map_err(|_| Error::Closed)?;
        Ok(())
    }
}

// === impl Shared ===

impl Shared {
    fn take(&self, cost: Amount) {
        let mut taken = self.lock();
        *taken = taken.plus(cost, 1);
        drop(taken);
        self.changed.notify_one();
    }

    fn drain(&self) -> Amount {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Amount> {
        self.taken.lock().expect("no code panics while it holds this lock")
    }
}

// === impl Pack, Shard, Window ===

impl Default for Pack {
    fn default() -> Self {
        Self { min: 1, multiple_of: 1, whole_groups: false, max_wait: Duration::ZERO }
    }
}

impl From<Pack> for pb::Pack {
    fn from(pack: Pack) -> Self {
        Self {
            min: pack.min,
            multiple_of: pack.multiple_of,
            whole_groups: pack.whole_groups,
            max_wait_ms: millis(pack.max_wait),
        }
    }
}

impl Shard {
    /// One process takes everything.
    pub const ALL: Self = Self { index: 0, count: 1 };

    fn check(self) -> Result<(), Error> {
        let Self { index, count } = self;
        if index < count {
            return Ok(());
        }
        Err(Error::Invalid(format!("shard {index} of {count} does not exist; shards count from 0")))
    }
}

impl Default for Window {
    fn default() -> Self {
        Self { bytes: 64 << 20, samples: 4096, lost_after: Duration::from_secs(300) }
    }
}

impl Window {
    fn check(self) -> Result<(), Error> {
        if self.bytes == 0 || self.samples == 0 {
            return Err(Error::invalid("a window of zero would never let the manager send"));
        }
        Ok(())
    }

    fn amount(self) -> Amount {
        let most = |n: u64| i64::try_from(n).unwrap_or(i64::MAX / 4).min(i64::MAX / 4);
        Amount { bytes: most(self.bytes), samples: most(self.samples) }
    }
}

// === conversions ===

impl From<pb::StepDone> for StepDone {
    fn from(done: pb::StepDone) -> Self {
        Self {
            step: done.step,
            delivered: done.delivered,
            short: done.short.into_iter().map(Short::from).collect(),
            dropped: done.dropped.into_iter().map(Short::from).collect(),
            last_seq: done.seq,
            tokens: done.tokens,
            discarded_tokens: done.discarded_tokens,
            max_lag: done.max_lag,
        }
    }
}

impl From<pb::step_done::Short> for Short {
    fn from(s: pb::step_done::Short) -> Self {
        Self { key: s.key, delivered: s.delivered, n: s.n, why: s.why, lengths: s.lengths }
    }
}

impl From<pb::Advice> for Advice {
    fn from(advice: pb::Advice) -> Self {
        Self { mode: advice.mode, why: advice.why }
    }
}
