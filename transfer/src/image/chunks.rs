//! Sets of chunks, and the ledger of verified ones that only grows. Knows neither bytes nor peers.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use fixedbitset::FixedBitSet;

/// A set of chunks of one image, by their indices. What lies beyond the image's last chunk is never in it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ChunkSet {
    bits: FixedBitSet,
    /// Number of set bits, which is asked for at every chunk.
    count: u32,
}

/// The verified chunks of one image. Shared by the receiver that fills it and the server that lends
/// from it; a chunk only ever goes from absent to present.
#[derive(Debug)]
pub struct Ledger {
    set: Mutex<ChunkSet>,
    grown: Condvar,
}

// === impl ChunkSet ===

impl ChunkSet {
    /// No chunk of an image of `len` chunks.
    pub fn empty(len: u32) -> ChunkSet {
        ChunkSet { bits: FixedBitSet::with_capacity(len as usize), count: 0 }
    }

    /// All chunks of an image of `len` chunks.
    pub fn full(len: u32) -> ChunkSet {
        let mut set = ChunkSet::empty(len);
        set.insert_range(0..len);
        set
    }

    /// The number of chunks of the image.
    pub fn len(&self) -> u32 {
        self.bits.len() as u32
    }

    /// True if no chunk is in the set.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The number of chunks in the set.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// True if every chunk of the image is in the set.
    pub fn is_full(&self) -> bool {
        self.count == self.len()
    }

    /// True if the chunk is in the set.
    pub fn contains(&self, index: u32) -> bool {
        self.bits.contains(index as usize)
    }

    /// Adds a chunk. Returns true if it was absent; ignores one beyond the end.
    pub fn insert(&mut self, index: u32) -> bool {
        let absent = index < self.len() && !self.bits.put(index as usize);
        self.count += u32::from(absent);
        absent
    }

    /// Takes a chunk out. Returns true if it was present.
    pub fn remove(&mut self, index: u32) -> bool {
        let present = self.contains(index);
        if present {
            self.bits.remove(index as usize);
            self.count -= 1;
        }
        present
    }

    /// Adds a run of chunks; ignores what lies beyond the end.
    pub fn insert_range(&mut self, range: Range<u32>) {
        let end = range.end.min(self.len());
        if range.start < end {
            let run = range.start as usize..end as usize;
            self.count += self.bits.count_zeroes(run.clone()) as u32;
            self.bits.insert_range(run);
        }
    }

    /// Adds the chunks of `other`; ignores those beyond the end.
    pub fn union(&mut self, other: &ChunkSet) {
        if other.len() > self.len() {
            for index in other.iter() {
                self.insert(index);
            }
        } else {
            self.bits.union_with(&other.bits);
            self.count = self.bits.count_ones(..) as u32;
        }
    }

    /// The chunks, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.bits.ones().map(|index| index as u32)
    }

    /// The first chunk at or after `from`, then from the start, that is in `self` and in `other`.
    pub fn first_common(&self, other: &ChunkSet, from: u32) -> Option<u32> {
        let (ours, theirs) = (self.bits.as_slice(), other.bits.as_slice());
        let words = ours.len().min(theirs.len());
        if words == 0 {
            return None;
        }
        let start = (from / usize::BITS) as usize % words;
        let common = |at: usize| ours[at] & theirs[at];
        let pick = |at: usize, word: usize| at as u32 * usize::BITS + word.trailing_zeros();
        let head = common(start) & (usize::MAX << (from % usize::BITS));
        if head != 0 {
            return Some(pick(start, head));
        }
        (1..=words).map(|step| (start + step) % words).find_map(|at| {
            let word = common(at);
            (word != 0).then(|| pick(at, word))
        })
    }

    /// Maximal runs, in order: the form that crosses the wire.
    pub fn ranges(&self) -> Vec<Range<u32>> {
        let mut out: Vec<Range<u32>> = Vec::new();
        for index in self.iter() {
            match out.last_mut() {
                Some(run) if run.end == index => run.end += 1,
                _ => out.push(index..index + 1),
            }
        }
        out
    }
}

