//! Deltas of consecutive versions behind each other, for receivers that are several versions behind. The
//! newest comes first, so what leads from a newer base is the beginning of what leads from an older one,
//! and one file serves all. A block is taken through all versions in one pass, while it is in the cache.
//!
//! ```text
//!   chain: (base's root 32 bytes, length u64, delta) newest first; each base is the version that the next
//!          delta leads to; the last one is the receiver's
//! ```

use std::ops::Range;

use anabranch_proto::manifest::Manifest;
use anabranch_proto::version::Root;

use super::{BlockSpec, DeltaError, MAGIC, Workspace, apply_block, blocks};

/// Length of a head in bytes.
pub const HEAD_BYTES: u64 = 32 + 8;
/// More links than this say that the chain is not one.
pub const MAX_LINKS: usize = 32;

/// The head of a delta in a chain: root of the base and length of the delta.
pub fn head(base: Root, len: u64) -> [u8; HEAD_BYTES as usize] {
    let mut out = [0; HEAD_BYTES as usize];
    out[..32].copy_from_slice(&base.0);
    out[32..].copy_from_slice(&len.to_le_bytes());
    out
}

/// A parsed chain of deltas, whose payloads may still be arriving.
pub struct Chain {
    blocks: Vec<BlockSpec>,
    /// Newest first.
    links: Vec<Link>,
    bases: Vec<(Root, u64)>,
}

struct Link {
    /// Start of each block's payload, then the end of the last one.
    starts: Vec<u64>,
}

// === impl Chain ===

impl Chain {
    /// A chain of `len` bytes from `base` to an image as in `manifest`. `read` gives bytes of it, or `None`
    /// if they will never come; it may wait.
    pub fn parse(
        manifest: &Manifest,
        base: Root,
        len: u64,
        read: &mut dyn FnMut(Range<u64>) -> Option<Vec<u8>>,
    ) -> Result<Chain, DeltaError> {
        let blocks = blocks(manifest);
        let (mut links, mut bases, mut at) = (Vec::new(), Vec::new(), 0);
        while at < len {
            if links.len() == MAX_LINKS || len - at < HEAD_BYTES {
                return Err(DeltaError::Short);
            }
            let head = take(read, at..at + HEAD_BYTES)?;
            let (root, size) = head.split_at(32);
            let size = u64::from_le_bytes(size.try_into().expect("8 bytes"));
            let start = at + HEAD_BYTES;
            at = start.checked_add(size).filter(|end| *end <= len).ok_or(DeltaError::Short)?;
            links.push(Link::parse(blocks.len(), start..at, read)?);
            bases.push((Root(root.try_into().expect("32 bytes")), at));
        }
        match bases.last().map(|(from, _)| *from) {
            Some(from) if from == base => Ok(Chain { blocks, links, bases }),
            from => Err(DeltaError::Base { from: from.unwrap_or_default(), base }),
        }
    }

    /// Bases that it leads from, the newest first, and how much of the chain each takes.
    pub fn bases(&self) -> &[(Root, u64)] {
        &self.bases
    }

    /// Number of blocks of the image.
    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// The bytes of the image that block `at` covers.
    pub fn range(&self, at: usize) -> Range<u64> {
        let range = &self.blocks[at].range;
        range.start as u64..range.end as u64
    }

    /// The parts of the chain that block `at` needs, in the order of their application.
    pub fn payloads(&self, at: usize) -> impl Iterator<Item = Range<u64>> + '_ {
        self.links.iter().rev().map(move |link| link.payload(at))
    }

    /// One payload of block `at`: `block` gets the next version's bytes. Those before are `base` for the
    /// first payload and in `block` already for the others.
    pub fn apply_payload(
        &self,
        at: usize,
        payload: &[u8],
        base: Option<&[u8]>,
        block: &mut [u8],
        workspace: &mut Workspace,
    ) -> Result<(), DeltaError> {
        apply_block(at, &self.blocks[at], payload, base, block, workspace)
    }
}

// === impl Link ===

impl Link {
    /// The delta at `range` of what `read` reads.
    pub(super) fn parse(
        blocks: usize,
        range: Range<u64>,
        read: &mut dyn FnMut(Range<u64>) -> Option<Vec<u8>>,
    ) -> Result<Link, DeltaError> {
        let table = range.start + 8;
        let payloads = table + 4 * blocks as u64;
        if range.end < table {
            return Err(DeltaError::Short);
        }
        let head = take(read, range.start..table)?;
        if head[..4] != MAGIC {
            return Err(DeltaError::Magic(head[..4].to_vec()));
        }
        let have = u32::from_le_bytes(head[4..].try_into().expect("4 bytes")) as usize;
        if have != blocks {
            return Err(DeltaError::Blocks { have, want: blocks });
        }
        if range.end < payloads {
            return Err(DeltaError::Short);
        }
        let mut starts = Vec::with_capacity(blocks + 1);
        let mut at = payloads;
        starts.push(at);
        for len in take(read, table..payloads)?.chunks_exact(4) {
            at += u64::from(u32::from_le_bytes(len.try_into().expect("4 bytes")));
            starts.push(at);
        }
        if at == range.end { Ok(Link { starts }) } else { Err(DeltaError::Short) }
    }

    pub(super) fn payload(&self, at: usize) -> Range<u64> {
        self.starts[at]..self.starts[at + 1]
    }
}

fn take(
    read: &mut dyn FnMut(Range<u64>) -> Option<Vec<u8>>,
    range: Range<u64>,
) -> Result<Vec<u8>, DeltaError> {
    let len = range.end - range.start;
    let bytes = read(range).ok_or(DeltaError::Short)?;
    if bytes.len() as u64 == len { Ok(bytes) } else { Err(DeltaError::Short) }
}

/// A single delta without a head, all of it here.
pub(super) struct Single {
    link: Link,
}

impl Single {
    pub(super) fn parse(blocks: usize, blob: &[u8]) -> Result<Single, DeltaError> {
        let slice = |r: Range<u64>| blob.get(r.start as usize..r.end as usize).map(<[u8]>::to_vec);
        Ok(Single { link: Link::parse(blocks, 0..blob.len() as u64, &mut { slice })? })
    }

    pub(super) fn payload<'a>(&self, blob: &'a [u8], at: usize) -> &'a [u8] {
        let range = self.link.payload(at);
        &blob[range.start as usize..range.end as usize]
    }
}
