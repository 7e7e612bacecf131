//! Publishes one version after the other through the SDK, and writes down what each contains before anything can use
//! it. Owns the numbering; when to publish is the run's business.

use std::path::Path;

use anabranch_trainer::{Job, LoadStage, OnEngine, Published};
use anyhow::Context;

use crate::records::WeightsLog;
use crate::weights::{self, Tensor};

/// The versions of one run, and the job that they are published for.
pub struct Publishing {
    job: Job,
    log: WeightsLog,
    seed: u64,
    bytes: u64,
    number: u64,
    newest: Option<Published>,
}

impl Publishing {
    /// Starts at version 1; `log` is the file that the verifier reads, `bytes` the size of a version.
    pub fn start(job: Job, log: &Path, seed: u64, bytes: u64) -> anyhow::Result<Self> {
        let log = WeightsLog::create(log)?;
        Ok(Self { job, log, seed, bytes, number: 0, newest: None })
    }

    /// Publishes the next version; returns when the trainer's tensors may change again.
    pub async fn next(&mut self) -> anyhow::Result<()> {
        self.number += 1;
        let (tensors, line) = weights::version(self.seed, self.number, self.bytes);
        self.log.append(&line)?;
        let tensors: Vec<_> = tensors.iter().map(Tensor::borrow).collect();
        let published = self.job.publish(self.number, &tensors).await;
        self.newest = Some(published.context("publishing")?);
        Ok(())
    }

    /// Number of versions that were handed over.
    pub fn count(&self) -> u64 {
        self.number
    }

    /// True if the agent of `engine` fetches the newest version now, as far as the manager has said.
    pub fn is_fetching(&self, engine: &str) -> bool {
        let status = self.newest.as_ref().and_then(Published::status);
        let fetches = |on: &OnEngine| on.engine == engine && on.stage == LoadStage::Fetching;
        status.is_some_and(|status| status.engines.iter().any(fetches))
    }
}
