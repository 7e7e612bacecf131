//! A node as the trainer of a real job: publishes through the SDK and waits until the engines have it.

use std::time::{Duration, Instant};

use anabranch_trainer::{Client, Job, JobConfig, LinkKind, LoadStage, Published, Shm};
use anyhow::{Context, bail};

use super::super::model::Model;
use super::super::order::{Activated, Publish};

/// Longest time that the manager may take to listen.
const START: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(200);

/// The job, and the weights of its newest version.
pub struct Training {
    job: Job,
    engines: usize,
    model: Option<Model>,
}

impl Training {
    /// Opens the job at `manager`, and expects so many engines.
    pub async fn open(manager: &str, engines: usize) -> anyhow::Result<Training> {
        let until = Instant::now() + START;
        let client = loop {
            match Client::connect(manager, None).await {
                Ok(client) => break client,
                Err(error) if Instant::now() > until => return Err(error).context(START_WORDS),
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        };
        let mut config = JobConfig::new("default");
        config.weights.links = vec![LinkKind::Tcp];
        config.weights.hash_threads = 2;
        // Hosts that are namespaces share /dev/shm: the bytes must cross the links.
        config.weights.shm = Shm::Off;
        Ok(Training { job: client.open(config).await?, engines, model: None })
    }

    /// Publishes a version and waits until all engines serve it.
    pub async fn publish(&mut self, order: &Publish) -> anyhow::Result<Activated> {
        let old = self.model.take();
        let (model, changed_share) = Model::next(old, order.bytes, order.seed, order.changed);
        let started = Instant::now();
        let published = self.job.publish(order.number, &model.refs()).await?;
        self.model = Some(model);
        self.active(published, started, changed_share).await
    }

    /// Waits until every engine has loaded the version; before the first version, until the engines are there.
    async fn active(
        &self,
        mut published: Published,
        started: Instant,
        changed_share: f64,
    ) -> anyhow::Result<Activated> {
        published.sealed().await?;
        let sealed_ms = started.elapsed().as_secs_f64() * 1e3;
        loop {
            let status = published.changed().await?;
            let now_ms = started.elapsed().as_secs_f64() * 1e3;
            if let Some(on) = status.engines.iter().find(|on| !on.error.is_empty()) {
                bail!("{} did not take version {}: {}", on.engine, published.number, on.error);
            }
            let active = status.engines.iter().filter(|on| on.stage == LoadStage::Active).count();
            if active == self.engines {
                return Ok(Activated {
                    copied_ms: published.copied_in.as_secs_f64() * 1e3,
                    sealed_ms,
                    active_ms: now_ms,
                    changed_share,
                    trainer_link_bytes: 0,
                });
            }
        }
    }
}

const START_WORDS: &str = "the manager does not answer";
