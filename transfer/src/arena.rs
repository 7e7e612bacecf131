//! The trainer's side of the memory: two prefaulted slots of shared memory. Publishing copies into the
//! slot of the older version and never waits for its readers: they are revoked.
//!
//! ```text
//!   slot:  Free ── begin ──► Writing{number} ── seal ──► Sealed{version} ── begin (when older) ──► Writing
//!          Writing ── dropped before the seal ──► Free
//! ```

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use anabranch_proto::manifest::{ChunkHash, Kind, Manifest, chunk_range};
use anabranch_proto::version::{Root, Version};

use crate::chunks::{ChunkSet, Ledger};
use crate::holder::{Blob, Held, Holder, Stamp};
use crate::layout::Layout;
use crate::shm::SharedMap;

const SLOTS: usize = 2;

/// Two slots and the holder that lends what is sealed in them.
#[derive(Clone)]
pub(crate) struct Arena {
    shared: Arc<Shared>,
}

struct Shared {
    holder: Holder,
    chunk_bytes: u32,
    slots: Mutex<[Slot; SLOTS]>,
    sealed: Condvar,
}

struct Slot {
    map: Option<Arc<SharedMap>>,
    /// Bumped when the memory changes hands.
    generation: Arc<AtomicU64>,
    state: SlotState,
}

#[derive(Clone, Copy, Debug)]
enum SlotState {
    Free,
    Writing { number: u64 },
    Sealed { version: Version },
}

/// The writer of one slot. Bytes are written from the front; what is complete is hashed behind it.
pub(crate) struct SlotWriter {
    map: Arc<SharedMap>,
    progress: Arc<Progress>,
    image_bytes: u64,
    revoked: u32,
}

/// How far the writer came. The hashing threads follow.
struct Progress {
    state: Mutex<Written>,
    moved: Condvar,
}

#[derive(Clone, Copy)]
enum Written {
    Upto(u64),
    /// The writer gave up: there will be no seal.
    Abandoned,
}

/// Hashes the chunks behind a [`SlotWriter`], then seals the slot.
pub(crate) struct Sealer {
    arena: Arena,
    slot: usize,
    map: Arc<SharedMap>,
    progress: Arc<Progress>,
    image_bytes: u64,
    sealed: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    #[error(
        "cannot get {bytes} bytes of shared memory for an arena slot: {error}; two versions must fit \
         in memory (in a container, memory limits count shared memory too)"
    )]
    Memory { bytes: u64, error: std::io::Error },
}

// === impl Arena ===

impl Arena {
    pub(crate) fn new(holder: Holder, chunk_bytes: u32) -> Arena {
        let slot = || Slot { map: None, generation: Arc::default(), state: SlotState::Free };
        let slots = Mutex::new([slot(), slot()]);
        Arena { shared: Arc::new(Shared { holder, chunk_bytes, slots, sealed: Condvar::new() }) }
    }

    /// Takes the free slot, or that of the older version, whose readers are revoked here. Waits for the
    /// seal of the version before, whose hashing nobody can hold up.
    pub(crate) fn begin(
        &self,
        number: u64,
        layout: &Layout,
    ) -> Result<(SlotWriter, Sealer), ArenaError> {
        let busy = |slots: &mut [Slot; SLOTS]| slots.iter().any(Slot::is_writing);
        let slots = self.shared.sealed.wait_while(self.lock(), busy);
        let mut slots = slots.expect("no holder of the slots' lock panics");
        let ix = (0..SLOTS).min_by_key(|&ix| slots[ix].age()).expect("there are slots");
        let slot = &mut slots[ix];
        slot.generation.fetch_add(1, Ordering::AcqRel);
        let mut revoked = 0;
        if let SlotState::Sealed { version } = slot.state {
            revoked = self.shared.holder.held(version).map_or(0, |h| h.leases());
            self.shared.holder.withdraw(version);
        }
        slot.state = SlotState::Free;
        let map = slot.sized(layout.image_bytes(), ix)?;
        slot.state = SlotState::Writing { number };
        let state = Mutex::new(Written::Upto(0));
        let progress = Arc::new(Progress { state, moved: Condvar::new() });
        let image_bytes = layout.image_bytes();
        let sealer = Sealer {
            arena: self.clone(),
            slot: ix,
            map: Arc::clone(&map),
            progress: Arc::clone(&progress),
            image_bytes,
            sealed: false,
        };
        Ok((SlotWriter { map, progress, image_bytes, revoked }, sealer))
    }

    /// The image of a sealed version that is still in its slot, with the stamp that says so.
    pub(crate) fn sealed(&self, root: Root) -> Option<(Arc<SharedMap>, Stamp)> {
        let slots = self.lock();
        let is_it =
            |s: &&Slot| matches!(s.state, SlotState::Sealed { version } if version.root == root);
        let slot = slots.iter().find(is_it)?;
        Some((slot.map.clone()?, Stamp::of(&slot.generation)))
    }

    fn set(&self, slot: usize, state: SlotState) {
        self.lock()[slot].state = state;
        self.shared.sealed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, [Slot; SLOTS]> {
        self.shared.slots.lock().expect("no holder of the slots' lock panics")
    }
}

// === impl Slot ===

impl Slot {
    fn is_writing(&self) -> bool {
        matches!(self.state, SlotState::Writing { .. })
    }

