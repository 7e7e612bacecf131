//! Sets of elements as bit masks, 64 elements a word: which changed, which are of a class. Everything
//! that looks at each element is here, in loops over arrays of fixed size that compile to vector code.

use super::cpu::Cpu;
use super::element::{Element, GROUP, MAX_CLASSES};

/// Sets of elements of one block, in words of `GROUP` elements; elements beyond the block are in no set.
#[derive(Default)]
pub(super) struct Masks {
    /// The elements of each class.
    of_class: Vec<[u64; MAX_CLASSES]>,
    /// Number of elements of each class in the words before; `STRIDE` more entries hold the totals.
    before: Vec<[u32; MAX_CLASSES]>,
    changed: Vec<u64>,
}

/// Words that the search for an element skips at once.
const STRIDE: usize = 4;

/// An element of a class, by the order in it and by the order of all.
pub(super) struct Ranked {
    pub(super) rank: u32,
    pub(super) index: usize,
}

// === impl Masks ===

impl Masks {
    pub(super) fn totals(&self) -> [u32; MAX_CLASSES] {
        self.before.last().copied().unwrap_or_default()
    }

    /// The classes of `old`, and where `new` differs from it.
    #[inline(always)]
    pub(super) fn compare<C: Cpu, E: Element>(&mut self, old: &[u8], new: &[u8], top: u8) {
        let bytes = GROUP * E::BYTES;
        let mut before = self.begin::<E>(old.len());
        let (whole, last) = old.split_at(old.len() / bytes * bytes);
        let pairs = whole.chunks_exact(bytes).zip(new.chunks_exact(bytes));
        for (at, (old_group, new_group)) in pairs.enumerate() {
            load::<C>(old, at * bytes, bytes);
            load::<C>(new, at * bytes, bytes);
            let (old, new) = (old_group, new_group);
            self.changed[at] = C::bit_of_each(&E::differing(old, new), 0);
            self.sort::<C, E>(at, old, top, u64::MAX, &mut before);
        }
        if !last.is_empty() {
            let at = whole.len() / bytes;
            let (old, new) = (padded(last), padded(&new[whole.len()..]));
            self.changed[at] = C::bit_of_each(&E::differing(&old[..bytes], &new[..bytes]), 0);
            self.sort::<C, E>(at, &old[..bytes], top, first(last.len() / E::BYTES), &mut before);
        }
        self.end(before);
    }

    /// The classes of what is in `block`; where there is a `base`, that is copied there first.
    #[inline(always)]
    pub(super) fn classify<C: Cpu, E: Element>(
        &mut self,
        base: Option<&[u8]>,
        block: &mut [u8],
        top: u8,
    ) {
        let bytes = GROUP * E::BYTES;
        let mut before = self.begin::<E>(block.len());
        let whole = block.len() / bytes * bytes;
        for at in (0..whole).step_by(bytes) {
            if let Some(base) = base {
                load::<C>(base, at, bytes);
                store::<C>(block, at, bytes);
                block[at..at + bytes].copy_from_slice(&base[at..at + bytes]);
            }
            self.sort::<C, E>(at / bytes, &block[at..at + bytes], top, u64::MAX, &mut before);
        }
        if whole < block.len() {
            if let Some(base) = base {
                block[whole..].copy_from_slice(&base[whole..]);
            }
            let last = &block[whole..];
            let valid = first(last.len() / E::BYTES);
            self.sort::<C, E>(whole / bytes, &padded(last)[..bytes], top, valid, &mut before);
        }
        self.end(before);
    }

    #[inline(always)]
    fn begin<E: Element>(&mut self, len: usize) -> [u32; MAX_CLASSES] {
        let words = len.div_ceil(GROUP * E::BYTES);
        self.of_class.resize(words, [0; MAX_CLASSES]);
        self.changed.resize(words, 0);
        self.before.resize(words + STRIDE, [0; MAX_CLASSES]);
        [0; MAX_CLASSES]
    }

