//! A version as the difference to one that the receiver holds: lossless, block by block, applied out of
//! place (new = f(base, delta)), so a crash in the middle costs nothing but the work. The result is
//! verified by the full version's own chunk hashes, so a wrong delta can waste time, never corrupt.
//!
//! ```text
//!   blob:  magic "ABX1", blocks u32, then a length u32 per block, then the blocks
//!   block: 0 bytes = unchanged | 0 raw bytes | 1 changes (see `block`)
//! ```

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use anabranch_proto::manifest::{DType, Manifest};

mod bits;
mod block;
mod cpu;
mod element;
mod masks;

use bits::BadBits;
use block::Scratch;

const MAGIC: [u8; 4] = *b"ABX1";
/// Large enough that a block's head is small beside the changes of a sparse block, small enough that
/// old and new block stay in a core's cache.
const BLOCK_BYTES: usize = 256 << 10;
const RAW: u8 = 0;
const CHANGES: u8 = 1;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    #[error("not a delta (starts with {0:02x?})")]
    Magic(Vec<u8>),
    #[error("a delta of {have} blocks for an image of {want}")]
    Blocks { have: usize, want: usize },
    #[error("the delta ends early")]
    Short,
    #[error("block {0} of the delta is malformed")]
    Block(usize),
    #[error("the base has {base} bytes, the version {version}")]
    Size { base: usize, version: usize },
}

/// A part of the image with elements of one kind.
struct BlockSpec {
    range: Range<usize>,
    dtype: DType,
}

/// The delta from `base` to `new`, both images with the tensors of `manifest`. `keep_going(raw, coded)`
/// is told before each block how many bytes became how many so far: false gives up.
pub fn encode(
    manifest: &Manifest,
    base: &[u8],
    new: &[u8],
    threads: usize,
    keep_going: &(dyn Fn(u64, u64) -> bool + Sync),
) -> Option<Vec<u8>> {
    let blocks = blocks(manifest);
    let next = AtomicUsize::new(0);
    let (raw, small) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        let mut scratch = Scratch::default();
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(spec) = blocks.get(at) else { return Some(done) };
            if !keep_going(raw.load(Ordering::Relaxed), small.load(Ordering::Relaxed)) {
                return None;
            }
            let (old, new) = (&base[spec.range.clone()], &new[spec.range.clone()]);
            let block = encode_block(spec.dtype, old, new, &mut scratch);
            raw.fetch_add(new.len() as u64, Ordering::Relaxed);
            small.fetch_add(block.len() as u64, Ordering::Relaxed);
            done.push((at, block));
        }
    };
    let mut coded = vec![Vec::new(); blocks.len()];
    for (at, block) in in_parallel(threads, &work)? {
        coded[at] = block;
    }
    let size = 8 + coded.iter().map(|b| b.len() + 4).sum::<usize>();
    let mut out = Vec::with_capacity(size);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&(coded.len() as u32).to_le_bytes());
    coded.iter().for_each(|b| out.extend_from_slice(&(b.len() as u32).to_le_bytes()));
    coded.iter().for_each(|b| out.extend_from_slice(b));
    Some(out)
}

/// A delta that was parsed as far as to apply any block of it.
pub struct Delta<'a> {
    blocks: Vec<BlockSpec>,
    payloads: Vec<&'a [u8]>,
}

/// Memory that a worker needs over many blocks.
#[derive(Default)]
pub struct Workspace {
    scratch: Scratch,
}

// === impl Delta ===

