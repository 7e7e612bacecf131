//! The job, its steps and samples, and what waits to be placed or delivered.

use std::borrow::Cow;

use anabranch_proto::{LogprobsMode, OnRunning, Staleness};
use serde::{Deserialize, Serialize};

use crate::lenient::{Lenient, readable};

/// The training job that the manager works for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobView {
    /// Name that the trainer gave.
    pub name: String,
    /// Epoch; a trainer that restarts from an older checkpoint opens a higher one.
    pub epoch: u32,
    /// Bound on the age of tokens; none where this version of the reader cannot read it.
    #[serde(deserialize_with = "readable")]
    pub staleness: Option<Staleness>,
    /// Log-probabilities that engines must give.
    pub convention: Lenient<LogprobsMode>,
    /// Fate of running samples when a new version becomes current.
    pub on_running: Lenient<OnRunning>,
    /// Trainer sessions that have joined.
    pub trainers: usize,
    /// Generation stands still, because no trainer was heard for too long.
    pub paused: bool,
    /// Silence of the trainer.
    pub trainer_heard_ms: u64,
}

/// One training step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepView {
    /// Number that the trainer gave.
    pub step: u64,
    /// No more groups will come.
    pub is_final: bool,
    /// The last micro-batch of the step was made.
    pub over: bool,
    /// Groups submitted.
    pub groups: usize,
    /// Groups that have not ended.
    pub open_groups: u32,
    /// Finished samples that are in no micro-batch yet.
    pub pooled: usize,
    /// Samples in micro-batches.
    pub delivered: u64,
    /// Tokens in micro-batches.
    pub tokens: u64,
    /// Tokens thrown away by restarts and drops.
    pub discarded_tokens: u64,
    /// Versions that the oldest delivered token was behind.
    pub max_lag: u64,
    /// Groups with fewer samples than asked for.
    pub short: usize,
    /// Groups dropped.
    pub dropped: usize,
}

/// Samples by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplesView {
    /// In the queue.
    pub waiting: u64,
    /// On an engine.
    pub running: u64,
    /// Complete, and in no micro-batch yet.
    pub finished: u64,
    /// In a micro-batch that is not committed.
    pub delivered: u64,
    /// Given up.
    pub abandoned: u64,
}

/// The queue of samples to place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueView {
    /// Samples that lost an engine and are placed first.
    pub resumed: usize,
    /// Samples that never ran.
    pub fresh: usize,
    /// Suspected poison, to be tried alone.
    pub held: usize,
    /// Why nothing is placed; none while the queue is empty.
    pub blocked: Option<Cow<'static, str>>,
}

/// Micro-batches on their way to the trainer. Numbers are places in the job's sequence, from 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EgressView {
    /// Highest number made.
    pub offered: u64,
    /// Highest number up to which all are acknowledged.
    pub acked: u64,
    /// Highest number up to which all are committed.
    pub committed: u64,
    /// Micro-batches kept until they are committed.
    pub retained_batches: usize,
    /// Somebody consumes.
    pub consumers: bool,
}

/// Totals since the manager started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Tokens that engines generated and the manager kept, a tenth of a second late.
    pub tokens: u64,
    /// Samples finished.
    pub finished: u64,
    /// Samples delivered.
    pub delivered: u64,
    /// Tokens of the delivered samples.
    pub delivered_tokens: u64,
    /// Samples whose micro-batch was committed.
    pub committed: u64,
    /// Samples given up.
    pub abandoned: u64,
    /// Samples dropped, because they became too old.
    pub dropped: u64,
    /// Times that a sample left an engine before it was finished.
    pub migrations: u64,
    /// Times that a sample began again from its prompt.
    pub restarts: u64,
    /// Tokens thrown away by restarts, to be generated again.
    pub regenerated_tokens: u64,
    /// Engines lost.
    pub engine_deaths: u64,
    /// Messages that broke the protocol.
    pub misbehaved: u64,
}
