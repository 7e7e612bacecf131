//! The engine on the trainer's own GPU: lent out to generate, taken back to train, every step.
//! Owns the two mode switches and the weights that the trainer itself puts into that engine.
//!
//! ```text
//!   Lent ── take_back: barrier, its samples go on elsewhere, memory released ──► Ours
//!     ▲── lend: barrier, memory resumed, weights loaded by us, attested ──────────┘
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anabranch_trainer::{Error, Job, Mode, PerEngine, Version};
use serde::Deserialize;
use serde_json::json;

use crate::model::{CheckpointError, Model};

/// Time for each of the two barriers.
const BARRIER: Duration = Duration::from_secs(10);
/// Time for the engine to load weights.
const LOAD: Duration = Duration::from_secs(20);

/// Reason why the colocated engine could not be lent or taken back.
#[derive(Debug, thiserror::Error)]
pub enum ColocatedError {
    /// The manager failed a call.
    #[error(transparent)]
    Sdk(#[from] Error),
    /// The weights for the engine cannot be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Weights of an older version cannot be removed.
    #[error("cannot remove {path}: {source}")]
    Remove { path: PathBuf, source: io::Error },
    /// The engine did not change its mode.
    #[error("{engine} did not switch: {why}")]
    NotSwitched { engine: String, why: String },
    /// The engine does not answer a call.
    #[error("{engine} does not answer {call}: {source}")]
    Http { engine: String, call: &'static str, source: reqwest::Error },
    /// The engine answers that it did not load the weights.
    #[error("{engine} refused the weights: {why}")]
    Refused { engine: String, why: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Lent,
    Ours,
}

/// The engine on the trainer's own GPU, with the weights that it was given last.
pub struct Colocated {
    engine: String,
    url: String,
    /// Folder of the weights that the engine was started with.
    start_up: PathBuf,
    /// Folder in shared memory with one directory per version; only the newest version is kept.
    dir: PathBuf,
    newest: Option<PathBuf>,
    http: reqwest::Client,
    held: Held,
    switches: u64,
}

/// Body of the answer to `/update_weights_from_disk`.
#[derive(Deserialize)]
struct Updated {
    success: bool,
    #[serde(default)]
    message: String,
}

impl Colocated {
    /// Takes over an engine that serves its start-up weights.
    pub fn new(engine: &str, url: &str, start_up: PathBuf, shm: &Path) -> Self {
        Self {
            engine: engine.to_owned(),
            url: url.to_owned(),
            start_up,
            dir: shm.join("colocated"),
            newest: None,
            http: reqwest::Client::new(),
            held: Held::Lent,
            switches: 0,
        }
    }

    /// True if the engine generates now.
    pub fn is_lent(&self) -> bool {
        self.held == Held::Lent
    }

    /// Number of mode switches so far, in both directions.
    pub fn switches(&self) -> u64 {
        self.switches
    }

    /// Takes the GPU back to train: samples that run there continue on other engines.
    pub async fn take_back(&mut self, job: &Job) -> Result<(), ColocatedError> {
        self.switch(job, Mode::Train).await?;
        self.held = Held::Ours;
        Ok(())
    }

    /// Lends the GPU with the weights of `model`, which are `version`; with the start-up weights if `model` is `None`.
    pub async fn lend(
        &mut self,
        job: &Job,
        model: Option<&Model>,
        version: Version,
    ) -> Result<(), ColocatedError> {
        self.switch(job, Mode::Generate).await?;
        let fresh = match model {
            Some(model) => {
                let dir = self.dir.join(format!("v{}", version.number));
                model.save(&dir)?;
                Some(dir)
            }
            None => None,
        };
        self.load(fresh.as_deref().unwrap_or(&self.start_up), version).await?;
        job.report_engine(&self.engine, version).await?;
        self.held = Held::Lent;
        let old = std::mem::replace(&mut self.newest, fresh.clone());
        if let Some(old) = old.filter(|old| fresh.as_ref() != Some(old)) {
            let removed = fs::remove_dir_all(&old);
            removed.map_err(|source| ColocatedError::Remove { path: old, source })?;
        }
        Ok(())
    }

    async fn switch(&mut self, job: &Job, mode: Mode) -> Result<(), ColocatedError> {
        let all = job.set_mode(mode, BARRIER).await?;
        self.switches += 1;
        let failed = all.into_iter().find(|one| one.engine == self.engine && !one.error.is_empty());
        match failed {
            Some(PerEngine { engine, error: why, .. }) => {
                Err(ColocatedError::NotSwitched { engine, why })
            }
            None => Ok(()),
        }
    }

    async fn load(&self, dir: &Path, version: Version) -> Result<(), ColocatedError> {
        const CALL: &str = "/update_weights_from_disk";
        let failed =
            |source| ColocatedError::Http { engine: self.engine.clone(), call: CALL, source };
        let body = json!({
            "model_path": dir,
            "weight_version": version.to_string(),
            "flush_cache": true,
        });
        let call = self.http.post(format!("{}{CALL}", self.url)).timeout(LOAD).json(&body);
        let updated: Updated = call.send().await.map_err(failed)?.json().await.map_err(failed)?;
        match updated.success {
            true => Ok(()),
            false => {
                let (engine, why) = (self.engine.clone(), updated.message);
                Err(ColocatedError::Refused { engine, why })
            }
        }
    }
}
