//! What a job is opened with. Every default is safe for a first run.

use std::time::Duration;

use anabranch_proto::{Version, pb};

use crate::publish::WeightServer;

/// One training job. `JobConfig::new("name")` is on-policy and starts from the engines' own weights.
#[derive(Clone, Debug, PartialEq)]
pub struct JobConfig {
    /// A short printable name. Several trainer processes may open the same (job, epoch): they join it.
    pub job: String,
    /// A trainer restarted from an older checkpoint opens the next epoch.
    pub epoch: u32,
    /// Empty fields are taken from the first engine.
    pub model: pb::Model,
    pub convention: Convention,
    pub staleness: Staleness,
    /// What a new version does to samples that run. Default continue.
    pub on_running: OnRunning,
    /// After so long without a trainer the engines stop generating. Default 10 minutes.
    pub on_trainer_lost: Duration,
    /// Where the checkpoint stands that the trainer restarts from.
    pub resume: Option<Resume>,
    /// Sample seeds derive from it. Default 0.
    pub seed: u64,
    pub roll: Roll,
    /// Where the weights that this process publishes are served.
    pub weights: WeightServer,
}

/// Which distribution a log-probability is of. An engine that cannot give it is refused at attach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Convention {
    /// Log-softmax of the logits.
    Raw,
    /// After temperature, before top-p, top-k and min-p.
    #[default]
    Tempered,
    /// Of the distribution that was sampled from.
    Processed,
}

/// How old the weights of a delivered token may be, against the version current at the first offer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Staleness {
    #[default]
    OnPolicy,
    Bounded {
        max_lag: u32,
        on_exceed: OnExceed,
    },
    Unbounded,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnExceed {
    /// A new version becomes current after the groups it would make too old were delivered.
    #[default]
    Wait,
    /// Such samples restart from their prompt; their tokens are counted as discarded.
    Restart,
    /// Such groups are dropped and reported in [`crate::StepDone`].
    Drop,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnRunning {
    /// Load after the running samples ended.
    Finish,
    /// Freeze, load, recompute KV, go on with the new version.
    #[default]
    Continue,
    /// End them; they continue on another engine.
    Abort,
}

/// How engines take a new version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Roll {
    #[default]
    AllAtOnce,
    /// At least `keep_serving` engines serve at any time.
    Rolling { keep_serving: u32 },
}

/// The last batch that is inside the checkpoint, and the version the trainer starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resume {
    pub cursor: u64,
    pub version: Version,
}

// === impl JobConfig ===

impl JobConfig {
    pub fn new(job: impl Into<String>) -> Self {
        Self {
            job: job.into(),
            epoch: 0,
            model: pb::Model::default(),
            convention: Convention::default(),
            staleness: Staleness::default(),
            on_running: OnRunning::default(),
            on_trainer_lost: Duration::from_secs(600),
            resume: None,
            seed: 0,
            roll: Roll::default(),
            weights: WeightServer::default(),
        }
    }

    pub(crate) fn request(&self) -> pb::OpenRequest {
        let resume = self.resume.unwrap_or_default();
        pb::OpenRequest {
            job: self.job.clone(),
            epoch: self.epoch,
            model: Some(self.model.clone()),
            convention: pb::Convention::from(self.convention) as i32,
            staleness: Some(self.staleness.into()),
            on_running: pb::OnRunning::from(self.on_running) as i32,
            on_trainer_lost_ms: millis(self.on_trainer_lost),
            resume: self.resume.is_some(),
            cursor: resume.cursor,
            version: self.resume.map(|r| r.version.into()),
            seed: self.seed,
            roll: Some(self.roll.into()),
        }
    }
}

pub(crate) fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

// === conversions ===

impl From<Convention> for pb::Convention {
    fn from(convention: Convention) -> Self {
        match convention {
            Convention::Raw => Self::Raw,
            Convention::Tempered => Self::Tempered,
            Convention::Processed => Self::Processed,
        }
    }
}

impl From<OnRunning> for pb::OnRunning {
    fn from(on_running: OnRunning) -> Self {
        match on_running {
            OnRunning::Finish => Self::Finish,
            OnRunning::Continue => Self::Continue,
            OnRunning::Abort => Self::Abort,
        }
    }
}

impl From<Staleness> for pb::Staleness {
    fn from(staleness: Staleness) -> Self {
        use pb::staleness::{Kind, OnExceed as PbExceed};
        let (kind, max_lag, on_exceed) = match staleness {
            Staleness::OnPolicy => (Kind::OnPolicy, 0, OnExceed::Wait),
            Staleness::Bounded { max_lag, on_exceed } => (Kind::Bounded, max_lag, on_exceed),
            Staleness::Unbounded => (Kind::Unbounded, 0, OnExceed::Wait),
        };
        let on_exceed = match on_exceed {
            OnExceed::Wait => PbExceed::Wait,
            OnExceed::Restart => PbExceed::Restart,
            OnExceed::Drop => PbExceed::Drop,
        };
        Self { kind: kind as i32, max_lag, on_exceed: on_exceed as i32 }
    }
}

impl From<Roll> for pb::RollPolicy {
    fn from(roll: Roll) -> Self {
        match roll {
            Roll::AllAtOnce => Self { rolling: false, keep_serving: 0 },
            Roll::Rolling { keep_serving } => Self { rolling: true, keep_serving },
        }
    }
}
