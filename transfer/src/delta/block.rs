//! One block of elements: where they changed and by how much.
//!
//! The receiver has the old values, and an element's chance to change halves with each step of its
//! exponent. So positions are counted per exponent class (the n-th element *of its class*), which costs
//! a third less than plain gaps (an exponent-conditioned Rice code); changes are nearly always one step
//! in value order, so a run of those costs a sign each.
//!
//! ```text
//!   top u8, then bits:  for each class: gamma(count), and if count > 0:
//!     in runs 1 bit, k 6 bits, (rice(gap in the class), sign, if not in runs: rice(size - 1)) x count,
//!     if in runs: gamma(larger), (rice(steps of one before it), rice(size - 2)) x larger
//! ```
//! Where more than half of a class changed, the gaps are those between elements that did not, all of them before
//! the first sign.
//!
//! A class is how far the exponent is below `top`, the last one holding all the rest; kinds without an
//! exponent have one class. Sizes are in steps of the value order; the first mode is for blocks where
//! most steps are one. All loops over elements work on bit masks of 64 elements (see `masks`).

use super::bits::{BadBits, BitReader, BitWriter};
use super::cpu::Cpu;
use super::element::{Element, MAX_CLASSES};
use super::masks::{Masks, Ranked};

/// Width of a Rice parameter in the head of a class.
const K_BITS: u32 = 6;
const K_MAX: u32 = 56;

/// Reused between blocks, so that coding one allocates nothing.
#[derive(Default)]
pub(super) struct Scratch {
    masks: Masks,
    /// Changes, one class behind the other, with room for as many as there may be, so that memory is got once.
    changes: Vec<Change>,
}

#[derive(Clone, Copy, Default)]
struct Change {
    /// Among the elements of its class.
    rank: u32,
    /// Zigzag: the sign is the low bit.
    step: u64,
}

