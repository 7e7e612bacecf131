//! Publishes one version after the other through the SDK, and writes down what each contains before anything can use
//! it. Owns the numbering; when to publish is the run's business.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anabranch_trainer::{Job, Published};
use anyhow::Context;
use tokio::task::JoinSet;

use crate::records::WeightsLog;
use crate::weights;

pub struct Publishing {
    job: Job,
    log: WeightsLog,
    seed: u64,
    bytes: u64,
    number: u64,
    sealed: Arc<AtomicU64>,
    /// One per version, until it is sealed.
    waiting: JoinSet<()>,
}

impl Publishing {
    pub fn start(job: Job, log: &Path, seed: u64, bytes: u64) -> anyhow::Result<Self> {
        let log = WeightsLog::create(log)?;
        Ok(Self {
            job,
            log,
            seed,
            bytes,
            number: 0,
            sealed: Arc::default(),
            waiting: JoinSet::new(),
        })
    }

    /// Publishes the next version; returns when the trainer's tensors may change again.
    pub async fn next(&mut self) -> anyhow::Result<()> {
        self.number += 1;
        let number = self.number;
        let (tensors, line) = weights::version(self.seed, number, self.bytes);
        self.log.append(&line)?;
        let published = self.job.publish(number, tensors).await.context("publishing")?;
        let sealed = self.sealed.clone();
        self.waiting.spawn(async move { note_sealed(published, &sealed).await });
        while self.waiting.try_join_next().is_some() {}
        Ok(())
    }

    /// Versions handed over so far.
    pub fn count(&self) -> u64 {
        self.number
    }

    /// The newest version that engines may load.
    pub fn sealed(&self) -> u64 {
        self.sealed.load(Relaxed)
    }

    pub async fn stop(mut self) -> anyhow::Result<u64> {
        self.waiting.shutdown().await;
        Ok(self.number)
    }
}

async fn note_sealed(published: Published, sealed: &AtomicU64) {
    match published.sealed().await {
        Ok(version) => {
            sealed.fetch_max(version.number, Relaxed);
        }
        // A newer version took its slot: no engine will have it.
        Err(error) => tracing::debug!(%error, "a version was given up"),
    }
}