// === impl Ledger ===

impl Ledger {
    /// A ledger that begins with `set`.
    pub fn new(set: ChunkSet) -> Ledger {
        Ledger { set: Mutex::new(set), grown: Condvar::new() }
    }

    /// Adds a chunk and wakes those who wait for growth. Returns true if it was absent.
    /// Adds a chunk and wakes those who wait for growth. Returns true if it was absent.
    pub fn insert(&self, index: u32) -> bool {
        let new = self.lock().insert(index);
        if new {
            self.grown.notify_all();
        }
        new
    }

    /// True if the chunk is verified.
    /// True if the chunk is verified.
    pub fn contains(&self, index: u32) -> bool {
        self.lock().contains(index)
    }

    /// True if every chunk is verified.
    /// True if every chunk is verified.
    pub fn is_full(&self) -> bool {
        self.lock().is_full()
    }

    /// A copy of the set as it is now.
    pub fn snapshot(&self) -> ChunkSet {
        self.lock().clone()
    }

    /// The set once it holds more than `count` chunks, or as it is after `patience`.
    pub fn wait_beyond(&self, count: u32, patience: Duration) -> ChunkSet {
        let waited = self.grown.wait_timeout_while(self.lock(), patience, |s| s.count() <= count);
        waited.expect("no holder of the ledger's lock panics").0.clone()
    }

    fn lock(&self) -> MutexGuard<'_, ChunkSet> {
        self.set.lock().expect("no holder of the ledger's lock panics")
    }
}

#[cfg(test)]
mod tests {
    // One range is a set of chunks here, not a mistake for its members.
    #![allow(clippy::single_range_in_vec_init)]

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_chunk_set_behaves_like_a_set(
            len in 1u32..300,
            a in proptest::collection::btree_set(0u32..300, 0..80),
            b in proptest::collection::btree_set(0u32..300, 0..80),
            from in 0u32..300,
        ) {
            let build = |s: &std::collections::BTreeSet<u32>| {
                let mut set = ChunkSet::empty(len);
                for &i in s { set.insert(i); }
                set
            };
            let (x, y) = (build(&a), build(&b));
            let in_a: Vec<u32> = a.iter().copied().filter(|i| *i < len).collect();
            prop_assert_eq!(x.iter().collect::<Vec<_>>(), in_a.clone());
            prop_assert_eq!(x.count() as usize, in_a.len());
            prop_assert_eq!(x.ranges().into_iter().flatten().collect::<Vec<_>>(), in_a);
            let common: Vec<u32> = x.iter().filter(|i| y.contains(*i)).collect();
            let first = common.iter().copied().find(|i| *i >= from % len).or(common.first().copied());
            prop_assert_eq!(x.first_common(&y, from % len), first);
            let mut u = x.clone();
            u.union(&y);
            prop_assert_eq!(u.count() as usize, u.iter().count());
            prop_assert!(u.iter().all(|i| x.contains(i) || y.contains(i)));
        }
    }

    #[test]
    fn a_full_set_is_one_range_and_nothing_lies_beyond_it() {
        let mut set = ChunkSet::full(130);
        assert!(
            set.is_full() && set.ranges() == [0..130] && !set.contains(130) && !set.insert(130)
        );
        assert!(set.remove(64) && !set.remove(64));
        assert_eq!(set.ranges(), [0..64, 65..130]);
    }

    #[test]
    fn a_waiter_is_woken_by_growth() {
        let ledger = Ledger::new(ChunkSet::empty(3));
        std::thread::scope(|s| {
            let waiter = s.spawn(|| ledger.wait_beyond(1, Duration::from_secs(20)).count());
            ledger.insert(0);
            ledger.insert(2);
            assert_eq!(waiter.join().expect("waiter"), 2);
        });
    }
}
