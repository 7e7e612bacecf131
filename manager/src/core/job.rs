//! The job: what the trainer fixed when it opened it, and who speaks for it.

use std::collections::BTreeSet;

use anabranch_proto::SessionId;
use anabranch_runtime::clock::Now;

use crate::event::{LogprobsMode, Model, OnRunning, OpenJob, Staleness};

pub(crate) struct Job {
    pub name: String,
    pub epoch: u32,
    pub model: Model,
    pub logprobs_mode: LogprobsMode,
    pub staleness: Staleness,
    pub on_running: OnRunning,
    pub on_trainer_lost: std::time::Duration,
    pub seed: u64,
    pub rolling: Option<u32>,
    /// Trainer processes: the loop itself, `submit` and `publish` from other terminals.
    pub sessions: BTreeSet<SessionId>,
    pub last_heard: Now,
    /// The trainer is lost: nothing is placed.
    pub paused: bool,
}

/// An engine does not fit the job.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unfit {
    #[error(
        "the job's log-probabilities are {job:?}, this engine gives {engine:?}; restart the engine with the \
         flag that changes it, or open the job with another logprobs mode"
    )]
    LogprobsMode { job: LogprobsMode, engine: Vec<LogprobsMode> },
    #[error("the job's model has {what} {job}, this engine has {engine}: another model?")]
    Model { what: &'static str, job: String, engine: String },
}

impl Job {
    pub fn new(open: OpenJob, now: Now) -> Self {
        Self {
            name: open.job,
            epoch: open.epoch,
            model: open.model,
            logprobs_mode: open.logprobs_mode,
            staleness: open.staleness,
            on_running: open.on_running,
            on_trainer_lost: open.on_trainer_lost,
            seed: open.seed,
            rolling: open.rolling,
            sessions: BTreeSet::new(),
            last_heard: now,
            paused: false,
        }
    }

    /// Checks an engine against the job; what the job does not know yet it takes from its first engine.
    pub fn adopt(&mut self, engine: &Model, logprobs_modes: &[LogprobsMode]) -> Result<(), Unfit> {
        if !logprobs_modes.contains(&self.logprobs_mode) {
            return Err(Unfit::LogprobsMode {
                job: self.logprobs_mode,
                engine: logprobs_modes.to_vec(),
            });
        }
        let differ = |what, job: String, engine: String| Err(Unfit::Model { what, job, engine });
        let model = &mut self.model;
        if model.vocab != 0 && engine.vocab != 0 && model.vocab != engine.vocab {
            return differ("vocabulary size", model.vocab.to_string(), engine.vocab.to_string());
        }
        let both = !model.eos_ids.is_empty() && !engine.eos_ids.is_empty();
        if both && sorted(&model.eos_ids) != sorted(&engine.eos_ids) {
            return differ(
                "EOS ids",
                format!("{:?}", model.eos_ids),
                format!("{:?}", engine.eos_ids),
            );
        }
        let (mine, theirs) = (&model.tokenizer_digest, &engine.tokenizer_digest);
        if !mine.is_empty() && !theirs.is_empty() && mine != theirs {
            return differ("tokenizer", mine.clone(), theirs.clone());
        }
        model.vocab = model.vocab.max(engine.vocab);
        model.max_context = model.max_context.max(engine.max_context);
        if model.eos_ids.is_empty() {
            model.eos_ids = sorted(&engine.eos_ids);
        }
        if model.tokenizer_digest.is_empty() {
            model.tokenizer_digest.clone_from(&engine.tokenizer_digest);
        }
        if model.id.is_empty() {
            model.id.clone_from(&engine.id);
        }
        Ok(())
    }
}

fn sorted(ids: &[u32]) -> Vec<u32> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids
}
