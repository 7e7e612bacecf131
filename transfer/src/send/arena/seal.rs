//! The way of one version into its slot: the writer fills from the front, hashing threads follow, the
//! seal makes it a version that is lent.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use anabranch_proto::manifest::{ChunkHash, Kind, Manifest, chunk_range};
use anabranch_proto::version::{Root, Version};

use super::{Arena, SlotId, SlotState};
use crate::image::blob::{Backing, Blob, Stamp};
use crate::image::chunks::{ChunkSet, Ledger};
use crate::image::layout::Layout;
use crate::memory::map::SharedMap;
use crate::send::holder::Held;

/// The writer of one slot. Bytes are written from the front; what is complete is hashed behind it.
pub(crate) struct SlotWriter {
    map: Arc<SharedMap>,
    progress: Arc<Progress>,
    image_bytes: u64,
}

/// Hashes the chunks behind a [`SlotWriter`], then seals the slot.
pub(crate) struct Sealer {
    arena: Arena,
    slot: SlotId,
    /// Stamp of the slot at the time when the writer got it.
    stamp: Stamp,
    map: Arc<SharedMap>,
    progress: Arc<Progress>,
    image_bytes: u64,
    sealed: bool,
}

/// Progress of the writer, which the hashing threads follow.
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

/// Both ends of a slot that was taken for a version.
pub(super) fn ends(
    arena: &Arena,
    slot: SlotId,
    stamp: Stamp,
    map: &Arc<SharedMap>,
    image_bytes: u64,
) -> (SlotWriter, Sealer) {
    let state = Mutex::new(Written::Upto(0));
    let progress = Arc::new(Progress { state, moved: Condvar::new() });
    let writer = SlotWriter { map: Arc::clone(map), progress: Arc::clone(&progress), image_bytes };
    let (arena, map) = (arena.clone(), Arc::clone(map));
    (writer, Sealer { arena, slot, stamp, map, progress, image_bytes, sealed: false })
}

// === impl SlotWriter ===

impl SlotWriter {
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
        self,
        epoch: u32,
        number: u64,
        layout: &Layout,
        threads: usize,
    ) -> Option<(Arc<Held>, Arc<Manifest>)> {
        let all = ChunkSet::full(self.chunk_count());
        let chunk_hashes = self.hash(&all, threads)?;
        Some(self.lend(epoch, number, layout, chunk_hashes, all))
    }

    /// Hashes `chunks` in their order, as the writer goes.
    pub(crate) fn hash(&self, chunks: &ChunkSet, threads: usize) -> Option<Vec<ChunkHash>> {
        let chunks: Vec<u32> = chunks.iter().collect();
        let threads = threads.max(1);
        let hash_share = |first: usize| {
            let mut share = Vec::with_capacity(chunks.len() / threads + 1);
            for index in chunks.iter().skip(first).step_by(threads) {
                let range = self.chunk_range(*index);
                self.progress.reached(range.end)?;
                share.push(self.map.read(range, |bytes| *blake3::hash(bytes).as_bytes()));
            }
            Some(share)
        };
        let hash_share = &hash_share;
        let shares: Option<Vec<Vec<ChunkHash>>> = std::thread::scope(|scope| {
            let others: Vec<_> =
                (1..threads).map(|first| scope.spawn(move || hash_share(first))).collect();
            let mut shares = vec![hash_share(0)];
            shares.extend(others.into_iter().map(|t| t.join().expect("hashing does not panic")));
            shares.into_iter().collect()
        });
        let shares = shares?;
        Some((0..chunks.len()).map(|at| shares[at % threads][at / threads]).collect())
    }

    /// Waits for the writer's end; from then on the slot waits for what other senders have.
    pub(crate) fn part(&self, number: u64) -> Option<()> {
        self.progress.reached(self.image_bytes)?;
        self.arena.set(self.slot, SlotState::Parted { number });
        Some(())
    }

    /// Makes it the version with these hashes, of which the chunks `held` are here.
    pub(crate) fn lend(
        mut self,
        epoch: u32,
        number: u64,
        layout: &Layout,
        chunk_hashes: Vec<ChunkHash>,
        held: ChunkSet,
    ) -> (Arc<Held>, Arc<Manifest>) {
        let manifest = Arc::new(Manifest {
            kind: Kind::Full,
            chunk_bytes: self.arena.shared.chunk_bytes,
            image_bytes: self.image_bytes,
            tensors: layout.tensors().to_vec(),
            chunk_hashes,
        });
        let encoded: Arc<[u8]> = manifest.encode().into();
        let version = Version { epoch, number, root: Root::of(&encoded) };
        let ledger = Arc::new(Ledger::new(held));
        let (file, stamp) = (Backing::Own(Arc::clone(self.map.backing())), self.stamp.clone());
        let image = Blob { file, manifest: Arc::clone(&manifest), encoded, ledger, stamp };
        let held = Arc::new(Held::new(version, image));
        self.arena.set(self.slot, SlotState::Sealed { version });
        self.sealed = true;
        self.arena.shared.holder.offer(Arc::clone(&held));
        (held, manifest)
    }

    /// The image, of which its owner reads and writes what it took memory for.
    pub(crate) fn map(&self) -> &SharedMap {
        &self.map
    }

    fn chunk_count(&self) -> u32 {
        self.image_bytes.div_ceil(self.arena.shared.chunk_bytes.into()) as u32
    }

    fn chunk_range(&self, index: u32) -> Range<u64> {
        chunk_range(self.arena.shared.chunk_bytes, self.image_bytes, index)
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
