//! Where the demo writes: the report directory, and a directory in shared memory that goes away.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::ClusterError;

const SHM: &str = "/dev/shm";

/// Dropping it removes the directory in shared memory.
#[derive(Debug)]
pub struct Dirs {
    report: PathBuf,
    shm: PathBuf,
}

impl Dirs {
    /// Makes both. What an earlier run left in `report` is replaced, logs and meters included.
    pub fn make(report: &Path) -> Result<Self, ClusterError> {
        let make = |path: &Path| {
            fs::create_dir_all(path)
                .map_err(|source| ClusterError::Make { path: path.to_owned(), source })
        };
        make(report)?;
        let report = fs::canonicalize(report)
            .map_err(|source| ClusterError::Make { path: report.to_owned(), source })?;
        let stamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let name = format!("anabranch-demo-{}-{stamp:x}", std::process::id());
        let base = if Path::new(SHM).is_dir() { PathBuf::from(SHM) } else { report.clone() };
        let dirs = Self { shm: base.join(name), report };
        for part in ["logs", "meters", "model", "state"] {
            let part = dirs.report.join(part);
            if part.exists() {
                fs::remove_dir_all(&part)
                    .map_err(|source| ClusterError::Make { path: part.clone(), source })?;
            }
            make(&part)?;
        }
        // A manager of an earlier run may have been killed before it could remove it.
        let _ = fs::remove_file(dirs.announce());
        make(&dirs.shm)?;
        Ok(dirs)
    }

    pub fn report(&self) -> &Path {
        &self.report
    }

    /// Staged weights and the colocated engine's.
    pub fn shm(&self) -> &Path {
        &self.shm
    }

    /// The start-up weights of every engine.
    pub fn model(&self) -> PathBuf {
        self.report.join("model")
    }

    pub fn announce(&self) -> PathBuf {
        self.report.join("manager.json")
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.report.join("logs").join(format!("{name}.log"))
    }

    pub(super) fn state(&self) -> PathBuf {
        self.report.join("state")
    }

    pub(super) fn meter(&self, id: &str) -> PathBuf {
        self.report.join("meters").join(id)
    }
}

impl Drop for Dirs {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.shm) {
            tracing::warn!(path = %self.shm.display(), %error, "cannot remove it; remove it by hand");
        }
    }
}