    fn end(&mut self, totals: [u32; MAX_CLASSES]) {
        self.before[self.of_class.len()..].fill(totals);
    }

    #[inline(always)]
    fn sort<C: Cpu, E: Element>(
        &mut self,
        at: usize,
        group: &[u8],
        top: u8,
        valid: u64,
        before: &mut [u32; MAX_CLASSES],
    ) {
        let classes = E::classes(group, top);
        let bits =
            [C::bit_of_each(&classes, 0), C::bit_of_each(&classes, 1), C::bit_of_each(&classes, 2)];
        let mut of_class = [valid; MAX_CLASSES];
        for class in 0..MAX_CLASSES {
            of_class[class] &= (bits[0] ^ UNSET[0][class])
                & (bits[1] ^ UNSET[1][class])
                & (bits[2] ^ UNSET[2][class]);
        }
        self.before[at] = *before;
        self.of_class[at] = of_class;
        for class in 0..MAX_CLASSES {
            before[class] += of_class[class].count_ones();
        }
    }

    /// Calls `found(class, place)` for each element that changed, in order.
    #[inline(always)]
    pub(super) fn changes(
        &self,
        class_of: impl Fn(usize) -> usize,
        mut found: impl FnMut(usize, Ranked),
    ) {
        for (at, &changed) in self.changed.iter().enumerate() {
            let mut left = changed;
            while left != 0 {
                let lowest = left & left.wrapping_neg();
                let index = at * GROUP + left.trailing_zeros() as usize;
                let class = class_of(index) % MAX_CLASSES;
                let below = self.of_class[at][class] & (lowest - 1);
                let rank = self.before[at][class] + below.count_ones();
                found(class, Ranked { rank, index });
                left ^= lowest;
            }
        }
    }

    /// Index of the element with that rank in its class, if there is one. In and out, `word` is where the search
    /// begins and where it ended. Ranks are asked for in ascending order.
    #[inline(always)]
    pub(super) fn find<C: Cpu>(&self, class: usize, rank: u32, word: &mut usize) -> Option<usize> {
        while self.before.get(*word + STRIDE)?[class] <= rank {
            *word += STRIDE;
        }
        for step in [STRIDE / 2, STRIDE / 4] {
            *word += if self.before[*word + step][class] <= rank { step } else { 0 };
        }
        let nth = rank - self.before[*word][class];
        Some(*word * GROUP + C::select(self.of_class.get(*word)?[class], nth) as usize)
    }
}

/// All ones where a bit of the class's number is not set.
const UNSET: [[u64; MAX_CLASSES]; 3] = {
    let mut unset = [[0; MAX_CLASSES]; 3];
    let mut at = 0;
    while at < 3 * MAX_CLASSES {
        let (bit, class) = (at / MAX_CLASSES, at % MAX_CLASSES);
        unset[bit][class] = if class >> bit & 1 == 0 { u64::MAX } else { 0 };
        at += 1;
    }
    unset
};

/// The lowest `count` bits, less than all.
fn first(count: usize) -> u64 {
    (1 << count) - 1
}

/// Asks early for what the loop needs soon: the processor guesses only to the end of a page.
#[inline(always)]
fn load<C: Cpu>(bytes: &[u8], at: usize, count: usize) {
    for line in (0..count).step_by(64) {
        C::prefetch(bytes, at + AHEAD + line);
    }
}

#[inline(always)]
fn store<C: Cpu>(bytes: &[u8], at: usize, count: usize) {
    for line in (0..count).step_by(64) {
        C::prefetch_to(bytes, at + AHEAD + line);
    }
}

const AHEAD: usize = 4096;

fn padded(group: &[u8]) -> [u8; GROUP * 8] {
    let mut out = [0; GROUP * 8];
    out[..group.len()].copy_from_slice(group);
    out
}
