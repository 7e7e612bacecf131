//! Job: what the trainer fixed when it opened the job, which model it is, and which sessions speak for it.

use std::collections::BTreeSet;
use std::time::Duration;

use anabranch_proto::SessionId;
use anabranch_runtime::clock::Now;

use crate::event::{LogprobsMode, Model, OnRunning, OpenJob, Staleness};

/// A durable change of the job.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// A new job, or a new epoch of this one; its sessions are over.
    Opened {
        settings: Box<Settings>,
    },
    /// The trainer has said the settings of a job that somebody beside it had opened.
    Settled {
        settings: Box<Settings>,
    },
    /// A trainer's process speaks for the job.
    SessionOpened {
        session: SessionId,
    },
    SessionClosed {
        session: SessionId,
    },
    /// An engine filled in what the job did not know of its model.
    ModelLearned {
        model: Model,
    },
}

/// What the trainer fixed when it opened the job.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Settings {
    pub name: String,
    pub epoch: u32,
    /// What the trainer left open is filled in by the first engine.
    pub model: Model,
    pub logprobs_mode: LogprobsMode,
    pub staleness: Staleness,
    pub on_running: OnRunning,
    pub on_trainer_lost: Duration,
    pub seed: u64,
    /// Engines that keep serving while others load; `None`: all load at once.
    pub rolling: Option<u32>,
    /// Opened by somebody who only joins: the trainer's own settings take their place.
    pub provisional: bool,
}

/// Durable state, written by [`Books::apply`] only.
#[derive(Default, PartialEq)]
pub(crate) struct Books {
    settings: Option<Settings>,
    /// Trainer processes: the loop itself, `submit` and `publish` from other terminals.
    sessions: BTreeSet<SessionId>,
}

/// Owner of the job's state.
#[derive(Default)]
pub(crate) struct Job {
    books: Books,
    log: Vec<Change>,
    // Volatile
    last_heard: Now,
    paused: bool,
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

// === impl Books ===

impl Books {
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Opened { settings } => {
                self.settings = Some((**settings).clone());
                self.sessions.clear();
            }
            Change::Settled { settings } => self.settings = Some((**settings).clone()),
            Change::SessionOpened { session } => {
                self.sessions.insert(*session);
            }
            Change::SessionClosed { session } => {
                self.sessions.remove(session);
            }
            Change::ModelLearned { model } => {
                if let Some(settings) = &mut self.settings {
                    settings.model = model.clone();
                }
            }
        }
    }

    /// `None` before a trainer opened a job.
    pub fn settings(&self) -> Option<&Settings> {
        self.settings.as_ref()
    }

    pub fn sessions(&self) -> &BTreeSet<SessionId> {
        &self.sessions
    }
}

// === impl Job ===

impl Job {
    fn commit(&mut self, change: Change) {
        self.books.apply(&change);
        self.log.push(change);
    }

    /// Changes since the last call, in order.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.log)
    }

    pub fn books(&self) -> &Books {
        &self.books
    }

    pub fn settings(&self) -> Option<&Settings> {
        self.books.settings()
    }

    pub fn begin(&mut self, now: Now, open: OpenJob) {
        self.commit(Change::Opened { settings: Box::new(Settings::of(open)) });
        (self.last_heard, self.paused) = (now, false);
    }

    /// The trainer opens a job that somebody beside it had opened: its settings hold from now on.
    pub fn settle(&mut self, open: OpenJob) {
        self.commit(Change::Settled { settings: Box::new(Settings::of(open)) });
    }

    pub fn open_session(&mut self, session: SessionId) {
        self.commit(Change::SessionOpened { session });
    }

    pub fn close_session(&mut self, session: SessionId) {
        if self.books.sessions.contains(&session) {
            self.commit(Change::SessionClosed { session });
        }
    }

    /// When the trainer last said anything.
    pub fn last_heard(&self) -> Now {
        self.last_heard
    }

    pub fn heard(&mut self, now: Now) {
        self.last_heard = now;
    }

    /// True while the trainer is lost: nothing is placed.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Checks an engine against the job, if there is one; what the job does not know of its model it takes from its
    /// first engine.
    pub fn adopt(&mut self, engine: &Model, modes: &[LogprobsMode]) -> Result<(), Unfit> {
        let Some(settings) = self.books.settings() else { return Ok(()) };
        let model = settings.fit(engine, modes)?;
        if model != settings.model {
            self.commit(Change::ModelLearned { model });
        }
        Ok(())
    }
}

// === impl Settings ===

impl Settings {
    fn of(open: OpenJob) -> Self {
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
            provisional: open.join,
        }
    }

    /// The settings in which `open` differs from the job, each with both values; `None` where they are alike.
    pub fn differ(&self, open: &OpenJob) -> Option<String> {
        let both = |what: &str, here: String, there: String| {
            (here != there)
                .then(|| format!("{what}: the job has {here}, this trainer asks for {there}"))
        };
        let show = |value: &dyn std::fmt::Debug| format!("{value:?}");
        let told = [
            both("logprobs_mode", show(&self.logprobs_mode), show(&open.logprobs_mode)),
            both("staleness", show(&self.staleness), show(&open.staleness)),
            both("on_running", show(&self.on_running), show(&open.on_running)),
            both("on_trainer_lost", show(&self.on_trainer_lost), show(&open.on_trainer_lost)),
            both("seed", show(&self.seed), show(&open.seed)),
            both("roll", show(&self.rolling), show(&open.rolling)),
        ];
        let told: Vec<String> = told.into_iter().flatten().collect();
        (!told.is_empty()).then(|| told.join("; "))
    }

    /// The job's model with what `engine` adds to it.
    fn fit(&self, engine: &Model, modes: &[LogprobsMode]) -> Result<Model, Unfit> {
        if !modes.contains(&self.logprobs_mode) {
            return Err(Unfit::LogprobsMode { job: self.logprobs_mode, engine: modes.to_vec() });
        }
        let differ = |what, job: String, engine: String| Err(Unfit::Model { what, job, engine });
        let mut model = self.model.clone();
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
        Ok(model)
    }
}

fn sorted(ids: &[u32]) -> Vec<u32> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids
}
