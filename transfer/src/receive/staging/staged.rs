//! Complete versions under names that engines load: in a slot of ours, or in memory of another process of
//! this host that was adopted. What is adopted is read only, and given back when its guard is dropped.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anabranch_proto::manifest::Manifest;
use anabranch_proto::version::Version;
use rustix::fs::{AtFlags, CWD};

use super::{Memory, SlotState, StageError, Staging};
use crate::image::blob::{Backing, Blob, Stamp};
use crate::image::chunks::{ChunkSet, Ledger};
use crate::image::exported::MODEL_FILE;
use crate::image::layout::{LayoutError, expected_header};
use crate::memory::map::descriptor_path;
use crate::send::holder::Holder;

/// A complete version in a directory that an engine can load. Keep it while the engine loads or serves
/// the version; its memory is reused some time after it is dropped.
pub struct StagedSlot {
    dir: PathBuf,
    manifest: Arc<Manifest>,
    kept: Kept,
}

enum Kept {
    Slot { staging: Staging, slot: usize, memory: Arc<Memory> },
    Adopted { file: Arc<File>, generation: Arc<AtomicU64>, holder: Holder },
}

/// A version's directory under a temporary name, which goes away unless it is published.
pub(crate) struct VersionDir {
    temporary: PathBuf,
    dir: PathBuf,
}

/// Memory of another process under a name of ours, while it is verified.
pub(crate) struct Adopting {
    named: VersionDir,
    file: Arc<File>,
    manifest: Arc<Manifest>,
    pub(crate) ledger: Arc<Ledger>,
    generation: Arc<AtomicU64>,
}

// === impl Staging ===

impl Staging {
    /// Names `file`, of another process, in a directory here.
    pub(crate) fn adopt(
        &self,
        version: Version,
        manifest: &Arc<Manifest>,
        file: File,
    ) -> Result<Adopting, StageError> {
        let named = self.version_dir(version, "adopted")?;
        let (from, to) = (descriptor_path(&file), named.model());
        rustix::fs::linkat(CWD, from, CWD, &to, AtFlags::SYMLINK_FOLLOW)
            .map_err(|error| StageError::Link { path: to, error: error.into() })?;
        let ledger = Arc::new(Ledger::new(ChunkSet::empty(manifest.chunk_count())));
        let (file, manifest, generation) = (Arc::new(file), Arc::clone(manifest), Arc::default());
        Ok(Adopting { named, file, manifest, ledger, generation })
    }
}

// === impl VersionDir ===

impl VersionDir {
    pub(super) fn make(root: &Path, name: &str) -> io::Result<VersionDir> {
        let (temporary, dir) = (root.join(format!(".{name}")), root.join(name));
        fs::create_dir(&temporary)?;
        let named = VersionDir { temporary, dir };
        fs::set_permissions(&named.temporary, fs::Permissions::from_mode(0o755))?;
        Ok(named)
    }

    /// Path of the image's file.
    pub(super) fn model(&self) -> PathBuf {
        self.temporary.join(MODEL_FILE)
    }

    pub(super) fn publish(self) -> io::Result<PathBuf> {
        fs::rename(&self.temporary, &self.dir)?;
        Ok(self.dir.clone())
    }
}

impl Drop for VersionDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.temporary).ok();
    }
}

// === impl Adopting ===

impl Adopting {
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The blob that peers may read while it is verified, and until the memory is given back.
    pub(crate) fn blob(&self, encoded: Arc<[u8]>) -> Blob {
        Blob {
            file: Backing::Lent(Arc::downgrade(&self.file)),
            manifest: Arc::clone(&self.manifest),
            encoded,
            ledger: Arc::clone(&self.ledger),
            stamp: Stamp::of(&self.generation),
        }
    }

    /// `holder` lends it until the guard is dropped.
    pub(crate) fn publish(self, holder: &Holder) -> Result<StagedSlot, StageError> {
        debug_assert!(self.ledger.is_full());
        let Adopting { named, file, manifest, generation, .. } = self;
        let io = |error| StageError::Io { path: named.dir.clone(), error };
        let header = expected_header(&manifest)?;
        let mut have = vec![0; header.len()];
        file.read_exact_at(&mut have, 0).map_err(io)?;
        if have != header {
            return Err(LayoutError::Header.into());
        }
        let path = named.dir.clone();
        let dir = named.publish().map_err(|error| StageError::Io { path, error })?;
        let holder = holder.clone();
        let kept = Kept::Adopted { file, generation, holder };
        Ok(StagedSlot { dir, manifest, kept })
    }
}

// === impl StagedSlot ===

impl StagedSlot {
    pub(super) fn of_slot(
        staging: Staging,
        slot: usize,
        dir: PathBuf,
        memory: Arc<Memory>,
        manifest: Arc<Manifest>,
    ) -> StagedSlot {
        StagedSlot { dir, manifest, kept: Kept::Slot { staging, slot, memory } }
    }

    /// The directory that the engine loads.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// A part of the image.
    pub(crate) fn read(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        match &self.kept {
            Kept::Slot { memory, .. } => Ok(memory.map.read(range, <[u8]>::to_vec)),
            Kept::Adopted { file, .. } => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                file.read_exact_at(&mut bytes, range.start).map(|()| bytes)
            }
        }
    }
}

impl Drop for StagedSlot {
    fn drop(&mut self) {
        // The name goes; mappings of the file stay valid, and so do readers in peers until the slot is
        // reused. Adopted memory goes back at once: the file here is the only one of this process.
        fs::remove_dir_all(&self.dir).ok();
        match &self.kept {
            Kept::Slot { staging, slot, .. } => staging.lock()[*slot].state = SlotState::Idle,
            Kept::Adopted { generation, holder, .. } => {
                generation.fetch_add(1, Ordering::AcqRel);
                holder.prune();
            }
        }
    }
}
