//! One version out of what all its senders tell: the hash of every chunk, and the bytes of those that
//! straddle borders. Pure, but for the comparison with the part that is here.

use std::collections::BTreeMap;
use std::ops::Range;

use anabranch_proto::manifest::{ChunkHash, chunk_range};

use super::info::{PartInfo, Piece, Whole};
use super::{overlap, tensor_at};
use crate::image::layout::Layout;
use crate::memory::map::SharedMap;

pub(super) struct Joined {
    pub hashes: Vec<ChunkHash>,
    /// Chunks that no sender has as a whole.
    pub assembled: BTreeMap<u32, Vec<u8>>,
}

/// Why the parts do not make one version. Senders are numbered as in the list, in texts from 1.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartError {
    /// The own part is missing in the list.
    #[error("what this sender tells is not among the {senders} given")]
    NotAmong { senders: usize },
    /// A part is of another version.
    #[error(
        "sender {} has a part of version {epoch}.{number}, sender {} (this one) of {our_epoch}.{our_number}",
        sender + 1,
        us + 1
    )]
    OtherVersion {
        sender: usize,
        epoch: u32,
        number: u64,
        us: usize,
        our_epoch: u32,
        our_number: u64,
    },
    /// A part is of other tensors.
    #[error(
        "sender {} has another layout ({theirs}) than sender {}, this one ({ours}): all must give the same \
         tensors in the same order",
        sender + 1,
        us + 1
    )]
    OtherLayout { sender: usize, theirs: String, us: usize, ours: String },
    /// Two senders have different bytes at one place.
    #[error(
        "senders {} and {} both have bytes of {tensors}, and not the same",
        first + 1,
        second + 1
    )]
    Differ { first: usize, second: usize, tensors: String },
    /// Nobody has some of the bytes.
    #[error("no sender has {tensors} ({bytes} bytes)")]
    Missing { tensors: String, bytes: u64 },
}

pub(super) fn join(
    layout: &Layout,
    own: &PartInfo,
    parts: &[PartInfo],
) -> Result<Joined, PartError> {
    let us = parts.iter().position(|part| part == own);
    let us = us.ok_or(PartError::NotAmong { senders: parts.len() })?;
    for (sender, part) in parts.iter().enumerate() {
        same_whole((sender, &part.of), (us, &own.of))?;
    }
    let mut table = Table::new(layout, own.chunk_bytes(), parts)?;
    let mut hashes = Vec::new();
    let mut assembled = BTreeMap::new();
    for index in 0..layout.image_bytes().div_ceil(own.chunk_bytes().into()) as u32 {
        if let Some((_, hash)) = table.claims.get(&index) {
            hashes.push(*hash);
        } else if let Some(chunk) = table.assemble(index)? {
            hashes.push(*blake3::hash(&chunk).as_bytes());
            assembled.insert(index, chunk);
        }
    }
    match table.missing.is_empty() {
        true => Ok(Joined { hashes, assembled }),
        false => Err(PartError::Missing {
            tensors: names(layout, &table.missing),
            bytes: table.missing.iter().map(|gap| gap.end - gap.start).sum(),
        }),
    }
}

fn same_whole(
    (sender, theirs): (usize, &Whole),
    (us, ours): (usize, &Whole),
) -> Result<(), PartError> {
    if (theirs.epoch, theirs.number) != (ours.epoch, ours.number) {
        let (epoch, number) = (theirs.epoch, theirs.number);
        let (our_epoch, our_number) = (ours.epoch, ours.number);
        return Err(PartError::OtherVersion { sender, epoch, number, us, our_epoch, our_number });
    }
    if theirs == ours {
        return Ok(());
    }
    let text = |of: &Whole| {
        let Whole { chunk_bytes, image_bytes, tensors, layout, .. } = of;
        format!(
            "{tensors} tensors, {image_bytes} bytes in chunks of {chunk_bytes}, digest {layout}"
        )
    };
    Err(PartError::OtherLayout { sender, theirs: text(theirs), us, ours: text(ours) })
}

/// Pieces that others have of chunks that are here as a whole must be the same.
pub(super) fn check_here(
    layout: &Layout,
    own: &PartInfo,
    parts: &[PartInfo],
    here: &SharedMap,
) -> Result<(), PartError> {
    let us = parts.iter().position(|part| part == own).unwrap_or(0);
    for (sender, part) in parts.iter().enumerate() {
        for piece in &part.pieces {
            let index = (piece.at / u64::from(own.chunk_bytes())) as u32;
            let is_here = own.hashes.contains_key(&index);
            if is_here && here.read(piece.range(), |ours| ours != piece.bytes) {
                let tensors = format!("`{}`", tensor_at(layout, piece.at));
                return Err(PartError::Differ { first: us, second: sender, tensors });
            }
        }
    }
    Ok(())
}

