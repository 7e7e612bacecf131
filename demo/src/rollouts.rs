//! Prompts to the fleet and trajectories back, step by step, with a book on every one of them.
//! Owns what is asked, received and committed. Does not train, nor judge answers.

mod book;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use anabranch_trainer::{
    Batch, BatchSeq, Consumer, Delivery, Error, Group, Job, Pack, Sampling, Shard, StepDone,
    Trajectory, Version,
};

pub use book::{Book, Totals};

/// A fleet that delivers nothing for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(60);
/// Samples of a micro-batch, at least.
const MICRO_BATCH: u32 = 32;

#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    #[error(transparent)]
    Sdk(#[from] Error),
    #[error("step {step}: nothing came for {} s; the logs of the engines may tell why", PATIENCE.as_secs())]
    Stuck { step: u64 },
}

/// One prompt and how often it is to be answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    pub key: String,
    pub prompt: Vec<u32>,
    pub n: u32,
    pub sampling: Sampling,
    pub pin: Option<Version>,
}

pub struct Rollouts {
    job: Job,
    consumer: Consumer,
    book: Book,
    /// Batches of steps that are not at their turn yet.
    inbox: BTreeMap<u64, VecDeque<Batch>>,
    done: BTreeMap<u64, StepDone>,
    /// Received, and not in any version yet.
    open: BTreeSet<u64>,
    newest: u64,
}

impl Rollouts {
    pub fn start(job: Job) -> Result<Self, RolloutError> {
        let pack = Pack {
            min: MICRO_BATCH,
            whole_groups: true,
            max_wait: Some(Duration::from_millis(500)),
            ..Pack::default()
        };
        let consumer = job.consume(pack, Shard::ALL)?;
        Ok(Self {
            job,
            consumer,
            book: Book::default(),
            inbox: BTreeMap::new(),
            done: BTreeMap::new(),
            open: BTreeSet::new(),
            newest: 0,
        })
    }

    pub fn book(&self) -> &Book {
        &self.book
    }

    /// Submits a whole step.
    pub async fn submit(&mut self, step: u64, asks: Vec<Ask>) -> Result<(), RolloutError> {
        asks.iter().for_each(|ask| self.book.asked(&ask.key, ask.n));
        let groups = asks.into_iter().map(Ask::group);
        let submit = self.job.submit(step).groups(groups).last().timeout(PATIENCE);
        submit.send().await?;
        Ok(())
    }

    /// The step's next micro-batch of whole groups; `None` when the step is over.
    pub async fn next(&mut self, step: u64) -> Result<Option<Vec<Trajectory>>, RolloutError> {
        loop {
            if let Some(batch) = self.inbox.get_mut(&step).and_then(VecDeque::pop_front) {
                return Ok(Some(batch.trajectories));
            }
            if self.done.contains_key(&step) {
                self.inbox.remove(&step);
                return Ok(None);
            }
            let next = tokio::time::timeout(PATIENCE, self.consumer.next()).await;
            match next.map_err(|_| RolloutError::Stuck { step })?? {
                Delivery::Batch(batch) => self.receive(batch),
                Delivery::StepDone(done) => {
                    self.done.insert(done.step.0, done);
                }
            }
        }
    }

    /// All of `step` is in a checkpoint whose weights are `version`.
    pub async fn commit(&mut self, step: u64, version: Version) -> Result<(), RolloutError> {
        let later: BTreeSet<u64> =
            self.inbox.values().flatten().filter(|b| b.step.0 > step).map(|b| b.seq.0).collect();
        self.open.retain(|seq| later.contains(seq));
        let upto = self.open.first().map_or(self.newest, |first| first - 1);
        self.done.remove(&step);
        Ok(self.consumer.commit(BatchSeq(upto), version).await?)
    }

    fn receive(&mut self, batch: Batch) {
        batch.trajectories.iter().for_each(|t| self.book.received(batch.step.0, t));
        self.open.insert(batch.seq.0);
        self.newest = self.newest.max(batch.seq.0);
        self.inbox.entry(batch.step.0).or_default().push_back(batch);
    }
}

impl Ask {
    fn group(self) -> Group {
        let group = Group::new(self.key, self.prompt, self.n, self.sampling);
        self.pin.into_iter().fold(group, Group::pin)
    }
}
