//! The trainer's model: submits steps, takes batches with little credit, acknowledges, commits, publishes a version
//! after each step, switches modes, and sometimes restarts from its last checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_manager::action::{Batch, StepReport};
use anabranch_manager::event::{ConsumerId, PublisherId};
use anabranch_proto::{BatchSeq, SessionId, Version};

/// Place of the trainer in its loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The job is not open yet.
    Opening,
    /// The step is submitted, and its last batch has not come.
    Waiting {
        step: u64,
    },
    /// The trainer takes its GPUs back, publishes, and lends them again.
    Training {
        step: u64,
    },
    Down,
    /// The trainer has closed the job, and waits for the answer.
    Closing,
    /// The job is over.
    Done,
}

/// The trainer's state, and a book on what it received.
pub(crate) struct Trainer {
    pub phase: Phase,
    pub epoch: u32,
    pub session: Option<SessionId>,
    pub consumers: BTreeMap<ConsumerId, u32>,
    /// Streams that publish, by sender.
    pub publishers: BTreeMap<u32, PublisherId>,
    /// Version numbers with the number of senders that have not sealed them yet.
    pub unsealed: BTreeMap<u64, u32>,
    pub shards: u32,
    pub version: u64,
    /// Batch in which each (key, index) came: at most one, ever, within what is not rolled back.
    pub got: BTreeMap<(String, u32), BatchSeq>,
    pub seen: BTreeMap<u32, BatchSeq>,
    pub committed: BatchSeq,
    pub done: BTreeMap<u64, Done>,
    pub checked_tokens: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Done {
    pub seq: BatchSeq,
    /// Samples reported as not coming, by group key.
    pub missing: BTreeMap<String, u32>,
}

impl Trainer {
    /// A trainer that has not opened its job.
    pub fn new(shards: u32) -> Self {
        Self {
            phase: Phase::Opening,
            epoch: 1,
            session: None,
            consumers: BTreeMap::new(),
            publishers: BTreeMap::new(),
            unsealed: BTreeMap::new(),
            shards,
            version: 0,
            got: BTreeMap::new(),
            seen: BTreeMap::new(),
            committed: BatchSeq(0),
            done: BTreeMap::new(),
            checked_tokens: 0,
        }
    }

    /// Takes a batch, or its shard's part of one. Fails if something came twice, or out of order.
    pub fn take(&mut self, shard: u32, batch: &Batch, samples: &[usize]) -> Result<(), String> {
        let seen = self.seen.entry(shard).or_default();
        if batch.seq.0 != seen.0 + 1 {
            return Err(format!("shard {shard}: batch {} after {}", batch.seq.0, seen.0));
        }
        *seen = batch.seq;
        for index in samples {
            let sample = &batch.samples[*index];
            let name = (sample.key.to_string(), sample.sample.index);
            if let Some(before) = self.got.insert(name.clone(), batch.seq) {
                return Err(format!("I1: {name:?} came in batch {} and {}", before.0, batch.seq.0));
            }
        }
        Ok(())
    }

    /// Takes the report that a step is complete.
    pub fn step_done(&mut self, report: &StepReport) {
        let missing = report
            .short
            .iter()
            .chain(&report.dropped)
            .map(|short| (short.key.to_string(), short.n - short.delivered))
            .collect();
        self.done.insert(report.step, Done { seq: report.seq, missing });
    }

    /// The step's last batch, if all shards have it.
    pub fn has_step(&self, step: u64) -> Option<BatchSeq> {
        let done = self.done.get(&step)?;
        let all =
            (0..self.shards).all(|shard| self.seen.get(&shard).is_some_and(|seq| *seq >= done.seq));
        all.then_some(done.seq)
    }

    /// Kills the process and starts it again from the checkpoint, which holds everything up to `committed`.
    pub fn crash(&mut self, shards: u32) {
        let cursor = self.committed;
        self.got.retain(|_, seq| *seq <= cursor);
        self.done.retain(|_, done| done.seq <= cursor);
        self.shards = shards;
        self.seen = (0..shards).map(|shard| (shard, cursor)).collect();
        self.session = None;
        self.consumers.clear();
        self.publishers.clear();
        self.unsealed.clear();
        self.phase = Phase::Down;
    }

    /// True if every sample of the group is in the checkpoint.
    pub fn has_whole(&self, key: &str, n: u32) -> bool {
        (0..n).all(|index| self.got.contains_key(&(key.to_owned(), index)))
    }

    /// The next version.
    pub fn next_version(&mut self) -> Version {
        self.version += 1;
        version(self.epoch, self.version)
    }

    /// Fails unless every sample that was asked for came once, or was reported as not coming.
    pub fn account(&self, asked: &BTreeMap<String, u32>) -> Result<(), String> {
        let missing: BTreeMap<&String, u32> =
            self.done.values().flat_map(|d| d.missing.iter().map(|(k, n)| (k, *n))).collect();
        for (key, n) in asked {
            let came = self.got.range((key.clone(), 0)..=(key.clone(), u32::MAX)).count() as u32;
            let reported = missing.get(key).copied().unwrap_or(0);
            if came + reported != *n {
                return Err(format!(
                    "I1: of {key}, {came} came and {reported} were reported of {n}"
                ));
            }
        }
        let keys: BTreeSet<&String> = asked.keys().collect();
        match self.got.keys().find(|(key, _)| !keys.contains(key)) {
            Some(foreign) => Err(format!("{foreign:?} was never asked for")),
            None => Ok(()),
        }
    }
}

/// The version of a number; its root stands for its weights.
pub(crate) fn version(epoch: u32, number: u64) -> Version {
    let mut name = [0; 12];
    name[..4].copy_from_slice(&epoch.to_le_bytes());
    name[4..].copy_from_slice(&number.to_le_bytes());
    Version { epoch, number, root: anabranch_proto::Root(blake3::hash(&name).into()) }
}
