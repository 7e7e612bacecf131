//! A version as the difference to one that the receiver holds: lossless, block by block, applied out of
//! place (new = f(base, delta)), so a crash in the middle costs nothing but the work. The result is
//! verified by the full version's own chunk hashes, so a wrong delta can waste time, never corrupt.
//!
//! ```text
//!   blob:  magic "ABX1", blocks u32, then a length u32 per block, then the blocks
//!   block: 0 bytes = unchanged | 0 raw bytes | 1 changes (see `block`)
//! ```

use std::ops::Range;

use anabranch_proto::manifest::{DType, Manifest};
use anabranch_proto::version::Root;

pub mod chain;
pub mod choice;

mod bits;
mod block;
mod cpu;
mod element;
pub(crate) mod encode;
mod masks;
pub(crate) mod memory;

use bits::BadBits;
use block::Scratch;
use chain::Single;
pub use encode::encode;

const MAGIC: [u8; 4] = *b"ABX1";
/// Large enough that a block's head is small beside the changes of a sparse block, small enough that
/// old and new block stay in a core's cache.
const BLOCK_BYTES: usize = 256 << 10;
const RAW: u8 = 0;
const CHANGES: u8 = 1;

/// Why bytes are no delta to the version.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// The bytes are of another format.
    #[error("not a delta (starts with {0:02x?})")]
    Magic(Vec<u8>),
    /// The number of blocks is another.
    #[error("a delta of {have} blocks for an image of {want}")]
    Blocks { have: usize, want: usize },
    /// The bytes end early.
    #[error("the delta ends early")]
    Short,
    /// A block is malformed.
    #[error("block {0} of the delta is malformed")]
    Block(usize),
    /// The delta is from another base.
    #[error("a delta from base {from}, and the base held here is {base}")]
    Base { from: Root, base: Root },
    /// The base has another length.
    #[error("the base has {base} bytes, the version {version}")]
    Size { base: usize, version: usize },
}

/// A part of the image with elements of one kind.
struct BlockSpec {
    range: Range<usize>,
    dtype: DType,
}

/// Memory that a worker needs over many blocks.
#[derive(Default)]
pub struct Workspace {
    scratch: Scratch,
}

/// Applies a whole delta on one thread.
pub fn apply(
    manifest: &Manifest,
    blob: &[u8],
    base: &[u8],
    out: &mut [u8],
) -> Result<(), DeltaError> {
    let blocks = blocks(manifest);
    let delta = Single::parse(blocks.len(), blob)?;
    let version = manifest.image_bytes as usize;
    if base.len() != version || out.len() != version {
        return Err(DeltaError::Size { base: base.len(), version });
    }
    let mut workspace = Workspace::default();
    for (at, spec) in blocks.iter().enumerate() {
        let (base, out) = (&base[spec.range.clone()], &mut out[spec.range.clone()]);
        apply_block(at, spec, delta.payload(blob, at), Some(base), out, &mut workspace)?;
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

/// `block` gets the new bytes; the old ones are `base`, or in `block`.
fn apply_block(
    at: usize,
    spec: &BlockSpec,
    payload: &[u8],
    base: Option<&[u8]>,
    block: &mut [u8],
    workspace: &mut Workspace,
) -> Result<(), DeltaError> {
    let want = spec.range.len();
    if block.len() != want || base.is_some_and(|base| base.len() != want) {
        let base = base.map_or(block.len(), <[u8]>::len);
        return Err(DeltaError::Size { base, version: want });
    }
    match payload.split_first() {
        None => base.into_iter().for_each(|base| block.copy_from_slice(base)),
        Some((&RAW, raw)) if raw.len() == want => block.copy_from_slice(raw),
        Some((&CHANGES, bits)) => {
            let applied = cpu::apply(spec.dtype, bits, base, block, &mut workspace.scratch);
            return applied.map_err(|BadBits| DeltaError::Block(at));
        }
        Some(_) => return Err(DeltaError::Block(at)),
    }
    Ok(())
}

#[cfg(test)]
mod tests;
