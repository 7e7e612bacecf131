//! The message in which a sender tells the others of its part, and its form in bytes.

use std::collections::BTreeMap;

use anabranch_proto::manifest::{ChunkHash, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES};
use anabranch_proto::version::Root;

use crate::image::layout::Layout;

const MAGIC: [u8; 4] = *b"ABP1";

/// One sender's part of a version: hashes of the chunks that lie in it, and the bytes that the sender has of
/// chunks that do not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartInfo {
    pub(super) of: Whole,
    pub(super) hashes: BTreeMap<u32, ChunkHash>,
    pub(super) pieces: Vec<Piece>,
}

/// The version that a part is of, as far as it is known without the other parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Whole {
    pub epoch: u32,
    pub number: u64,
    pub chunk_bytes: u32,
    pub image_bytes: u64,
    pub tensors: u32,
    /// Hash of the image's header, which says all of the layout.
    pub layout: Root,
}

/// Bytes of one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Offset in the image.
    pub at: u64,
    pub bytes: Vec<u8>,
}

/// Why bytes are not what another sender tells.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartInfoError {
    /// The bytes are of another format.
    #[error("not what a sender tells of its part, or of another format (starts with {0:02x?})")]
    Magic(Vec<u8>),
    /// The bytes end early.
    #[error("ends after {0} bytes, in the middle of a part")]
    Short(usize),
    /// The bytes go on after the end.
    #[error("{0} bytes after the end")]
    Trailing(usize),
    /// The length of chunks is out of bounds.
    #[error("chunks of {0} bytes: must be {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}")]
    ChunkBytes(u32),
    /// A chunk is outside the image, or comes again.
    #[error("chunk {index} is outside the image of {image_bytes} bytes, or comes again")]
    Chunk { index: u32, image_bytes: u64 },
    /// A piece is outside its chunk.
    #[error("a piece of {len} bytes at {at} is not inside one chunk of an image of {image_bytes}")]
    Piece { at: u64, len: u64, image_bytes: u64 },
}

// === impl PartInfo ===

impl PartInfo {
    pub(super) fn new(
        (epoch, number): (u32, u64),
        layout: &Layout,
        chunk_bytes: u32,
        hashes: BTreeMap<u32, ChunkHash>,
    ) -> PartInfo {
        let (image_bytes, tensors) = (layout.image_bytes(), layout.tensors().len() as u32);
        let layout = Root::of(layout.header());
        let of = Whole { epoch, number, chunk_bytes, image_bytes, tensors, layout };
        PartInfo { of, hashes, pieces: Vec::new() }
    }

    pub(super) fn add_piece(&mut self, at: u64, bytes: Vec<u8>) {
        self.pieces.push(Piece { at, bytes });
    }

    pub(super) fn chunk_bytes(&self) -> u32 {
        self.of.chunk_bytes
    }

    /// Little endian: the magic, the whole, runs of hashes, pieces.
    pub fn encode(&self) -> Vec<u8> {
        let pieces: usize = self.pieces.iter().map(|piece| 12 + piece.bytes.len()).sum();
        let mut out = Vec::with_capacity(80 + self.hashes.len() * 36 + pieces);
        out.extend_from_slice(&MAGIC);
        let Whole { epoch, number, chunk_bytes, image_bytes, tensors, layout } = self.of;
        out.extend_from_slice(&epoch.to_le_bytes());
        out.extend_from_slice(&number.to_le_bytes());
        out.extend_from_slice(&chunk_bytes.to_le_bytes());
        out.extend_from_slice(&image_bytes.to_le_bytes());
        out.extend_from_slice(&tensors.to_le_bytes());
        out.extend_from_slice(&layout.0);
        out.extend_from_slice(&(self.hashes.len() as u32).to_le_bytes());
        for (index, hash) in &self.hashes {
            out.extend_from_slice(&index.to_le_bytes());
            out.extend_from_slice(hash);
        }
        out.extend_from_slice(&(self.pieces.len() as u32).to_le_bytes());
        for piece in &self.pieces {
            out.extend_from_slice(&piece.at.to_le_bytes());
            out.extend_from_slice(&(piece.bytes.len() as u32).to_le_bytes());
            out.extend_from_slice(&piece.bytes);
        }
        out
    }

    /// Accepts what [`PartInfo::encode`] gives.
    pub fn decode(bytes: &[u8]) -> Result<PartInfo, PartInfoError> {
        let mut r = Reader { rest: bytes, total: bytes.len() };
        let magic = r.take(4).map_err(|_| PartInfoError::Magic(bytes.to_vec()))?;
        if magic != MAGIC {
            return Err(PartInfoError::Magic(magic.to_vec()));
        }
        let of = r.whole()?;
        let (chunk_bytes, image_bytes) = (u64::from(of.chunk_bytes), of.image_bytes);
        let mut hashes = BTreeMap::new();
        // A claimed count allocates nothing by itself: each entry must be paid for in bytes.
        for _ in 0..r.u32()? {
            let (index, hash) = (r.u32()?, r.array()?);
            let outside = u64::from(index) * chunk_bytes >= image_bytes;
            if outside || hashes.insert(index, hash).is_some() {
                return Err(PartInfoError::Chunk { index, image_bytes });
            }
        }
        let mut pieces = Vec::new();
        for _ in 0..r.u32()? {
            let (at, len) = (r.u64()?, u64::from(r.u32()?));
            let end = at.checked_add(len).filter(|end| len > 0 && *end <= image_bytes);
            if end.is_none_or(|end| at / chunk_bytes != (end - 1) / chunk_bytes) {
                return Err(PartInfoError::Piece { at, len, image_bytes });
            }
            pieces.push(Piece { at, bytes: r.take(len as usize)?.to_vec() });
        }
        if !r.rest.is_empty() {
            return Err(PartInfoError::Trailing(r.rest.len()));
        }
        Ok(PartInfo { of, hashes, pieces })
    }
}

// === impl Reader ===

struct Reader<'a> {
    rest: &'a [u8],
    total: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], PartInfoError> {
        let split = self.rest.split_at_checked(n);
        let (head, rest) = split.ok_or(PartInfoError::Short(self.total))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PartInfoError> {
        Ok(self.take(N)?.try_into().expect("take gave N bytes"))
    }

    fn u32(&mut self) -> Result<u32, PartInfoError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, PartInfoError> {
        self.array().map(u64::from_le_bytes)
    }

    fn whole(&mut self) -> Result<Whole, PartInfoError> {
        let (epoch, number, chunk_bytes) = (self.u32()?, self.u64()?, self.u32()?);
        let (image_bytes, tensors, layout) = (self.u64()?, self.u32()?, Root(self.array()?));
        if !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&chunk_bytes) {
            return Err(PartInfoError::ChunkBytes(chunk_bytes));
        }
        Ok(Whole { epoch, number, chunk_bytes, image_bytes, tensors, layout })
    }
}
