//! Memory for deltas, two buffers in turn, as versions have two slots: what a version's delta is in is
//! reused by the second one after it, and its pages with it. A buffer has addresses for the largest delta and
//! memory for those that there were. Owns the buffers, their generations, and how one buffer is lent to
//! receivers with different bases.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anabranch_proto::manifest::{Kind, Manifest};
use anabranch_proto::version::Root;

use super::chain::HEAD_BYTES;
use super::encode::Output;
use crate::image::blob::{Backing, Blob, Stamp};
use crate::image::chunks::{ChunkSet, Ledger};
use crate::memory::map::SharedMap;

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

/// Writes a delta into a buffer, whose memory grows with it.
pub(crate) struct DeltaWriter<'a> {
    map: &'a SharedMap,
    room: u64,
    /// Offset of the delta in the buffer.
    start: u64,
}

/// A buffer that grows gets some more, so that it does not grow for each block.
const STEP_BYTES: u64 = 1 << 20;
/// Memory that a buffer keeps though its delta is smaller: two buffers fit in what a role may take beside two
/// versions, 64 MiB.
pub(crate) const KEPT_BYTES: u64 = 16 << 20;

// === impl DeltaMemory ===

impl DeltaMemory {
    /// Room for `room` bytes, taken from the older delta, whose readers see it by the stamp. Only what is
    /// backed has memory.
    pub(crate) fn take(&self, room: u64) -> io::Result<(Arc<SharedMap>, Stamp)> {
        let mut slots = self.slots.lock().expect("held only to take a slot");
        let at = slots.next;
        slots.next = (at + 1) % slots.slots.len();
        let slot = &mut slots.slots[at];
        slot.generation.fetch_add(1, Ordering::AcqRel);
        Ok((slot.map(room)?, Stamp::of(&slot.generation)))
    }

    /// Makes both buffers, with memory for the first `bytes`, before anybody needs them.
    pub(crate) fn prepare(&self, room: u64, bytes: u64) -> io::Result<()> {
        let mut slots = self.slots.lock().expect("held only to take a slot");
        slots.slots.iter_mut().try_for_each(|slot| slot.map(room)?.back(bytes.min(room)))
    }
}

/// Address space for a chain to a version of `image_bytes`: chains that are lent are smaller than the version.
pub(crate) fn room(image_bytes: u64) -> u64 {
    image_bytes + image_bytes / 16 + HEAD_BYTES
}

/// Memory that a delta of `used` bytes does not need goes back, but for some that spares the next one to
/// get it anew.
pub(crate) fn trim(map: &SharedMap, used: u64) {
    if let Err(error) = map.release(KEPT_BYTES.max(used + used / 4)) {
        tracing::info!(%error, "memory of a delta stays as it is");
    }
}

// === impl Slot ===

impl Slot {
    fn map(&mut self, room: u64) -> io::Result<Arc<SharedMap>> {
        if let Some(map) = self.map.take().filter(|m| m.len() >= room) {
            return Ok(Arc::clone(self.map.insert(map)));
        }
        Ok(Arc::clone(self.map.insert(Arc::new(SharedMap::reserved("anabranch-delta", room)?))))
    }
}

// === impl DeltaWriter ===

impl<'a> DeltaWriter<'a> {
    pub(crate) fn new(map: &'a SharedMap, start: u64) -> DeltaWriter<'a> {
        DeltaWriter { map, room: map.len(), start }
    }
}

impl Output for DeltaWriter<'_> {
    fn put(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let at = self.start + at;
        let end = at + bytes.len() as u64;
        if end > self.room {
            return Err(io::Error::other("a delta that is larger than the version itself"));
        }
        if end > self.map.backed() {
            self.map.back(self.room.min(end + STEP_BYTES.max(end / 4)))?;
        }
        self.map.write(at..end, |out| out.copy_from_slice(bytes));
        Ok(())
    }
}

/// Blobs of the chain in `map`, one for each base: each is a beginning of the same bytes. `links` are the bases
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
        let (c, c_stamp) = memory.take(900).expect("memory");
        assert!(Arc::ptr_eq(&a, &c), "it had room");
        assert!(!a_stamp.is_valid() && b_stamp.is_valid() && c_stamp.is_valid());
        let (d, _) = memory.take(5000).expect("memory");
        assert!(!Arc::ptr_eq(&b, &d) && d.len() >= 5000);
    }

    #[test]
    fn a_buffer_has_memory_for_what_was_written_and_keeps_little_of_it() {
        use std::os::unix::fs::MetadataExt;
        let memory = DeltaMemory::default();
        memory.prepare(1 << 30, 2 << 20).expect("memory");
        let (map, _) = memory.take(1 << 30).expect("memory");
        let used = || map.backing().metadata().expect("metadata").blocks() * 512;
        assert_eq!(used(), 2 << 20);
        let mut writer = DeltaWriter::new(&map, 40);
        writer.put((40 << 20) - 43, b"abc").expect("room");
        assert_eq!(used(), 50 << 20);
        assert_eq!(map.read((40 << 20) - 3..40 << 20, <[u8]>::to_vec), b"abc");
        assert!(writer.put((1 << 30) - 42, b"abc").is_err(), "it has no room");
        trim(&map, 30 << 20);
        assert_eq!(used(), (30 << 20) / 4 * 5);
        trim(&map, 0);
        assert_eq!(used(), KEPT_BYTES);
    }
}
