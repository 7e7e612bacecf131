//! Folders that the demo writes to: the report directory, and a directory in shared memory that goes away.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::ClusterError;

/// Folder of the shared memory.
const SHM: &str = "/dev/shm";
/// Start of the name of the demo's directory in shared memory; its process id and start time follow.
const SHM_PREFIX: &str = "anabranch-demo-";

/// The demo's folders. Dropping removes the directory in shared memory.
#[derive(Debug)]
pub struct Dirs {
    report: PathBuf,
    shm: PathBuf,
}

impl Dirs {
    /// Makes the report's folder. Files of an earlier run in `report` are replaced, logs and meters included.
    pub fn make(report: &Path) -> Result<Self, ClusterError> {
        let make = |path: &Path| {
            fs::create_dir_all(path)
                .map_err(|source| ClusterError::Make { path: path.to_owned(), source })
        };
        make(report)?;
        let report = fs::canonicalize(report)
            .map_err(|source| ClusterError::Make { path: report.to_owned(), source })?;
        let stamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let name = format!("{SHM_PREFIX}{}-{stamp:x}", std::process::id());
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
        Ok(dirs)
    }

    /// Makes the directory in shared memory. To be called only when it is needed, because it must be removed at the
    /// end.
    pub(super) fn open_shm(&self) -> Result<(), ClusterError> {
        remove_orphans(Path::new(SHM));
        fs::create_dir_all(&self.shm)
            .map_err(|source| ClusterError::Make { path: self.shm.clone(), source })
    }

    /// Folder of the report.
    pub fn report(&self) -> &Path {
        &self.report
    }

    /// Directory in shared memory, for staged weights and for the weights of the colocated engine.
    pub fn shm(&self) -> &Path {
        &self.shm
    }

    /// Folder with the start-up weights of every engine.
    pub fn model(&self) -> PathBuf {
        self.report.join("model")
    }

    /// File into which the manager writes its address.
    pub fn announce(&self) -> PathBuf {
        self.report.join("manager.json")
    }

    /// Log of the process `name`.
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

/// Removes the directories of earlier demos that were killed before they could remove their own.
fn remove_orphans(shm: &Path) {
    for entry in fs::read_dir(shm).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let tail = name.to_str().and_then(|name| name.strip_prefix(SHM_PREFIX));
        let Some((pid, _)) = tail.and_then(|tail| tail.split_once('-')) else { continue };
        if pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists() {
            // Where it belongs to somebody else, it stays.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl Drop for Dirs {
    fn drop(&mut self) {
        let removed = fs::remove_dir_all(&self.shm);
        if let Err(error) = removed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.shm.display(), %error, "cannot remove it; remove it by hand");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_demo_left_is_removed() {
        let shm = tempfile::tempdir().unwrap();
        let own = format!("{SHM_PREFIX}{}-1", std::process::id());
        // Above the largest id that the kernel gives.
        let dead = format!("{SHM_PREFIX}4194305-1");
        for name in [own.as_str(), dead.as_str(), "anabranch-demo-x-1", "other"] {
            fs::create_dir(shm.path().join(name)).unwrap();
        }
        remove_orphans(shm.path());
        let mut left: Vec<_> =
            fs::read_dir(shm.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [own.as_str(), "anabranch-demo-x-1", "other"]);
    }

    #[test]
    fn an_earlier_runs_files_are_replaced() {
        let report = tempfile::tempdir().unwrap();
        let stale = report.path().join("meters/engine-1");
        fs::create_dir_all(stale.parent().unwrap()).unwrap();
        fs::write(&stale, "old").unwrap();
        let dirs = Dirs::make(report.path()).unwrap();
        assert!(!stale.exists() && dirs.model().is_dir());
    }
}
