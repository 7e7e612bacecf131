//! One block of elements: where they changed and by how much.
//!
//! The receiver has the old values, and an element's chance to change halves with each step of its
//! exponent. So positions are counted per exponent class (the n-th element *of its class*), which costs
//! a third less than plain gaps; changes are nearly always one step in value order, so a run of those
//! costs a sign each.
//!
//! ```text
//!   top u8, then bits:  for each class: gamma(count), and if count > 0:
//!     mode 1 bit, [k 5 bits], rice(gap in the class) x count, signs x count,
//!     runs: rice(ones before the next larger step), rice(size - 2) ... | sizes: rice(size - 1) x count
//! ```

use super::bits::{BadBits, BitReader, BitWriter};
use super::element::Element;

pub(super) const CLASSES: usize = 8;
/// Elements whose class counts are kept as one entry: a byte per class must hold them.
const GROUP: usize = 64;
/// Larger steps than this share are not worth runs.
const K_BITS: u32 = 6;

/// Reused between blocks, so that coding one allocates nothing.
#[derive(Default)]
pub(super) struct Scratch {
    /// Class of each element.
    classes: Vec<u8>,
    /// Of each group, how many elements are in each class.
    counts: Vec<[u8; CLASSES]>,
    /// (rank in the class, zigzag step) of each change.
    changes: [Vec<(u32, u64)>; CLASSES],
}

/// `None` if nothing changed.
pub(super) fn encode<E: Element>(old: &[u8], new: &[u8], scratch: &mut Scratch) -> Option<Vec<u8>> {
    if old == new {
        return None;
    }
    let top = top_exponent::<E>(old);
    let totals = classify::<E>(old, top, scratch);
    collect::<E>(old, new, scratch);
    let mut bits = BitWriter::default();
    bits.put(top.into(), 8);
    for (changes, &total) in scratch.changes.iter().zip(&totals) {
        bits.gamma(changes.len() as u32);
        if !changes.is_empty() {
            put_class(&mut bits, changes, total);
        }
    }
    Some(bits.finish())
}

/// `out` holds the old block and gets the new one.
pub(super) fn apply<E: Element>(
    payload: &[u8],
    out: &mut [u8],
    scratch: &mut Scratch,
) -> Result<(), BadBits> {
    let mut bits = BitReader::new(payload);
    let top = bits.take(8)? as u8;
    let totals = classify::<E>(out, top, scratch);
    for (class, &total) in totals.iter().enumerate() {
        let count = bits.gamma()?;
        if count > total {
            return Err(BadBits);
        }
        if count > 0 {
            take_class(&mut bits, count, total, &mut scratch.changes[class])?;
            place::<E>(class, out, scratch)?;
        }
    }
    Ok(())
}

/// The largest exponent that at least a tenth of the elements reach.
fn top_exponent<E: Element>(old: &[u8]) -> u8 {
    let mut histogram = [0u32; 256];
    let (len, stride) = (old.len() / E::BYTES, 7);
    for index in (0..len).step_by(stride) {
        histogram[usize::from(E::exponent(E::read(old, index)))] += 1;
    }
    let wanted = (len / stride / 10) as u32;
    let mut reached = 0;
    for exponent in (0..=255u8).rev() {
        reached += histogram[usize::from(exponent)];
        if reached > wanted {
            return exponent;
        }
    }
    0
}

/// Class and group counts of every element of the old block; returns the totals per class.
fn classify<E: Element>(old: &[u8], top: u8, scratch: &mut Scratch) -> [u32; CLASSES] {
    let len = old.len() / E::BYTES;
    scratch.classes.clear();
    scratch.classes.extend(old.chunks_exact(E::BYTES).map(|b| {
        let below = top.saturating_sub(E::exponent(E::read(b, 0)));
        below.min(CLASSES as u8 - 1)
    }));
    // The tail of the last group belongs to no class.
    scratch.classes.resize(len.next_multiple_of(GROUP), u8::MAX);
    scratch.counts.clear();
    let mut totals = [0u32; CLASSES];
    for group in scratch.classes.chunks_exact(GROUP) {
        let group: &[u8; GROUP] = group.try_into().expect("whole groups");
        let mut counts = [0u8; CLASSES];
        for (class, count) in counts.iter_mut().enumerate() {
            *count = group.iter().map(|&c| u8::from(c == class as u8)).sum();
        }
        for (total, count) in totals.iter_mut().zip(counts) {
            *total += u32::from(count);
        }
        scratch.counts.push(counts);
    }
    totals
}

/// Fills `changes`, by class, in the order of positions.
fn collect<E: Element>(old: &[u8], new: &[u8], scratch: &mut Scratch) {
    let Scratch { classes, counts, changes } = scratch;
    changes.iter_mut().for_each(Vec::clear);
    let mut before = [0u32; CLASSES];
    let bytes = GROUP * E::BYTES;
    let groups = old.chunks(bytes).zip(new.chunks(bytes));
    for (((old, new), classes), counts) in groups.zip(classes.chunks_exact(GROUP)).zip(counts) {
        if old != new {
            let mut rank = before;
            for (index, class) in classes[..old.len() / E::BYTES].iter().enumerate() {
                let class = usize::from(*class) % CLASSES;
                let (was, is) = (E::read(old, index), E::read(new, index));
                if was != is {
                    changes[class].push((rank[class], E::step(was, is)));
                }
                rank[class] += 1;
            }
        }
        for (before, count) in before.iter_mut().zip(counts) {
            *before += u32::from(*count);
        }
    }
}

