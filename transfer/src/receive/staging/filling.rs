//! A slot while a version is received into it, and the version in the other slot that helps.

use super::*;
use crate::image::blob::{Backing, Blob};
use crate::image::layout::expected_header;

/// A slot while a version is received into it.
pub(crate) struct Filling {
    pub(super) staging: Staging,
    pub(super) slot: usize,
    pub(super) filler: Filler,
    pub(super) stamp: Stamp,
}

/// A receiving thread's handle on the slot. A fetch ends only when none of its threads writes any more.
#[derive(Clone)]
pub(crate) struct Filler {
    pub(super) memory: Arc<Memory>,
    pub(super) manifest: Arc<Manifest>,
    pub(crate) ledger: Arc<Ledger>,
}

/// A complete version in the other slot, which stays as it is while this lives.
pub(crate) struct Base {
    pub(crate) root: Root,
    pub(super) manifest: Arc<Manifest>,
    pub(super) memory: Arc<Memory>,
    pub(super) _reading: Arc<()>,
}

// === impl Filling ===

impl Filling {
    pub(crate) fn filler(&self) -> &Filler {
        &self.filler
    }

    /// The blob that peers may read while it grows.
    pub(crate) fn blob(&self, encoded: Arc<[u8]>) -> Blob {
        Blob {
            file: Backing::Own(Arc::clone(self.filler.memory.map.backing())),
            manifest: Arc::clone(&self.filler.manifest),
            encoded,
            ledger: Arc::clone(&self.filler.ledger),
            stamp: self.stamp.clone(),
        }
    }

    /// The staged version, if its tensors lie where those of the new one do.
    pub(crate) fn base(&self) -> Option<Base> {
        let same = |b: &Base| b.manifest.tensors == self.filler.manifest.tensors;
        self.staging.base(self.slot).filter(same)
    }

    /// Copies chunks that the staged version in the other slot has too. Returns their bytes.
    pub(crate) fn carry_over(&self) -> Result<u64, StageError> {
        let Some(base) = self.staging.base(self.slot) else { return Ok(0) };
        let mut carried = 0;
        for index in base.memory.record.equal(&self.filler.manifest).iter() {
            let range = self.filler.manifest.chunk_range(index);
            if self.filler.ledger.contains(index) || range.end > base.map().len() {
                continue;
            }
            let want = &self.filler.manifest.chunk_hashes[index as usize];
            let copied = base.map().read(range.clone(), |from| {
                self.filler.memory.map.write(range.clone(), |to| {
                    to.copy_from_slice(from);
                    blake3::hash(to).as_bytes() == want
                })
            });
            if copied {
                self.filler.verified(index).map_err(|e| self.staging.io(e))?;
                carried += range.end - range.start;
            }
        }
        Ok(carried)
    }

    /// Names the complete image for the engine: a new directory, by an atomic rename.
    pub(crate) fn publish(self, version: Version) -> Result<StagedSlot, StageError> {
        debug_assert!(self.filler.ledger.is_full());
        let header = expected_header(&self.filler.manifest)?;
        let same = self.filler.memory.map.read(0..header.len() as u64, |have| have == header);
        if !same {
            return Err(crate::image::layout::LayoutError::Header.into());
        }
        let (staging, slot) = (self.staging.clone(), self.slot);
        let io = |error| staging.io(error);
        let named = staging.version_dir(version, &format!("s{slot}"))?;
        let readable = fs::Permissions::from_mode(0o644);
        fs::set_permissions(staging.slot_path(slot), readable).map_err(io)?;
        fs::hard_link(staging.slot_path(slot), named.model()).map_err(io)?;
        let dir = named.publish().map_err(io)?;
        let (memory, manifest) =
            (Arc::clone(&self.filler.memory), Arc::clone(&self.filler.manifest));
        let staged = SlotState::Staged { root: version.root, manifest: Arc::clone(&manifest) };
        staging.lock()[slot].state = staged;
        Ok(StagedSlot::of_slot(staging.clone(), slot, dir, memory, manifest))
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        let mut slots = self.staging.lock();
        if matches!(slots[self.slot].state, SlotState::Filling) {
            slots[self.slot].state = SlotState::Idle;
        }
    }
}

// === impl Filler ===

impl Filler {
    pub(crate) fn map(&self) -> &SharedMap {
        &self.memory.map
    }

    /// The chunk at `index` is in place and its hash is right.
    pub(crate) fn verified(&self, index: u32) -> io::Result<()> {
        self.memory.record.set(index, &self.manifest.chunk_hashes[index as usize])?;
        self.ledger.insert(index);
        Ok(())
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(crate) fn missing_bytes(&self) -> u64 {
        let len = |ix| {
            let range = self.manifest.chunk_range(ix);
            range.end - range.start
        };
        self.manifest.image_bytes - self.ledger.snapshot().iter().map(len).sum::<u64>()
    }

    /// Writes `bytes` at `at`, but for what lies in chunks of `kept`: those are verified, and peers may
    /// be reading them.
    pub(crate) fn write_unverified(&self, at: u64, bytes: &[u8], kept: &ChunkSet) {
        let chunk_bytes = u64::from(self.manifest.chunk_bytes);
        let end = at + bytes.len() as u64;
        let mut from = at;
        while from < end {
            let index = from / chunk_bytes;
            let to = end.min((index + 1) * chunk_bytes);
            if !kept.contains(index as u32) {
                let part = &bytes[(from - at) as usize..(to - at) as usize];
                self.memory.map.write(from..to, |out| out.copy_from_slice(part));
            }
            from = to;
        }
    }

    /// Counts the chunk as verified if what lies there has its hash.
    pub(crate) fn verify(&self, index: u32) {
        let want = &self.manifest.chunk_hashes[index as usize];
        let range = self.manifest.chunk_range(index);
        if self.memory.map.read(range, |bytes| blake3::hash(bytes).as_bytes() == want) {
            self.verified(index).ok();
        }
    }
}

// === impl Base ===

impl Base {
    pub(crate) fn map(&self) -> &SharedMap {
        &self.memory.map
    }
}
