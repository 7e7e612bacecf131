//! A directory that belongs to one process at a time, told by a locked file in it. The file says who has
//! it, for the one who finds it taken; the lock itself is the kernel's and ends with the process.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Held until it is dropped.
pub(crate) struct DirLock {
    file: File,
}

/// Why a directory cannot be locked.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A living process has it.
    #[error("it is in use by {owner}; this is process {own_pid}")]
    Taken { owner: String, own_pid: u32 },
    /// The file of the lock cannot be used.
    #[error("cannot lock it: {0}")]
    Io(#[from] io::Error),
}

// === impl DirLock ===

impl DirLock {
    /// `purpose` is told to those who come later.
    pub(crate) fn take(path: &Path, purpose: &str) -> Result<DirLock, LockError> {
        loop {
            let mut file =
                File::options().create(true).truncate(false).read(true).write(true).open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(taken(file)),
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
            // Its last owner may have removed it between our open and our lock.
            if std::fs::metadata(path).is_ok_and(|now| is_same(&now, &file)) {
                file.set_len(0)?;
                file.seek(SeekFrom::Start(0))?;
                write!(file, "process {} on {} ({purpose})", std::process::id(), host())?;
                return Ok(DirLock { file });
            }
        }
    }
}

impl Drop for DirLock {
    /// Closing alone would leave it locked while a child that this process has just forked still has the
    /// descriptor.
    fn drop(&mut self) {
        self.file.unlock().ok();
    }
}

fn taken(mut file: File) -> LockError {
    let mut owner = String::new();
    // It may be writing its name this moment.
    let read = Read::by_ref(&mut file).take(300).read_to_string(&mut owner);
    if read.is_err() || owner.is_empty() {
        owner = "another process".to_owned();
    }
    LockError::Taken { owner, own_pid: std::process::id() }
}

fn is_same(now: &std::fs::Metadata, file: &File) -> bool {
    file.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (now.dev(), now.ino()))
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_owner_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("lock");
        let first = DirLock::take(&path, "job math").expect("free");
        let error = DirLock::take(&path, "job math").err().expect("taken").to_string();
        let own = format!("process {}", std::process::id());
        assert!(error.matches(&own).count() == 2 && error.contains("job math"), "{error}");
        let forked = first.file.try_clone().expect("as a fork has it");
        drop(first);
        DirLock::take(&path, "job math").expect("free again");
        drop(forked);
    }
}
