//! The directory in shared memory where a trainer's slots have names, so that receivers of this host can
//! link and adopt them. Owns its lock, its names and its removal: one trainer of a job at a time, and
//! nothing stays behind for ever.
//!
//! ```text
//!   /dev/shm/anabranch-<job>-<id>.arena/   slot-<n>  socket  lock
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::lock::{DirLock, LockError};
use super::map::{SharedMap, descriptor_path};

const LOCK_FILE: &str = "lock";
const SOCKET: &str = "socket";
const SLOT: &str = "slot-";
const SUFFIX: &str = ".arena";

/// The directory in which the arena's slots have names for receivers of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShmArena {
    /// A directory on a tmpfs, for this trainer alone. Its name should end in `.arena`.
    pub dir: PathBuf,
    /// True to fail if the directory cannot be used or has no room. If false, the arena is then anonymous
    /// memory, with a warning.
    pub required: bool,
}

pub(crate) struct Home {
    dir: PathBuf,
    required: bool,
    _lock: DirLock,
}

/// Why a directory cannot be the arena's home.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// No slot of the size fits beside what is there.
    #[error(
        "{path} is too small: a version needs {need} bytes more there, {free} of {size} are free. In a \
         container start it with a larger --shm-size (Docker) or mount an emptyDir with medium: \
         Memory at /dev/shm (Kubernetes); two versions must fit. Or switch the shm link off: then \
         versions lie outside of it, and engines of this host get copies"
    )]
    TooSmall { path: PathBuf, need: u64, free: u64, size: u64 },
    /// The file system, its rights or its kinds of locks do not allow it.
    #[error("cannot use {path} for the arena: {error}")]
    Unusable { path: PathBuf, error: io::Error },
    /// A living trainer has it.
    #[error(
        "another trainer of this job publishes from this host: {path}: {error}; stop one of them, or \
         give each its own job"
    )]
    Taken { path: PathBuf, error: LockError },
}

/// Longer paths do not fit a socket's address.
const MAX_SOCKET_PATH_BYTES: usize = 107;
const MAX_JOB_CHARS: usize = 40;

// === impl ShmArena ===

impl ShmArena {
    /// A directory under /dev/shm: the same for all trainers of `job` in `scope` (say, the manager's address) that
    /// this user runs on this host.
    pub fn of_job(job: &str, scope: &str) -> ShmArena {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let user = rustix::process::geteuid().as_raw();
        let id = blake3::hash(format!("{job}\n{scope}\n{user}\n{boot}").as_bytes());
        let id = hex::encode(&id.as_bytes()[..4]);
        let allowed = |c: char| if c.is_ascii_alphanumeric() || "-_".contains(c) { c } else { '_' };
        let job: String = job.chars().take(MAX_JOB_CHARS).map(allowed).collect();
        let dir = PathBuf::from(format!("/dev/shm/anabranch-{job}-{id}{SUFFIX}"));
        ShmArena { dir, required: false }
    }
}

// === impl Home ===