    /// Free slots first, then the older version.
    fn age(&self) -> (u8, u32, u64) {
        match self.state {
            SlotState::Free => (0, 0, 0),
            SlotState::Sealed { version } => (1, version.epoch, version.number),
            SlotState::Writing { number } => (2, 0, number),
        }
    }

    /// Reuses the mapping of the version before where the size is the same: no page faults.
    fn sized(&mut self, bytes: u64, ix: usize) -> Result<Arc<SharedMap>, ArenaError> {
        if let Some(map) = self.map.as_ref().filter(|m| m.len() == bytes) {
            return Ok(Arc::clone(map));
        }
        self.map = None;
        let map = SharedMap::anonymous(&format!("anabranch-arena-{ix}"), bytes)
            .map_err(|error| ArenaError::Memory { bytes, error })?;
        let map = Arc::new(map);
        self.map = Some(Arc::clone(&map));
        Ok(map)
    }
}

// === impl SlotWriter ===

impl SlotWriter {
    /// Streams that were reading the version whose slot this was.
    pub(crate) fn revoked(&self) -> u32 {
        self.revoked
    }

    /// Everything before `range.end` counts as written after this.
    pub(crate) fn fill<R>(&self, range: Range<u64>, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let end = range.end;
        let out = self.map.write(range, fill);
        self.progress.advance(end);
        out
    }

    pub(crate) fn finish(self) {
        self.progress.advance(self.image_bytes);
    }
}

impl Drop for SlotWriter {
    fn drop(&mut self) {
        if !self.progress.is_complete(self.image_bytes) {
            // The sealer, which may be hashing here, frees the slot.
            self.progress.abandon();
        }
    }
}

// === impl Sealer ===

impl Sealer {
    /// Hashes as the writer goes, and lends the version once all is hashed. `None` if the writer gave
    /// up. `threads` hash at once.
    pub(crate) fn run(
        mut self,
        epoch: u32,
        number: u64,
        layout: &Layout,
        threads: usize,
    ) -> Option<(Arc<Held>, Arc<Manifest>)> {
        let chunk_hashes = self.hash_all(threads.max(1))?;
        let manifest = Arc::new(Manifest {
            kind: Kind::Full,
            chunk_bytes: self.arena.shared.chunk_bytes,
            image_bytes: self.image_bytes,
            tensors: layout.tensors().to_vec(),
            chunk_hashes,
        });
        let encoded: Arc<[u8]> = manifest.encode().into();
        let version = Version { epoch, number, root: Root::of(&encoded) };
        let stamp = Stamp::of(&self.arena.lock()[self.slot].generation);
        let ledger = Arc::new(Ledger::new(ChunkSet::full(manifest.chunk_count())));
        let file = Arc::clone(self.map.backing());
        let image = Blob { file, manifest: Arc::clone(&manifest), encoded, ledger, stamp };
        let held = Arc::new(Held::new(version, image));
        self.arena.set(self.slot, SlotState::Sealed { version });
        self.sealed = true;
        self.arena.shared.holder.offer(Arc::clone(&held));
        Some((held, manifest))
    }

    fn hash_all(&self, threads: usize) -> Option<Vec<ChunkHash>> {
        let chunk_bytes = self.arena.shared.chunk_bytes;
        let count = self.image_bytes.div_ceil(chunk_bytes.into()) as usize;
        let hash_share = |first: usize| {
            let mut share = Vec::with_capacity(count / threads + 1);
            for index in (first..count).step_by(threads) {
                let range = chunk_range(chunk_bytes, self.image_bytes, index as u32);
                self.progress.reached(range.end)?;
                share.push(self.map.read(range, |bytes| *blake3::hash(bytes).as_bytes()));
            }
            Some(share)
        };
        let shares: Option<Vec<Vec<ChunkHash>>> = std::thread::scope(|scope| {
            let others: Vec<_> =
                (1..threads).map(|first| scope.spawn(move || hash_share(first))).collect();
            let mut shares = vec![hash_share(0)];
            shares.extend(others.into_iter().map(|t| t.join().expect("hashing does not panic")));
            shares.into_iter().collect()
        });
        let shares = shares?;
        Some((0..count).map(|index| shares[index % threads][index / threads]).collect())
    }
}

impl Drop for Sealer {
    fn drop(&mut self) {
        if !self.sealed {
            self.arena.set(self.slot, SlotState::Free);
        }
    }
}

// === impl Progress ===

impl Progress {
    fn advance(&self, to: u64) {
        let mut state = self.lock();
        if let Written::Upto(at) = &mut *state {
            *at = (*at).max(to);
        }
        self.moved.notify_all();
    }

    fn abandon(&self) {
        *self.lock() = Written::Abandoned;
        self.moved.notify_all();
    }

    fn is_complete(&self, image_bytes: u64) -> bool {
        matches!(*self.lock(), Written::Upto(at) if at >= image_bytes)
    }

    /// Waits for the writer; it either goes on or drops, so this cannot wait for ever.
    fn reached(&self, end: u64) -> Option<()> {
        let short = |w: &mut Written| matches!(*w, Written::Upto(at) if at < end);
        let state = self.moved.wait_while(self.lock(), short).expect("no panic under the lock");
        matches!(*state, Written::Upto(_)).then_some(())
    }

    fn lock(&self) -> MutexGuard<'_, Written> {
        self.state.lock().expect("no holder of the progress lock panics")
    }
}
