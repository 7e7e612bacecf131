//! Memory for deltas, two buffers in turn, as versions have two slots: what a version's delta is in is
//! reused by the second one after it, and its pages with it. Owns the buffers and their generations.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::holder::Stamp;
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
