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

/// Longest time without a delivery; after it the fleet is taken to be stuck.
const PATIENCE: Duration = Duration::from_secs(60);
/// Fewest samples of a micro-batch.
const MICRO_BATCH: u32 = 32;

/// Reason why no rollouts come.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    /// The manager failed a call.
    #[error(transparent)]
    Sdk(#[from] Error),
    /// Nothing was delivered for a minute.
    #[error("step {step}: nothing came for {} s; the logs of the engines may tell why", PATIENCE.as_secs())]
    Stuck { step: u64 },
}

/// One prompt and how often it is to be answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// Key of the group, unique in the run.
    pub key: String,
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Number of answers.
    pub n: u32,
    /// Settings of the generation.
    pub sampling: Sampling,
    /// Weight version that must make the answers; any if `None`.
    pub pin: Option<Version>,
}

/// The submitted steps, their deliveries, and the book on both.
pub struct Rollouts {
    job: Job,
    consumer: Consumer,
    book: Book,
    /// Batches of steps whose turn has not come, by step.
    inbox: BTreeMap<u64, VecDeque<Batch>>,
    done: BTreeMap<u64, StepDone>,
    /// Batches that were received and are in no committed version yet.
    open: BTreeSet<u64>,
    newest: u64,
}

impl Rollouts {
    /// Starts to consume the deliveries of `job`.
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

    /// The book on all samples so far.
    pub fn book(&self) -> &Book {
        &self.book
    }

    /// Submits all prompts of a step, which is then complete.
    pub async fn submit(&mut self, step: u64, asks: Vec<Ask>) -> Result<(), RolloutError> {
        asks.iter().for_each(|ask| self.book.asked(&ask.key, ask.n));
        let groups = asks.into_iter().map(Ask::group);
        let submit = self.job.submit(step).groups(groups).last().timeout(PATIENCE);
        submit.send().await?;
        Ok(())
    }

    /// The step's next micro-batch of whole groups; `None` when the step is over. Fails after a minute without a
    /// delivery.
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

    /// Tells the manager that a checkpoint with the weights `version` contains all of `step`.
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
