//! Memory for deltas, two buffers in turn, as versions have two slots: what a version's delta is in is
//! reused by the second one after it, and its pages with it. Owns the buffers, their generations, and how
//! one buffer is lent to receivers with different bases.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anabranch_proto::manifest::{Kind, Manifest};
use anabranch_proto::version::Root;

use crate::chunks::{ChunkSet, Ledger};
use crate::holder::{Backing, Blob, Stamp};
use crate::shm::SharedMap;

/// Clones of one are the same memory.
#[derive(Default)]
pub(crate) struct DeltaMemory {
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    slots: [Slot; 2],
    next: usize,
}

#[derive(Default)]
struct Slot {
    map: Option<Arc<SharedMap>>,
    /// Bumped when the memory changes hands.
    generation: Arc<AtomicU64>,
}

// === impl DeltaMemory ===

impl DeltaMemory {
    /// At least `bytes`, taken from the older delta, whose readers see it by the stamp.
    pub(crate) fn take(&self, bytes: u64) -> io::Result<(Arc<SharedMap>, Stamp)> {
        let mut slots = self.slots.lock().expect("held only to take a slot");
        let at = slots.next;
        slots.next = (at + 1) % slots.slots.len();
        let slot = &mut slots.slots[at];
        slot.generation.fetch_add(1, Ordering::AcqRel);
        let map = match slot.map.take().filter(|m| m.len() >= bytes) {
            Some(map) => map,
            // Deltas vary in size: some room spares the next one a new map.
            None => Arc::new(SharedMap::anonymous("anabranch-delta", bytes + bytes / 4)?),
        };
        slot.map = Some(Arc::clone(&map));
        Ok((map, Stamp::of(&slot.generation)))
    }
}

/// What a chain in `map` is lent as, one for each base: beginnings of the same bytes. `links` are the bases
/// with where their chains end, the newest first.
pub(crate) fn blobs(
    map: &SharedMap,
    stamp: &Stamp,
    links: &[(Root, u64)],
    chunk_bytes: u32,
    result: Root,
) -> Vec<(Root, Blob)> {
    let total = links.last().map_or(0, |(_, end)| *end);
    map.read(0..total, |bytes| {
        let hash = |chunk: &[u8]| *blake3::hash(chunk).as_bytes();
        let hashes: Vec<_> = bytes.chunks(chunk_bytes as usize).map(hash).collect();
        let blob = |&(base, end): &(Root, u64)| {
            let whole = (end / u64::from(chunk_bytes)) as usize;
            let mut chunk_hashes = hashes[..whole].to_vec();
            let rest = &bytes[whole * chunk_bytes as usize..end as usize];
            chunk_hashes.extend((!rest.is_empty()).then(|| hash(rest)));
            let manifest = Manifest {
                kind: Kind::Delta { base, result },
                chunk_bytes,
                image_bytes: end,
                tensors: Vec::new(),
                chunk_hashes,
            };
            let ledger = Arc::new(Ledger::new(ChunkSet::full(manifest.chunk_count())));
            let encoded = manifest.encode().into();
            let (file, stamp) = (Backing::Own(Arc::clone(map.backing())), stamp.clone());
            (base, Blob { file, manifest: Arc::new(manifest), encoded, ledger, stamp })
        };
        links.iter().map(blob).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_deltas_live_at_a_time_and_the_third_takes_the_memory_of_the_first() {
        let memory = DeltaMemory::default();
        let (a, a_stamp) = memory.take(1000).expect("memory");
        let (b, b_stamp) = memory.take(1000).expect("memory");
        assert!(a_stamp.is_valid() && b_stamp.is_valid() && !Arc::ptr_eq(&a, &b));
        let (c, c_stamp) = memory.take(1200).expect("memory");
        assert!(Arc::ptr_eq(&a, &c), "it had room");
        assert!(!a_stamp.is_valid() && b_stamp.is_valid() && c_stamp.is_valid());
        let (d, _) = memory.take(5000).expect("memory");
        assert!(!Arc::ptr_eq(&b, &d) && d.len() >= 5000);
    }
}
