//! Sealed versions as directories on a shared file system, for receivers that reach no socket of the
//! trainer, or outlive it. Owns the names in that directory and their removal. Who may read is what the
//! file system says: a grant is not checked by anybody.
//!
//! ```text
//!   <dir>/v<number>-e<epoch>-<root>/   model.safetensors  manifest  [delta  delta.manifest]
//!   <dir>/.part-*                      being written, or being removed
//!   <dir>/.exporter                    locked by the one trainer that writes here
//! ```
//! A version gets its name when all of it is on disk, so nobody ever sees half of one.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anabranch_proto::address::Address;
use anabranch_proto::version::Version;

use crate::image::blob::{Blob, BlobId};
use crate::image::exported::{Name, files, list};
use crate::memory::lock::{DirLock, LockError};
use crate::memory::map::{SharedMap, descriptor_path};
use crate::send::holder::Held;

const LOCK_FILE: &str = ".exporter";
const PART: &str = ".part-";
/// Written at once; between two of these it is checked that the memory still is this version's.
const STRIDE: u64 = 8 << 20;

/// The directory of one job. Open as long as its trainer lives.
pub(crate) struct Export {
    dir: PathBuf,
    keep: usize,
    nth: AtomicU64,
    _lock: DirLock,
}

/// Why a version was not exported.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The file system refuses.
    #[error("cannot export versions to {path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    /// Another trainer exports to the directory.
    #[error("cannot export versions to {dir}: {error}; give each trainer a directory of its own")]
    Locked { dir: PathBuf, error: LockError },
    /// The file system has too little room.
    #[error(
        "cannot export {version} to {dir}: it needs {need} bytes, {free} of {size} are free; the versions \
         exported before are still there"
    )]
    TooSmall { dir: PathBuf, version: Version, need: u64, free: u64, size: u64 },
    /// The memory went to a newer version meanwhile.
    #[error(
        "the export of {version} to {dir} was given up: its memory went to a newer version before it was \
         written; the file system is slower than versions follow each other"
    )]
    Overtaken { dir: PathBuf, version: Version },
}

// === impl Export ===