impl Home {
    /// `None` where it cannot be used and is not required. A second trainer is refused all the same.
    pub(crate) fn open(at: &ShmArena, job: &str) -> Result<Option<Home>, HomeError> {
        if let Some(parent) = at.dir.parent() {
            sweep(parent, Some(&at.dir));
        }
        match Home::take(at, job) {
            Ok(home) => Ok(Some(home)),
            Err(error @ HomeError::Unusable { .. }) if !at.required => {
                tracing::warn!(%error, "engines of this host will get copies");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn take(at: &ShmArena, job: &str) -> Result<Home, HomeError> {
        let ShmArena { dir, required } = at;
        let failed = |error| HomeError::Unusable { path: dir.clone(), error };
        let socket = dir.join(SOCKET);
        check_socket(&socket).map_err(failed)?;
        let lock = lock(dir, job).map_err(|error| match error {
            LockError::Io(error) => failed(error),
            error => HomeError::Taken { path: dir.clone(), error },
        })?;
        fs::remove_file(&socket).or_else(ignore_absent).map_err(failed)?;
        let home = Home { dir: dir.clone(), required: *required, _lock: lock };
        probe(dir).map_err(failed)?;
        Ok(home)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }

    pub(crate) fn is_required(&self) -> bool {
        self.required
    }

    pub(crate) fn leftovers(&self) -> Result<Vec<PathBuf>, HomeError> {
        slots(&self.dir).map_err(|error| HomeError::Unusable { path: self.dir.clone(), error })
    }

    /// A new slot, all of its memory there. On failure nothing of it stays.
    pub(crate) fn slot(&self, id: u64, bytes: u64) -> Result<(SharedMap, PathBuf), HomeError> {
        let failed = |error| HomeError::Unusable { path: self.dir.clone(), error };
        let stat = rustix::fs::statvfs(&self.dir).map_err(|e| failed(e.into()))?;
        let (free, size) = (stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize);
        let too_small = || HomeError::TooSmall { path: self.dir.clone(), need: bytes, free, size };
        // A tmpfs without a limit says 0 blocks.
        if size > 0 && bytes > free {
            return Err(too_small());
        }
        let path = (id..).map(|id| self.dir.join(format!("{SLOT}{id}"))).find(|p| !p.exists());
        let path = path.expect("some number is free");
        SharedMap::file(&path, bytes).map(|map| (map, path.clone())).map_err(|error| {
            fs::remove_file(&path).ok();
            let full = error.raw_os_error() == Some(rustix::io::Errno::NOSPC.raw_os_error());
            if full { too_small() } else { failed(error) }
        })
    }
}

impl Drop for Home {
    /// Removes the directory with the slots that are still named; those who adopted a slot keep it.
    fn drop(&mut self) {
        clear(&self.dir);
    }
}

/// Checks that the kernel can say whether a file in `dir` is used: without that no memory may be passed on.
pub(crate) fn probe(dir: &Path) -> io::Result<()> {
    let path = dir.join("probe");
    let map = SharedMap::file(&path, 1)?;
    fs::remove_file(&path)?;
    let exclusive = map.is_exclusive()?;
    let opened = fs::File::open(descriptor_path(map.backing()))?;
    let shared = !map.is_exclusive()?;
    drop(opened);
    if exclusive && shared {
        return Ok(());
    }
    Err(io::Error::other("leases do not tell here whether a file is used"))
}

/// Checks that a path fits the address of a socket.
pub(crate) fn check_socket(path: &Path) -> io::Result<()> {
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        return Err(io::Error::other("its name is too long for a socket in it"));
    }
    Ok(())
}

/// The directory may be cleared away by another process this moment: then it is made anew.
fn lock(dir: &Path, job: &str) -> Result<DirLock, LockError> {
    let mut tries = 0;
    loop {
        // Who can enter may connect, and is passed memory once it shows a grant.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        match DirLock::take(&dir.join(LOCK_FILE), &format!("job {job}")) {
            Err(LockError::Io(error)) if error.kind() == io::ErrorKind::NotFound && tries < 50 => {}
            Err(LockError::Taken { owner, .. }) if owner.contains(CLEARING) && tries < 50 => {}
            other => return other,
        }
        tries += 1;
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

const CLEARING: &str = "clearing away";

/// Removes what trainers left in `parent` that ended without a word, but for `kept`.
pub(crate) fn sweep(parent: &Path, kept: Option<&Path>) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let dir = entry.path();
        let is_arena = entry.file_name().to_string_lossy().ends_with(SUFFIX);
        if !is_arena || Some(&*dir) == kept || !dir.join(LOCK_FILE).exists() || !is_own(&dir) {
            continue;
        }
        if let Ok(_lock) = DirLock::take(&dir.join(LOCK_FILE), CLEARING) {
            tracing::info!(dir = %dir.display(), "cleared away the arena of a trainer that ended");
            clear(&dir);
        }
    }
}

fn is_own(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|m| m.uid() == rustix::process::geteuid().as_raw())
}

/// The lock's file last: whoever waits for it then finds the directory empty, or gone.
fn clear(dir: &Path) {
    for path in slots(dir).unwrap_or_default() {
        fs::remove_file(path).ok();
    }
    fs::remove_file(dir.join(SOCKET)).ok();
    fs::remove_file(dir.join(LOCK_FILE)).ok();
    fs::remove_dir(dir).ok();
}

fn slots(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(SLOT) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn ignore_absent(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests;