/// Both sides know how many of a class changed, and so the best parameter for its gaps.
fn gap_k(count: u32, total: u32) -> u32 {
    // Golomb's rule, ln 2 x mean gap, rounded to a power of two at the geometric middle.
    let scaled = u64::from(total - count) * 251 / 256 / u64::from(count);
    scaled.checked_ilog2().unwrap_or(0)
}

fn put_class(bits: &mut BitWriter, changes: &[(u32, u64)], total: u32) {
    let size = |zigzag: u64| (zigzag >> 1) + (zigzag & 1);
    let mean = changes.iter().map(|(_, z)| size(*z) - 1).fold(0u64, u64::saturating_add)
        / changes.len() as u64;
    let larger = changes.iter().filter(|(_, z)| size(*z) > 1).count();
    let in_runs = larger * 4 < changes.len();
    bits.put(u64::from(in_runs), 1);
    let k = if in_runs {
        run_k(changes.len(), larger)
    } else {
        (mean * 251 / 256).checked_ilog2().unwrap_or(0)
    };
    bits.put(k.into(), K_BITS);
    let gaps = gap_k(changes.len() as u32, total);
    let mut next = 0;
    for &(rank, zigzag) in changes {
        bits.rice(u64::from(rank - next), gaps);
        bits.put(zigzag & 1, 1);
        next = rank + 1;
        if !in_runs {
            bits.rice(size(zigzag) - 1, k);
        }
    }
    if in_runs {
        bits.gamma(larger as u32);
        let mut ones = 0;
        for &(_, zigzag) in changes {
            if size(zigzag) == 1 {
                ones += 1;
            } else {
                bits.rice(ones, k);
                bits.rice(size(zigzag) - 2, 0);
                ones = 0;
            }
        }
    }
}

fn run_k(changes: usize, larger: usize) -> u32 {
    ((changes - larger) * 251 / 256 / larger.max(1)).checked_ilog2().unwrap_or(0)
}

fn take_class(
    bits: &mut BitReader<'_>,
    count: u32,
    total: u32,
    changes: &mut Vec<(u32, u64)>,
) -> Result<(), BadBits> {
    changes.clear();
    let in_runs = bits.take(1)? == 1;
    let k = bits.take(K_BITS)? as u32;
    let gaps = gap_k(count, total);
    let mut next = 0u64;
    // The sign alone, then a size: zigzag of `size` with the sign `negative` is 2 size - negative.
    for _ in 0..count {
        let rank = next.checked_add(bits.rice(gaps)?).filter(|r| *r < u64::from(total));
        let rank = rank.ok_or(BadBits)?;
        let negative = bits.take(1)?;
        let size = if in_runs { 1 } else { bits.rice(k.min(56))?.checked_add(1).ok_or(BadBits)? };
        changes.push((rank as u32, zigzag(size, negative)));
        next = rank + 1;
    }
    if in_runs {
        let mut at = 0u64;
        for _ in 0..bits.gamma()? {
            at = at.checked_add(bits.rice(k.min(56))?).ok_or(BadBits)?;
            let change = usize::try_from(at).ok().and_then(|at| changes.get_mut(at));
            let (_, step) = change.ok_or(BadBits)?;
            let size = bits.rice(0)?.checked_add(2).ok_or(BadBits)?;
            *step = zigzag(size, *step & 1);
            at += 1;
        }
    }
    Ok(())
}

fn zigzag(size: u64, negative: u64) -> u64 {
    (size << 1).wrapping_sub(negative)
}

/// Applies the changes of one class. Classes are those of the old block, so the order of classes
/// does not matter.
fn place<E: Element>(class: usize, out: &mut [u8], scratch: &Scratch) -> Result<(), BadBits> {
    let (mut group, mut before) = (0usize, 0u32);
    for &(rank, zigzag) in &scratch.changes[class] {
        loop {
            let count = u32::from(scratch.counts.get(group).ok_or(BadBits)?[class]);
            if rank < before + count {
                break;
            }
            before += count;
            group += 1;
        }
        let classes = &scratch.classes[group * GROUP..(group + 1) * GROUP];
        let index = group * GROUP + nth_of(classes, class as u8, rank - before);
        E::write(out, index, E::apply(E::read(out, index), zigzag));
    }
    Ok(())
}

/// Where the `nth` element of a class is in its group; eight classes at a time.
#[inline]
fn nth_of(classes: &[u8], class: u8, mut nth: u32) -> usize {
    const LOW: u64 = 0x0101_0101_0101_0101;
    let wanted = LOW * u64::from(class);
    for (at, eight) in classes.chunks_exact(8).enumerate() {
        let other = u64::from_le_bytes(eight.try_into().expect("8 bytes")) ^ wanted;
        // The high bit of each byte that is zero.
        let mut hits = !(((other & (LOW * 0x7F)) + LOW * 0x7F) | other | (LOW * 0x7F));
        let count = hits.count_ones();
        if nth < count {
            for _ in 0..nth {
                hits &= hits - 1;
            }
            return at * 8 + hits.trailing_zeros() as usize / 8;
        }
        nth -= count;
    }
    unreachable!("the group's count says that it is here")
}