/// Up to three of the tensors with bytes in these ranges, and how many more.
fn names(layout: &Layout, ranges: &[Range<u64>]) -> String {
    let within = |t: &&anabranch_proto::manifest::Tensor| {
        let after = ranges.partition_point(|r| r.end <= t.offset);
        t.len > 0 && ranges.get(after).is_some_and(|r| r.start < t.offset + t.len)
    };
    let found: Vec<&str> =
        layout.tensors().iter().filter(within).map(|t| t.name.as_str()).collect();
    let named: Vec<String> = found.iter().take(3).map(|name| format!("`{name}`")).collect();
    let more = match found.len().saturating_sub(3) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{}{more}", named.join(", "))
}

/// The hashes and pieces that are known of each chunk.
struct Table<'a> {
    layout: &'a Layout,
    chunk_bytes: u32,
    /// The first sender that has the chunk as a whole.
    claims: BTreeMap<u32, (usize, ChunkHash)>,
    pieces: BTreeMap<u32, Vec<(usize, &'a Piece)>>,
    /// Runs of bytes that nobody has.
    missing: Vec<Range<u64>>,
}

// === impl Table ===

impl<'a> Table<'a> {
    fn new(
        layout: &'a Layout,
        chunk_bytes: u32,
        parts: &'a [PartInfo],
    ) -> Result<Table<'a>, PartError> {
        let (mut claims, mut pieces) = (BTreeMap::new(), BTreeMap::<u32, Vec<_>>::new());
        for (sender, part) in parts.iter().enumerate() {
            for (&index, &hash) in &part.hashes {
                let (first, claimed) = *claims.entry(index).or_insert((sender, hash));
                if claimed != hash {
                    let range = chunk_range(chunk_bytes, layout.image_bytes(), index);
                    let tensors = names(layout, &[range]);
                    return Err(PartError::Differ { first, second: sender, tensors });
                }
            }
            for piece in &part.pieces {
                let index = (piece.at / u64::from(chunk_bytes)) as u32;
                pieces.entry(index).or_default().push((sender, piece));
            }
        }
        Ok(Table { layout, chunk_bytes, claims, pieces, missing: Vec::new() })
    }

    /// Out of the header and the pieces; `None`, and noted, where bytes are missing.
    fn assemble(&mut self, index: u32) -> Result<Option<Vec<u8>>, PartError> {
        let chunk = chunk_range(self.chunk_bytes, self.layout.image_bytes(), index);
        let mut out = vec![0; (chunk.end - chunk.start) as usize];
        let at = |offset: u64| (offset - chunk.start) as usize;
        let header = overlap(&(0..self.layout.header().len() as u64), &chunk);
        let mut filled: Vec<(Option<usize>, Range<u64>)> = Vec::new();
        if !header.is_empty() {
            let bytes = &self.layout.header()[header.start as usize..header.end as usize];
            out[..bytes.len()].copy_from_slice(bytes);
            filled.push((None, header));
        }
        for (sender, piece) in self.pieces.get(&index).into_iter().flatten() {
            let range = piece.range();
            for (other, before) in &filled {
                let both = overlap(&range, before);
                let Some(other) = other.filter(|_| !both.is_empty()) else { continue };
                let ours = &piece.bytes[(both.start - range.start) as usize..];
                let theirs = &out[at(both.start)..at(both.end)];
                if theirs != &ours[..theirs.len()] {
                    let tensors = names(self.layout, std::slice::from_ref(&both));
                    return Err(PartError::Differ { first: other, second: *sender, tensors });
                }
            }
            out[at(range.start)..at(range.end)].copy_from_slice(&piece.bytes);
            filled.push((Some(*sender), range));
        }
        let gaps = gaps(&chunk, filled.into_iter().map(|(_, range)| range).collect());
        let whole = gaps.is_empty();
        gaps.into_iter().for_each(|gap| self.miss(gap));
        Ok(whole.then_some(out))
    }

    fn miss(&mut self, gap: Range<u64>) {
        match self.missing.last_mut() {
            Some(run) if run.end == gap.start => run.end = gap.end,
            _ => self.missing.push(gap),
        }
    }
}

fn gaps(chunk: &Range<u64>, mut filled: Vec<Range<u64>>) -> Vec<Range<u64>> {
    filled.sort_by_key(|range| range.start);
    let (mut upto, mut gaps) = (chunk.start, Vec::new());
    for range in filled {
        if range.start > upto {
            gaps.push(upto..range.start);
        }
        upto = upto.max(range.end);
    }
    if upto < chunk.end {
        gaps.push(upto..chunk.end);
    }
    gaps
}

// === impl Piece ===

impl Piece {
    fn range(&self) -> Range<u64> {
        self.at..self.at + self.bytes.len() as u64
    }
}
