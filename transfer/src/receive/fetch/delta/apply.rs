//! Applies a delta while it still arrives: each block as soon as its payloads are here, each chunk of the
//! version verified as soon as its last block is in place. Out of place, so a crash costs only the work.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anabranch_proto::manifest::Manifest;
use anabranch_proto::version::Root;

use crate::delta::chain::Chain;
use crate::delta::{DeltaError, Workspace};
use crate::image::chunks::{ChunkSet, Ledger};
use crate::memory::map::SharedMap;
use crate::receive::staging::{Base, Filler};

const THREADS: usize = 4;
/// Bounds how late a reader notices that nothing more will come.
const TICK: Duration = Duration::from_millis(50);

/// A delta of which chunks come in.
pub(super) struct Arriving {
    pub(super) map: Arc<SharedMap>,
    pub(super) manifest: Arc<Manifest>,
    pub(super) ledger: Arc<Ledger>,
    /// No more chunks will come.
    pub(super) ended: AtomicBool,
}

/// Cost of applying a delta, without the waits for chunks.
pub(super) struct Applied {
    pub(super) bytes: u64,
    pub(super) busy: Duration,
    /// Speed of one delta on all threads, as a multiple of this chain's: threads times links.
    pub(super) speedup: u32,
    /// Bases of the chain, with the offset at which each one's part ends.
    pub(super) bases: Vec<(Root, u64)>,
}

/// New = f(base, delta) into the chunks that are not verified yet. What is wrong or never comes leaves
/// its chunks unverified.
pub(super) fn apply(
    arriving: &Arriving,
    base: &Base,
    filler: &Filler,
) -> Result<Applied, DeltaError> {
    let kept = filler.ledger.snapshot();
    let len = arriving.manifest.image_bytes;
    let mut read = |range| arriving.read(range);
    let chain = Chain::parse(filler.manifest(), base.root, len, &mut read)?;
    let work = Work::new(&chain, arriving, base, filler, &kept);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(THREADS);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|| work.run());
        }
        work.run();
    });
    work.result(threads as u32 * chain.bases().len() as u32)
}

/// The blocks, shared by threads.
struct Work<'a> {
    chain: &'a Chain,
    arriving: &'a Arriving,
    base: &'a Base,
    filler: &'a Filler,
    /// Chunks that were verified before.
    kept: &'a ChunkSet,
    next: AtomicUsize,
    /// Number of blocks of each chunk that are not in place yet.
    pending: Vec<AtomicU32>,
    bytes: AtomicU64,
    busy_ns: AtomicU64,
    bad: std::sync::Mutex<Option<DeltaError>>,
}

// === impl Arriving ===

impl Arriving {
    /// The bytes, once they are here; `None` if they will not come.
    fn read(&self, range: Range<u64>) -> Option<Vec<u8>> {
        self.wait(&range).then(|| self.map.read(range, <[u8]>::to_vec))
    }

    fn wait(&self, range: &Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        let chunk_bytes = u64::from(self.manifest.chunk_bytes);
        let chunks = range.start / chunk_bytes..range.end.div_ceil(chunk_bytes);
        loop {
            // Before the look at the chunks: those that came last are seen.
            let ended = self.ended.load(Ordering::Acquire);
            let here = self.ledger.snapshot();
            if chunks.clone().all(|chunk| here.contains(chunk as u32)) {
                return true;
            }
            if ended {
                return false;
            }
            self.ledger.wait_beyond(here.count(), TICK);
        }
    }
}

// === impl Work ===

impl<'a> Work<'a> {
    fn new(
        chain: &'a Chain,
        arriving: &'a Arriving,
        base: &'a Base,
        filler: &'a Filler,
        kept: &'a ChunkSet,
    ) -> Work<'a> {
        let count = filler.manifest().chunk_count() as usize;
        let pending: Vec<AtomicU32> = (0..count).map(|_| AtomicU32::new(0)).collect();
        for at in 0..chain.block_count() {
            for chunk in chunks(filler, chain.range(at)) {
                pending[chunk as usize].fetch_add(1, Ordering::Relaxed);
            }
        }
        let (next, bytes, busy_ns) = Default::default();
        let bad = std::sync::Mutex::default();
        Work { chain, arriving, base, filler, kept, next, pending, bytes, busy_ns, bad }
    }

    fn run(&self) {
        let (mut workspace, mut block) = (Workspace::default(), Vec::new());
        loop {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            if at >= self.chain.block_count() || !self.block(at, &mut block, &mut workspace) {
                // After a failure there is nothing left for the others either.
                self.next.store(self.chain.block_count(), Ordering::Relaxed);
                return;
            }
        }
    }

    /// False if it will not come, or is wrong.
    fn block(&self, at: usize, block: &mut Vec<u8>, workspace: &mut Workspace) -> bool {
        let range = self.chain.range(at);
        if chunks(self.filler, range.clone()).all(|chunk| self.kept.contains(chunk)) {
            return true;
        }
        if !self.chain.payloads(at).all(|payload| self.arriving.wait(&payload)) {
            return false;
        }
        let started = Instant::now();
        block.resize((range.end - range.start) as usize, 0);
        if let Err(error) = self.apply(at, range.clone(), block, workspace) {
            *self.bad.lock().expect("held only to note") = Some(error);
            return false;
        }
        self.filler.write_unverified(range.start, block, self.kept);
        for chunk in chunks(self.filler, range.clone()) {
            let left = self.pending[chunk as usize].fetch_sub(1, Ordering::AcqRel) - 1;
            if left == 0 && !self.kept.contains(chunk) {
                self.filler.verify(chunk);
            }
        }
        self.bytes.fetch_add(range.end - range.start, Ordering::Relaxed);
        self.busy_ns.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        true
    }

    /// Through all versions between, in this core's cache.
    fn apply(
        &self,
        at: usize,
        range: Range<u64>,
        block: &mut [u8],
        workspace: &mut Workspace,
    ) -> Result<(), DeltaError> {
        self.base.map().read(range, |old| {
            let mut old = Some(old);
            for payload in self.chain.payloads(at) {
                let base = old.take();
                self.arriving.map.read(payload, |payload| {
                    self.chain.apply_payload(at, payload, base, block, workspace)
                })?;
            }
            Ok(())
        })
    }

    fn result(self, speedup: u32) -> Result<Applied, DeltaError> {
        if let Some(error) = self.bad.into_inner().expect("held only to note") {
            return Err(error);
        }
        let busy = Duration::from_nanos(self.busy_ns.into_inner());
        let (bytes, bases) = (self.bytes.into_inner(), self.chain.bases().to_vec());
        Ok(Applied { bytes, busy, speedup, bases })
    }
}

fn chunks(filler: &Filler, range: Range<u64>) -> Range<u32> {
    let chunk_bytes = u64::from(filler.manifest().chunk_bytes);
    (range.start / chunk_bytes) as u32..range.end.div_ceil(chunk_bytes) as u32
}

#[cfg(test)]
mod tests;
