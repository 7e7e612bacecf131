//! Settings that a job is opened with. Every default is safe for a first run.

mod weight_server;

use std::time::Duration;

use anabranch_proto::millis::millis;
use anabranch_proto::word::check_name;
use anabranch_proto::{BatchSeq, LogprobsMode, Model, OnRunning, Roll, Staleness, Version, pb};

use crate::error::Error;

pub use weight_server::{Shm, WeightServer};

/// One training job. `JobConfig::new("name")` is on-policy and starts from the engines' own weights.
#[derive(Clone, Debug, PartialEq)]
pub struct JobConfig {
    /// Name of the job: a short printable word. Several trainer processes may open the same (job, epoch);
    /// they join it.
    pub job: String,
    /// Epoch of the job: a trainer restarted from an older checkpoint opens the next one. Default 0.
    pub epoch: u32,
    /// Known facts about the model. Default none: the job takes them from its first engine.
    pub model: Model,
    /// Meaning of the log-probabilities. An engine that cannot give them is refused. Default tempered.
    pub logprobs_mode: LogprobsMode,
    /// Bound on the lag of delivered tokens. Default on-policy.
    pub staleness: Staleness,
    /// Effect of a new version on samples that run. Default continue.
    pub on_running: OnRunning,
    /// Time without a trainer after which the engines stop generating. Default 10 minutes.
    pub on_trainer_lost: Duration,
    /// Checkpoint that the trainer restarts from. Default none.
    pub resume: Option<Resume>,
    /// Seed that the samples' seeds derive from. Default 0.
    pub seed: u64,
    /// How engines take a new version. Default all at once.
    pub roll: Roll,
    /// Take the settings of a job that is open already as they are. Default false: settings that differ from the job's are
    /// refused, and both are named. For tools beside the trainer.
    pub join: bool,
    /// Server of the weights that this process publishes.
    pub weights: WeightServer,
}

/// Checkpoint that a trainer restarts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resume {
    /// Last batch inside the checkpoint; 0 for none.
    pub cursor: BatchSeq,
    /// Version of the checkpoint's weights.
    pub version: Version,
}

// === impl JobConfig ===

impl JobConfig {
    /// A job with all defaults.
    pub fn new(job: impl Into<String>) -> Self {
        Self {
            job: job.into(),
            epoch: 0,
            model: Model::default(),
            logprobs_mode: LogprobsMode::default(),
            staleness: Staleness::default(),
            on_running: OnRunning::default(),
            on_trainer_lost: Duration::from_secs(600),
            resume: None,
            seed: 0,
            roll: Roll::default(),
            join: false,
            weights: WeightServer::default(),
        }
    }

    /// Refuses what no manager would take. Opening a job calls it.
    pub fn check(&self) -> Result<(), Error> {
        check_name("job", &self.job)?;
        Ok(self.model.check()?)
    }

    pub(crate) fn request(&self) -> pb::OpenRequest {
        let resume = self.resume.unwrap_or_default();
        pb::OpenRequest {
            job: self.job.clone(),
            epoch: self.epoch,
            model: Some(self.model.clone().into()),
            convention: pb::Convention::from(self.logprobs_mode).into(),
            staleness: Some(self.staleness.into()),
            on_running: pb::OnRunning::from(self.on_running).into(),
            on_trainer_lost_ms: millis(self.on_trainer_lost),
            resume: self.resume.is_some(),
            cursor: resume.cursor.0,
            version: self.resume.map(|r| r.version.into()),
            seed: self.seed,
            roll: Some(self.roll.into()),
            join: self.join,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resume_is_told_only_where_there_is_one() {
        let fresh = JobConfig::new("math").request();
        assert_eq!((fresh.resume, fresh.cursor, fresh.version), (false, 0, None));
        let resume = Resume { cursor: BatchSeq(9), version: Version::base(1) };
        let config = JobConfig { resume: Some(resume), ..JobConfig::new("math") };
        let rewound = config.request();
        assert_eq!((rewound.resume, rewound.cursor), (true, 9));
        assert!(rewound.version.is_some());
    }

    #[test]
    fn a_job_is_named_with_one_word() {
        assert!(JobConfig::new("math").check().is_ok());
        let error = JobConfig::new("my job").check().expect_err("two words").to_string();
        assert!(error.contains("job: \"my job\" has a space in it"), "{error}");
    }
}