impl Export {
    /// Creates the directory where needed, and clears away what a killed trainer left half written.
    pub(crate) fn open(dir: &Path, keep: usize, job: &str) -> Result<Export, ExportError> {
        let failed = |error| ExportError::Io { path: dir.to_owned(), error };
        fs::create_dir_all(dir).map_err(failed)?;
        let dir = fs::canonicalize(dir).map_err(failed)?;
        let locked = |error| ExportError::Locked { dir: dir.clone(), error };
        let lock = DirLock::take(&dir.join(LOCK_FILE), job).map_err(locked)?;
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(PART)) {
                fs::remove_dir_all(&path).map_err(failed)?;
            }
        }
        Ok(Export { dir, keep: keep.max(1), nth: AtomicU64::new(0), _lock: lock })
    }

    /// The address at which receivers find the versions.
    pub(crate) fn address(&self) -> Address {
        Address::File(self.dir.clone())
    }

    /// Returns the version's directory. Older ones beyond the number to keep are removed.
    pub(crate) fn write(&self, held: &Held, image: &SharedMap) -> Result<PathBuf, ExportError> {
        let (version, blob) = (held.version(), held.image());
        let name = Name::of(version);
        let target = self.dir.join(name.to_string());
        if self.is_there(&target, blob) {
            return Ok(target);
        }
        let delta = held.first_delta();
        let bytes = |b: &Blob| b.manifest.image_bytes + b.encoded.len() as u64;
        self.require(version, bytes(blob) + delta.as_ref().map_or(0, bytes))?;
        let part = self.part(&name.to_string());
        let written = self.write_parts(&part, version, blob, image, delta.as_ref());
        let placed = written.and_then(|()| {
            // What stands there under this name is not this version: somebody damaged it.
            self.remove(&target);
            fs::rename(&part, &target).map_err(|error| self.io(&target, error))
        });
        if let Err(error) = placed {
            fs::remove_dir_all(&part).ok();
            return Err(error);
        }
        sync_dir(&self.dir).map_err(|error| self.io(&self.dir, error))?;
        self.prune(name);
        Ok(target)
    }

    fn write_parts(
        &self,
        part: &Path,
        version: Version,
        blob: &Blob,
        image: &SharedMap,
        delta: Option<&Blob>,
    ) -> Result<(), ExportError> {
        let io = |error| self.io(part, error);
        fs::create_dir(part).map_err(io)?;
        let (manifest, bytes) = files(part, BlobId::Image);
        let mut file = File::create(bytes).map_err(io)?;
        for range in strides(blob.manifest.image_bytes) {
            image.read(range, |bytes| file.write_all(bytes)).map_err(io)?;
            if !blob.stamp.is_valid() {
                return Err(ExportError::Overtaken { dir: self.dir.clone(), version });
            }
        }
        file.sync_all().map_err(io)?;
        write_synced(&manifest, &blob.encoded).map_err(io)?;
        if let Some(delta) = delta {
            let gone = || io(io::ErrorKind::NotFound.into());
            let from = delta.file.get().ok_or_else(gone)?;
            let from = File::open(descriptor_path(&from)).map_err(io)?;
            let mut from = from.take(delta.manifest.image_bytes);
            let (manifest, bytes) = files(part, BlobId::Delta);
            let mut to = File::create(bytes).map_err(io)?;
            io::copy(&mut from, &mut to).map_err(io)?;
            to.sync_all().map_err(io)?;
            if !delta.stamp.is_valid() {
                return Err(ExportError::Overtaken { dir: self.dir.clone(), version });
            }
            write_synced(&manifest, &delta.encoded).map_err(io)?;
        }
        sync_dir(part).map_err(io)
    }

    /// Exported before, by an earlier life of this trainer.
    fn is_there(&self, target: &Path, blob: &Blob) -> bool {
        let (manifest, bytes) = files(target, BlobId::Image);
        fs::metadata(bytes).is_ok_and(|m| m.len() == blob.manifest.image_bytes)
            && fs::read(manifest).is_ok_and(|m| m[..] == blob.encoded[..])
    }

    /// Keeps `newest` and those before it; numbers may go back in a new epoch.
    fn prune(&self, newest: Name) {
        let mut names = match list(&self.dir) {
            Ok(names) => names,
            Err(error) => {
                let dir = self.dir.display();
                tracing::warn!(%dir, %error, "old exported versions stay where they are");
                return;
            }
        };
        names.retain(|name| *name != newest);
        names.sort();
        let surplus = (names.len() + 1).saturating_sub(self.keep);
        for name in &names[..surplus.min(names.len())] {
            self.remove(&self.dir.join(name.to_string()));
        }
    }

    /// First out of its name, so that nobody finds half of it. Those who read it go on where the file
    /// system lets them.
    fn remove(&self, path: &Path) {
        let part = self.part("old");
        let removed = match fs::rename(path, &part) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            renamed => renamed.and_then(|()| fs::remove_dir_all(&part)),
        };
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), %error, "could not remove an exported version");
        }
    }

    fn part(&self, what: &str) -> PathBuf {
        let nth = self.nth.fetch_add(1, Ordering::Relaxed);
        self.dir.join(format!("{PART}{what}-{nth}"))
    }

    fn require(&self, version: Version, need: u64) -> Result<(), ExportError> {
        let stat = rustix::fs::statvfs(&self.dir).map_err(|e| self.io(&self.dir, e.into()))?;
        let (free, size) = (stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize);
        if size > 0 && need > free {
            return Err(ExportError::TooSmall { dir: self.dir.clone(), version, need, free, size });
        }
        Ok(())
    }

    fn io(&self, path: &Path, error: io::Error) -> ExportError {
        ExportError::Io { path: path.to_owned(), error }
    }
}

fn strides(len: u64) -> impl Iterator<Item = Range<u64>> {
    (0..len).step_by(STRIDE as usize).map(move |at| at..len.min(at + STRIDE))
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Flushes a directory, so that names survive a crash of the host.
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests;