/// False if nothing changed; else `out` is `head` and what follows it.
#[inline(always)]
pub(super) fn encode<C: Cpu, E: Element>(
    head: u8,
    old: &[u8],
    new: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> bool {
    if old == new {
        return false;
    }
    let top = top_exponent::<E>(old);
    let Scratch { masks, changes } = scratch;
    masks.compare::<C, E>(old, new, top);
    let totals = masks.totals();
    let starts = starts(totals);
    let mut ends = starts;
    if changes.len() < old.len() / E::BYTES {
        changes.resize(old.len() / E::BYTES, Change::default());
    }
    let class_of = |at| usize::from(E::class(E::read(old, at), top));
    masks.changes(class_of, |class, Ranked { rank, index }| {
        let step = E::step(E::read(old, index), E::read(new, index));
        changes[ends[class]] = Change { rank, step };
        ends[class] += 1;
    });
    let mut bits = BitWriter::after(head, std::mem::take(out));
    bits.put(top.into(), 8);
    for class in 0..E::CLASSES {
        let changes = &changes[starts[class]..ends[class]];
        bits.gamma(changes.len() as u32);
        if !changes.is_empty() {
            put_class(&mut bits, changes, totals[class]);
        }
    }
    *out = bits.finish();
    true
}

/// Index of the first change of each class: every class has room for as many changes as it has elements.
fn starts(totals: [u32; MAX_CLASSES]) -> [usize; MAX_CLASSES] {
    let mut next = 0;
    totals.map(|total| {
        let start = next;
        next += total as usize;
        start
    })
}

/// `block` gets the new elements; the old ones are `base`, or in `block`. Classes are those of the old elements, so the
/// order of classes does not matter.
#[inline(always)]
pub(super) fn apply<C: Cpu, E: Element>(
    payload: &[u8],
    base: Option<&[u8]>,
    block: &mut [u8],
    scratch: &mut Scratch,
) -> Result<(), BadBits> {
    let mut bits = BitReader::new(payload);
    let top = bits.take(8)? as u8;
    let Scratch { masks, changes } = scratch;
    masks.classify::<C, E>(base, block, top);
    for (class, total) in masks.totals().into_iter().enumerate().take(E::CLASSES) {
        let count = bits.gamma()?;
        if count > total {
            return Err(BadBits);
        }
        if count > 0 {
            take_class(&mut bits, count, total, changes)?;
            place::<C, E>(masks, class, changes, block)?;
        }
    }
    bits.finish()
}

/// The largest exponent that at least a tenth of the elements reach, by a sample.
#[inline(always)]
fn top_exponent<E: Element>(old: &[u8]) -> u8 {
    if E::CLASSES == 1 {
        return 0;
    }
    let mut histogram = [0u32; 256];
    let mut sampled = 0;
    // Runs of neighbours, since most of a block is not in the cache yet.
    for run in old.chunks(RUN * E::BYTES).step_by(old.len() / (RUNS * RUN * E::BYTES) + 1) {
        for index in 0..run.len() / E::BYTES {
            histogram[usize::from(E::exponent(E::read(run, index)))] += 1;
            sampled += 1;
        }
    }
    let (wanted, mut reached) = (sampled / 10, 0);
    for exponent in (0..=255u8).rev() {
        reached += histogram[usize::from(exponent)];
        if reached > wanted {
            return exponent;
        }
    }
    0
}

const RUN: usize = 64;
const RUNS: usize = 16;

/// Best parameter for the gaps of a class: both sides know it from the number of changes.
fn gap_k(count: u32, total: u32) -> u32 {
    // Golomb's rule, ln 2 x mean gap, rounded to a power of two at the geometric middle.
    let scaled = u64::from(total - count) * 251 / 256 / u64::from(count);
    scaled.checked_ilog2().unwrap_or(0)
}

#[inline(always)]
fn put_class(bits: &mut BitWriter, changes: &[Change], total: u32) {
    let count = changes.len() as u64;
    let more = changes.iter().map(|c| size(c.step) - 1).fold(0u64, u64::saturating_add);
    let larger = changes.iter().filter(|c| size(c.step) > 1).count() as u64;
    let in_runs = larger * 4 < count;
    let mean = if in_runs { (count - larger) / larger.max(1) } else { more / count };
    let k = (u128::from(mean) * 251 / 256).checked_ilog2().unwrap_or(0).min(K_MAX);
    bits.put(u64::from(in_runs), 1);
    bits.put(k.into(), K_BITS);
    let dense = is_dense(changes.len() as u32, total);
    if dense {
        put_stayed(bits, changes, total);
    }
    let gaps = gap_k(changes.len() as u32, total);
    let mut next = 0;
    for change in changes {
        if !dense {
            bits.rice(u64::from(change.rank - next), gaps);
        }
        bits.put(change.step & 1, 1);
        next = change.rank + 1;
        if !in_runs {
            bits.rice(size(change.step) - 1, k);
        }
    }
    if in_runs {
        put_larger(bits, changes, larger as u32, k);
    }
}

/// True if more than half of a class changed: then the unchanged elements are coded. Both sides can tell.
fn is_dense(count: u32, total: u32) -> bool {
    count > total / 2
}

/// Writes the positions of the elements of a class that did not change.
fn put_stayed(bits: &mut BitWriter, changes: &[Change], total: u32) {
    let stayed = total - changes.len() as u32;
    if stayed == 0 {
        return;
    }
    let gaps = gap_k(stayed, total);
    let (mut rank, mut next) = (0, 0);
    for end in changes.iter().map(|change| change.rank).chain([total]) {
        for stays in rank..end {
            bits.rice(u64::from(stays - next), gaps);
            next = stays + 1;
        }
        rank = end + 1;
    }
}

/// The others of the class: `changes` gets them without their steps.
fn take_stayed(
    bits: &mut BitReader<'_>,
    stayed: u32,
    total: u32,
    changes: &mut Vec<Change>,
) -> Result<(), BadBits> {
    let gaps = if stayed == 0 { 0 } else { gap_k(stayed, total) };
    let mut next = 0;
    let change = |rank| Change { rank, step: 0 };
    for _ in 0..stayed {
        let gap = u32::try_from(bits.rice(gaps)?).map_err(|_| BadBits)?;
        let stays = gap.checked_add(next).filter(|rank| *rank < total).ok_or(BadBits)?;
        changes.extend((next..stays).map(change));
        next = stays + 1;
    }
    changes.extend((next..total).map(change));
    Ok(())
}

/// Steps of more than one, among many of one.
fn put_larger(bits: &mut BitWriter, changes: &[Change], larger: u32, k: u32) {
    bits.gamma(larger);
    let mut ones = 0;
    for change in changes {
        match size(change.step) {
            1 => ones += 1,
            size => {
                bits.rice(ones, k);
                bits.rice(size - 2, 0);
                ones = 0;
            }
        }
    }
}

#[inline(always)]
fn take_class(
    bits: &mut BitReader<'_>,
    count: u32,
    total: u32,
    changes: &mut Vec<Change>,
) -> Result<(), BadBits> {
    changes.clear();
    let in_runs = bits.take(1)? == 1;
    let k = (bits.take(K_BITS)? as u32).min(K_MAX);
    if is_dense(count, total) {
        take_stayed(bits, total - count, total, changes)?;
        for change in &mut *changes {
            let sign = bits.take(1)?;
            let size = if in_runs { 1 } else { bits.rice(k)?.checked_add(1).ok_or(BadBits)? };
            change.step = zigzag(size, sign);
        }
        return if in_runs { take_larger(bits, changes, k) } else { Ok(()) };
    }
    let gaps = gap_k(count, total);
    let mut next = 0u64;
    for _ in 0..count {
        let (gap, sign) = bits.rice_and_bit(gaps)?;
        let rank = next.checked_add(gap).filter(|r| *r < u64::from(total)).ok_or(BadBits)?;
        let size = if in_runs { 1 } else { bits.rice(k)?.checked_add(1).ok_or(BadBits)? };
        changes.push(Change { rank: rank as u32, step: zigzag(size, sign) });
        next = rank + 1;
    }
    if in_runs { take_larger(bits, changes, k) } else { Ok(()) }
}

fn take_larger(bits: &mut BitReader<'_>, changes: &mut [Change], k: u32) -> Result<(), BadBits> {
    let mut at = 0u64;
    for _ in 0..bits.gamma()? {
        at = at.checked_add(bits.rice(k)?).ok_or(BadBits)?;
        let change = usize::try_from(at).ok().and_then(|at| changes.get_mut(at));
        let Change { step, .. } = change.ok_or(BadBits)?;
        let size = bits.rice(0)?.checked_add(2).ok_or(BadBits)?;
        *step = zigzag(size, *step & 1);
        at += 1;
    }
    Ok(())
}

#[inline(always)]
fn size(zigzag: u64) -> u64 {
    (zigzag >> 1) + (zigzag & 1)
}

#[inline(always)]
fn zigzag(size: u64, sign: u64) -> u64 {
    (size << 1).wrapping_sub(sign)
}

#[inline(always)]
fn place<C: Cpu, E: Element>(
    masks: &Masks,
    class: usize,
    changes: &[Change],
    block: &mut [u8],
) -> Result<(), BadBits> {
    let mut word = 0;
    for change in changes {
        let index = masks.find::<C>(class, change.rank, &mut word).ok_or(BadBits)?;
        E::write(block, index, E::apply(E::read(block, index), change.step));
    }
    Ok(())
}
