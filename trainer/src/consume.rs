//! The stream of finished trajectories, each exactly once. A task behind the consumer grants credit,
//! acknowledges, and attaches again after a loss while the trainer computes; dropping the consumer ends it.

mod assembly;
mod attachment;
mod credit;
mod due;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anabranch_proto::{BatchSeq, Invalid, Pack, Shard, Step, Version, pb};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use crate::error::Error;
use crate::session::Session;
use crate::stream::Link;
use crate::trajectory::Trajectory;
use attachment::Attachment;
use credit::Amount;

/// Bounds on what waits here: received, and not yet taken from the [`Consumer`]. One batch may exceed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Bytes of trajectories, at least 1. Default 64 MiB.
    pub bytes: u64,
    /// Samples, at least 1. Default 4096.
    pub samples: u64,
    /// Time that a lost manager is looked for before [`Consumer::next`] fails. Default 5 minutes.
    pub lost_after: Duration,
}

/// One item of the stream: a micro-batch, or news of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Delivery {
    /// A micro-batch.
    Batch(Batch),
    /// The end of a step; comes after the step's last batch.
    StepDone(StepDone),
}

/// A micro-batch, or this shard's part of one.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Number in the job's sequence, which counts up by one: what [`Consumer::commit`] takes.
    pub seq: BatchSeq,
    /// Step that the samples were submitted for.
    pub step: Step,
    /// No other batch of the step comes after this one.
    pub last_of_step: bool,
    /// Finished samples, in no order that matters.
    pub trajectories: Vec<Trajectory>,
    /// Samples of the whole batch, over all shards.
    pub samples_of_all_shards: u32,
}

/// Report on a step that is over.
#[derive(Clone, Debug, PartialEq)]
pub struct StepDone {
    /// The step.
    pub step: Step,
    /// Samples that were delivered.
    pub delivered: u64,
    /// Groups with fewer samples than asked for.
    pub short: Vec<Short>,
    /// Groups of which nothing was delivered.
    pub dropped: Vec<Short>,
    /// The step's last batch.
    pub last_seq: BatchSeq,
    /// Tokens of the delivered samples.
    pub tokens: u64,
    /// Tokens that were made and thrown away.
    pub discarded_tokens: u64,
    /// Highest lag of a delivered token, in versions.
    pub max_lag: u32,
}

/// A group that did not come whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Short {
    /// Key of the group.
    pub key: String,
    /// Samples that were delivered.
    pub delivered: u32,
    /// Samples that were asked for.
    pub n: u32,
    /// Reason, for people.
    pub why: String,
    /// Tokens of each missing sample, at least half of what it had: leaving long ones out biases what is learned.
    pub lengths: Vec<u32>,
}

/// One attachment to the job's stream of trajectories. Dropping it detaches.
pub struct Consumer {
    // Unbounded in type only: batches are bounded by credit, and the rest is small and per step.
    inbox: mpsc::UnboundedReceiver<Result<(Delivery, Amount), Error>>,
    taken: Arc<Taken>,
    commits: watch::Sender<Option<(BatchSeq, Version)>>,
    committed: watch::Receiver<BatchSeq>,
    /// Aborts the task when dropped.
    _task: JoinSet<()>,
}

/// Sum of the deliveries that the caller took since the attachment last looked.
#[derive(Debug, Default)]
struct Taken {
    amount: Mutex<Amount>,
    changed: Notify,
}

// === impl Consumer ===

impl Consumer {
    pub(crate) fn start(
        session: &Session,
        pack: Pack,
        shard: Shard,
        window: Window,
    ) -> Result<Self, Error> {
        shard.check()?;
        window.check()?;
        let (outbox, inbox) = mpsc::unbounded_channel();
        let (commits, commits_seen) = watch::channel(None);
        let (committed_out, committed) = watch::channel(BatchSeq(0));
        let taken = Arc::new(Taken::default());
        let ends = (taken.clone(), outbox);
        let attachment =
            Attachment::new((pack, shard, window), ends, (commits_seen, committed_out));
        let link = Link::new(session.clone(), attachment::CALL, window.lost_after);
        let mut task = JoinSet::new();
        task.spawn_on(attachment.run(link), session.runtime());
        Ok(Self { inbox, taken, commits, committed, _task: task })
    }