impl<'a> Delta<'a> {
    pub fn parse(manifest: &Manifest, blob: &'a [u8]) -> Result<Delta<'a>, DeltaError> {
        let blocks = blocks(manifest);
        let (head, rest) = blob.split_at_checked(8).ok_or(DeltaError::Short)?;
        if head[..4] != MAGIC {
            return Err(DeltaError::Magic(head[..4].to_vec()));
        }
        let have = u32::from_le_bytes(head[4..].try_into().expect("4 bytes")) as usize;
        if have != blocks.len() {
            return Err(DeltaError::Blocks { have, want: blocks.len() });
        }
        let (lengths, mut rest) = rest.split_at_checked(have * 4).ok_or(DeltaError::Short)?;
        let mut payloads = Vec::with_capacity(have);
        for len in lengths.chunks_exact(4) {
            let len = u32::from_le_bytes(len.try_into().expect("4 bytes")) as usize;
            let (payload, tail) = rest.split_at_checked(len).ok_or(DeltaError::Short)?;
            payloads.push(payload);
            rest = tail;
        }
        if rest.is_empty() { Ok(Delta { blocks, payloads }) } else { Err(DeltaError::Short) }
    }

    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// Where block `at` lies in the image.
    pub fn range(&self, at: usize) -> Range<u64> {
        let range = &self.blocks[at].range;
        range.start as u64..range.end as u64
    }

    /// `block` gets the version's bytes of block `at`. The base's are `base`, or in `block` already.
    pub fn apply_block(
        &self,
        at: usize,
        base: Option<&[u8]>,
        block: &mut [u8],
        workspace: &mut Workspace,
    ) -> Result<(), DeltaError> {
        let spec = &self.blocks[at];
        let want = spec.range.len();
        if block.len() != want || base.is_some_and(|base| base.len() != want) {
            let base = base.map_or(block.len(), <[u8]>::len);
            return Err(DeltaError::Size { base, version: want });
        }
        apply_block(spec.dtype, self.payloads[at], base, block, &mut workspace.scratch)
            .map_err(|BadBits| DeltaError::Block(at))
    }
}

/// Applies a whole delta on one thread.
pub fn apply(
    manifest: &Manifest,
    blob: &[u8],
    base: &[u8],
    out: &mut [u8],
) -> Result<(), DeltaError> {
    let delta = Delta::parse(manifest, blob)?;
    let version = manifest.image_bytes as usize;
    if base.len() != version || out.len() != version {
        return Err(DeltaError::Size { base: base.len(), version });
    }
    let mut workspace = Workspace::default();
    for at in 0..delta.block_count() {
        let range = delta.blocks[at].range.clone();
        delta.apply_block(at, Some(&base[range.clone()]), &mut out[range], &mut workspace)?;
    }
    Ok(())
}

/// The same on both sides, from the manifest alone: runs of one dtype, cut into blocks.
fn blocks(manifest: &Manifest) -> Vec<BlockSpec> {
    let mut runs: Vec<BlockSpec> = Vec::new();
    let mut add = |start: u64, end: u64, dtype: DType| match runs.last_mut() {
        _ if start == end => {}
        Some(last) if last.dtype == dtype && last.range.end as u64 == start => {
            last.range.end = end as usize;
        }
        _ => runs.push(BlockSpec { range: start as usize..end as usize, dtype }),
    };
    let mut end = 0;
    for t in &manifest.tensors {
        // The header, and holes if there were any.
        add(end, t.offset, DType::U8);
        add(t.offset, t.offset + t.len, t.dtype);
        end = t.offset + t.len;
    }
    add(end, manifest.image_bytes, DType::U8);
    let cut = |run: &BlockSpec| {
        let (range, dtype) = (run.range.clone(), run.dtype);
        let starts = range.clone().step_by(BLOCK_BYTES);
        starts.map(move |s| BlockSpec { range: s..(s + BLOCK_BYTES).min(range.end), dtype })
    };
    runs.iter().flat_map(cut).collect()
}

fn encode_block(dtype: DType, old: &[u8], new: &[u8], scratch: &mut Scratch) -> Vec<u8> {
    match cpu::encode(dtype, CHANGES, old, new, scratch) {
        None => Vec::new(),
        Some(coded) if coded.len() <= new.len() => coded,
        Some(_) => [&[RAW], new].concat(),
    }
}

/// `block` gets the new bytes; the old ones are `base`, or in `block`.
fn apply_block(
    dtype: DType,
    payload: &[u8],
    base: Option<&[u8]>,
    block: &mut [u8],
    scratch: &mut Scratch,
) -> Result<(), BadBits> {
    match payload.split_first() {
        None => base.into_iter().for_each(|base| block.copy_from_slice(base)),
        Some((&RAW, raw)) if raw.len() == block.len() => block.copy_from_slice(raw),
        Some((&CHANGES, bits)) => return cpu::apply(dtype, bits, base, block, scratch),
        Some(_) => return Err(BadBits),
    }
    Ok(())
}

/// Runs `work` on `threads` threads and joins what they give; `None` if one gave up.
fn in_parallel<T: Send>(
    threads: usize,
    work: &(impl Fn() -> Option<Vec<T>> + Sync),
) -> Option<Vec<T>> {
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut out = work();
        for other in others {
            let theirs = other.join().expect("coding does not panic");
            out = out.zip(theirs).map(|(mut all, more)| {
                all.extend(more);
                all
            });
        }
        out
    })
}

#[cfg(test)]
mod tests;