    /// Waits for the next batch or the end of a step. After an error the consumer is finished. Dropping
    /// the future loses nothing.
    pub async fn next(&mut self) -> Result<Delivery, Error> {
        let (delivery, cost) = self.inbox.recv().await.unwrap_or(Err(Error::Closed))?;
        self.taken.add(cost);
        Ok(delivery)
    }

    /// Tells that the batches up to `seq` are inside a checkpoint whose weights are `version`, so that the
    /// manager may forget them. Returns when that is on its way.
    pub async fn commit(&self, seq: BatchSeq, version: Version) -> Result<(), Error> {
        self.commits.send_modify(|newest| {
            if newest.is_none_or(|(at, _)| at <= seq) {
                *newest = Some((seq, version));
            }
        });
        let mut committed = self.committed.clone();
        committed.wait_for(|at| *at >= seq).await.map_err(|_| Error::Closed)?;
        Ok(())
    }
}

// === impl Taken ===

impl Taken {
    fn add(&self, cost: Amount) {
        let mut amount = self.lock();
        *amount = amount.plus(cost, 1);
        drop(amount);
        self.changed.notify_one();
    }

    fn drain(&self) -> Amount {
        std::mem::take(&mut *self.lock())
    }

    async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Amount> {
        self.amount.lock().expect("no code panics while it holds this lock")
    }
}

// === impl Window ===

impl Default for Window {
    fn default() -> Self {
        Self { bytes: 64 << 20, samples: 4096, lost_after: Duration::from_secs(300) }
    }
}

impl Window {
    fn check(self) -> Result<(), Error> {
        if self.bytes == 0 || self.samples == 0 {
            let what = "zero bytes or samples would never let the manager send";
            return Err(Invalid::rule("window", what).into());
        }
        Ok(())
    }

    fn amount(self) -> Amount {
        let most = |n: u64| i64::try_from(n).unwrap_or(i64::MAX / 4).min(i64::MAX / 4);
        Amount { bytes: most(self.bytes), samples: most(self.samples) }
    }
}

// === conversions ===

impl StepDone {
    fn from_wire(done: pb::StepDone) -> Self {
        Self {
            step: Step(done.step),
            delivered: done.delivered,
            short: done.short.into_iter().map(Short::from_wire).collect(),
            dropped: done.dropped.into_iter().map(Short::from_wire).collect(),
            last_seq: BatchSeq(done.seq),
            tokens: done.tokens,
            discarded_tokens: done.discarded_tokens,
            max_lag: done.max_lag,
        }
    }
}

impl Short {
    fn from_wire(s: pb::step_done::Short) -> Self {
        Self { key: s.key, delivered: s.delivered, n: s.n, why: s.why, lengths: s.lengths }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_could_never_deliver_is_refused_before_anything_is_sent() {
        let session = Session::offline();
        let refused = |shard, window| {
            let consumer = Consumer::start(&session, Pack::default(), shard, window);
            consumer.err().expect("refused").to_string()
        };
        let shard = Shard { index: 2, count: 2 };
        assert!(refused(shard, Window::default()).contains("2 of 2 does not exist"));
        let window = Window { samples: 0, ..Window::default() };
        assert!(refused(Shard::ALL, window).contains("window: zero"));
    }

    #[test]
    fn a_consumer_starts_outside_the_runtime_and_ends_with_the_job() {
        let runtime = tokio::runtime::Runtime::new().expect("threads");
        let session = runtime.block_on(async { Session::offline() });
        let consumer = Consumer::start(&session, Pack::default(), Shard::ALL, Window::default());
        let mut consumer = consumer.expect("the session knows its runtime");
        session.closed().cancel();
        let ended = runtime.block_on(consumer.next());
        assert!(matches!(ended, Err(Error::Closed)));
        let committed = runtime.block_on(consumer.commit(BatchSeq(1), Version::base(0)));
        assert!(matches!(committed, Err(Error::Closed)));
    }
}
