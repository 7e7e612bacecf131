//! Manifests: the list of what a version consists of, namely tensors at offsets of one image, and the hash
//! of every chunk of that image. Owns the form in bytes, its checks and its root; knows neither files nor
//! sockets.
//!
//! The image of a full version *is* a safetensors file, header included, so a verified image needs no
//! further step before an engine reads it. The name of a version is the root of its full manifest, however
//! the bytes travelled: a delta has a manifest of its own (for its blob), which names the base it applies
//! to and the full version that it must give.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use crate::version::Root;

/// Default chunk size, in bytes: small enough that a chain of 64 relays fills in 2% of 14 GB.
pub const DEFAULT_CHUNK_BYTES: u32 = 1 << 20;
/// Smallest chunk size, in bytes.
pub const MIN_CHUNK_BYTES: u32 = 4 << 10;
/// Largest chunk size, in bytes.
pub const MAX_CHUNK_BYTES: u32 = 16 << 20;

/// Most bytes of an encoded manifest. One of 4 TB in chunks of 1 MiB has 128 MB.
pub const MAX_MANIFEST_BYTES: usize = 256 << 20;

const MAGIC: [u8; 4] = *b"ABM1";
const MAX_NAME_BYTES: usize = 1024;
const MAX_DIMENSIONS: usize = 8;

/// BLAKE3 hash of a chunk's bytes.
pub type ChunkHash = [u8; 32];

/// Description of one image, which is cut into chunks of `chunk_bytes` (the last may be shorter).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Meaning of the image's bytes.
    pub kind: Kind,
    /// Chunk size, from [`MIN_CHUNK_BYTES`] to [`MAX_CHUNK_BYTES`].
    pub chunk_bytes: u32,
    /// Size of the image, in bytes.
    pub image_bytes: u64,
    /// Tensors in the order of their offsets; they do not overlap.
    pub tensors: Vec<Tensor>,
    /// Hash of every chunk, in the order of the image.
    pub chunk_hashes: Vec<ChunkHash>,
}

/// Meaning of an image's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Kind {
    /// The image is a safetensors file with all weights.
    Full,
    /// The image is a delta blob (no tensors).
    Delta {
        /// Full version that the blob is applied to.
        base: Root,
        /// Full version that comes of it.
        result: Root,
    },
    /// The tensors are an adapter.
    Adapter {
        /// Full version that the adapter belongs to.
        base: Root,
    },
}

/// One tensor of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tensor {
    /// Name as in the checkpoint, unique in the manifest.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Sizes of the dimensions, outermost first; at most 8.
    pub shape: Vec<u64>,
    /// First byte, from the start of the image.
    pub offset: u64,
    /// Bytes: the product of `shape` and the element's size.
    pub len: u64,
}

/// Element types of safetensors files, with the codes that stand for them in a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[repr(u8)]
#[allow(missing_docs, reason = "each name is the type's own")]
pub enum DType {
    Bool = 1,
    U8 = 2,
    I8 = 3,
    F8E4M3 = 4,
    F8E5M2 = 5,
    F8E8M0 = 6,
    I16 = 7,
    U16 = 8,
    F16 = 9,
    BF16 = 10,
    I32 = 11,
    U32 = 12,
    F32 = 13,
    I64 = 14,
    U64 = 15,
    F64 = 16,
}

/// Reason why bytes are not a manifest, or a manifest contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what each one means, and name the fields")]
pub enum ManifestError {
    #[error("not a manifest, or one of another format (starts with {0:02x?})")]
    Magic(Vec<u8>),
    #[error("ends after {have} bytes, in the middle of {what}")]
    Short { what: &'static str, have: usize },
    #[error("{0} bytes after the end")]
    Trailing(usize),
    #[error("unknown {what} code {code}")]
    Code { what: &'static str, code: u8 },
    #[error("chunks of {0} bytes: must be {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}")]
    ChunkBytes(u32),
    #[error(
        "{have} chunk hashes for {image_bytes} bytes in chunks of {chunk_bytes}: expected {want}"
    )]
    ChunkCount { have: u64, want: u64, image_bytes: u64, chunk_bytes: u32 },
    #[error("tensor {index} has a name of {len} bytes, or one that is not UTF-8")]
    Name { index: usize, len: usize },
    #[error("tensor `{0}` appears twice")]
    Duplicate(String),
    #[error("tensor `{name}` has {dimensions} dimensions, more than {MAX_DIMENSIONS}")]
    Dimensions { name: String, dimensions: usize },
    #[error("tensor `{name}`: shape {shape:?} of {dtype} does not give {len} bytes")]
    Length { name: String, shape: Vec<u64>, dtype: DType, len: u64 },
    #[error("tensor `{name}` at {offset} (+{len}) is outside the image of {image_bytes} bytes")]
    Outside { name: String, offset: u64, len: u64, image_bytes: u64 },
    #[error("tensor `{name}` at {offset} overlaps `{before}`, or is out of order")]
    Overlap { name: String, before: String, offset: u64 },
    #[error("a delta's manifest names no tensors, this one names {0}")]
    DeltaTensors(usize),
}

// === impl Manifest ===

impl Manifest {
    /// Number of chunks.
    pub fn chunk_count(&self) -> u32 {
        self.chunk_hashes.len() as u32
    }

    /// Bytes of chunk `index`, from the start of the image.
    pub fn chunk_range(&self, index: u32) -> std::ops::Range<u64> {
        chunk_range(self.chunk_bytes, self.image_bytes, index)
    }

    /// Root of the manifest: the name of every byte of the image.
    pub fn root(&self) -> Root {
        Root::of(&self.encode())
    }

    /// Bytes of the manifest. Equal manifests have equal bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out =
            Vec::with_capacity(64 + self.tensors.len() * 96 + self.chunk_hashes.len() * 32);
        out.extend_from_slice(&MAGIC);
        match &self.kind {
            Kind::Full => out.push(1),
            Kind::Delta { base, result } => {
                out.push(2);
                out.extend_from_slice(&base.0);
                out.extend_from_slice(&result.0);
            }
            Kind::Adapter { base } => {
                out.push(3);
                out.extend_from_slice(&base.0);
            }
        }
        out.extend_from_slice(&self.chunk_bytes.to_le_bytes());
        out.extend_from_slice(&self.image_bytes.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u32).to_le_bytes());
        for tensor in &self.tensors {
            tensor.encode(&mut out);
        }
        out.extend_from_slice(&self.chunk_count().to_le_bytes());
        for hash in &self.chunk_hashes {
            out.extend_from_slice(hash);
        }
        out
    }

    /// Reads a manifest. Accepts exactly what [`Manifest::encode`] gives for one that passes
    /// [`Manifest::check`].
    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let mut r = Reader { rest: bytes, total: bytes.len() };
        let magic = r.take(4, "the magic").map_err(|_| ManifestError::Magic(bytes.to_vec()))?;
        if magic != MAGIC {
            return Err(ManifestError::Magic(magic.to_vec()));
        }
        let kind = match r.u8("the kind")? {
            1 => Kind::Full,
            2 => Kind::Delta { base: r.root("the base")?, result: r.root("the result")? },
            3 => Kind::Adapter { base: r.root("the base")? },
            code => return Err(ManifestError::Code { what: "kind", code }),
        };
        let chunk_bytes = r.u32("the chunk size")?;
        let image_bytes = r.u64("the image size")?;
        let count = r.u32("the number of tensors")? as usize;
        // A claimed count allocates nothing by itself: each entry must be paid for in bytes.
        let mut tensors = Vec::new();
        for index in 0..count {
            tensors.push(Tensor::decode(&mut r, index)?);
        }
        let chunks = r.u32("the number of chunks")? as usize;
        let hashes = r.take(chunks.saturating_mul(32), "the chunk hashes")?;
        let chunk_hashes =
            hashes.chunks_exact(32).map(|h| h.try_into().expect("chunks of 32")).collect();
        if !r.rest.is_empty() {
            return Err(ManifestError::Trailing(r.rest.len()));
        }
        let manifest = Manifest { kind, chunk_bytes, image_bytes, tensors, chunk_hashes };
        manifest.check()?;
        Ok(manifest)
    }

    /// Refuses tensors that overlap, are out of order or lie outside the image, and chunks that do not cover
    /// it.
    pub fn check(&self) -> Result<(), ManifestError> {
        if !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&self.chunk_bytes) {
            return Err(ManifestError::ChunkBytes(self.chunk_bytes));
        }
        let (want, have) =
            (self.image_bytes.div_ceil(self.chunk_bytes.into()), self.chunk_hashes.len() as u64);
        if want != have || want > u64::from(u32::MAX) {
            let (image_bytes, chunk_bytes) = (self.image_bytes, self.chunk_bytes);
            return Err(ManifestError::ChunkCount { have, want, image_bytes, chunk_bytes });
        }
        if matches!(self.kind, Kind::Delta { .. }) && !self.tensors.is_empty() {
            return Err(ManifestError::DeltaTensors(self.tensors.len()));
        }
        check_tensors(&self.tensors, self.image_bytes)
    }
}

/// Checks that tensors have names of their own, sizes that follow from their shapes, and places in an image of
/// `image_bytes` bytes that do not overlap. Publishers check what receivers will.
pub fn check_tensors(tensors: &[Tensor], image_bytes: u64) -> Result<(), ManifestError> {
    let mut names = BTreeSet::new();
    let mut before: Option<&Tensor> = None;
    for (index, t) in tensors.iter().enumerate() {
        let name = || t.name.clone();
        if t.name.is_empty() || t.name.len() > MAX_NAME_BYTES {
            return Err(ManifestError::Name { index, len: t.name.len() });
        }
        if !names.insert(t.name.as_str()) {
            return Err(ManifestError::Duplicate(name()));
        }
        if t.shape.len() > MAX_DIMENSIONS {
            let dimensions = t.shape.len();
            return Err(ManifestError::Dimensions { name: name(), dimensions });
        }
        if tensor_bytes(t.dtype, &t.shape) != Some(t.len) {
            let (shape, dtype, len) = (t.shape.clone(), t.dtype, t.len);
            return Err(ManifestError::Length { name: name(), shape, dtype, len });
        }
        let (offset, len) = (t.offset, t.len);
        if offset.checked_add(len).is_none_or(|end| end > image_bytes) {
            return Err(ManifestError::Outside { name: name(), offset, len, image_bytes });
        }
        if let Some(b) = before.filter(|b| t.offset < b.offset + b.len) {
            return Err(ManifestError::Overlap { name: name(), before: b.name.clone(), offset });
        }
        before = Some(t);
    }
    Ok(())
}

/// Bytes of chunk `index` in an image of `image_bytes`, from the image's start; empty beyond its end.
pub fn chunk_range(chunk_bytes: u32, image_bytes: u64, index: u32) -> std::ops::Range<u64> {
    let start = u64::from(index) * u64::from(chunk_bytes);
    start.min(image_bytes)..(start + u64::from(chunk_bytes)).min(image_bytes)
}

/// Size of a tensor in bytes; `None` if the product overflows.
pub fn tensor_bytes(dtype: DType, shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(dtype.bytes() as u64, |bytes, &d| bytes.checked_mul(d))
}

// === impl Tensor ===

impl Tensor {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.name.len() as u16).to_le_bytes());
        out.extend_from_slice(self.name.as_bytes());
        out.push(self.dtype as u8);
        out.push(self.shape.len() as u8);
        for d in &self.shape {
            out.extend_from_slice(&d.to_le_bytes());
        }
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.len.to_le_bytes());
    }

    fn decode(r: &mut Reader<'_>, index: usize) -> Result<Tensor, ManifestError> {
        let len = usize::from(r.u16("a name's length")?);
        let bad_name = ManifestError::Name { index, len };
        let name = r.take(len, "a name")?;
        let name = std::str::from_utf8(name).map_err(|_| bad_name)?.to_owned();
        let code = r.u8("a dtype")?;
        let dtype = DType::from_code(code).ok_or(ManifestError::Code { what: "dtype", code })?;
        let dimensions = usize::from(r.u8("a rank")?);
        if dimensions > MAX_DIMENSIONS {
            return Err(ManifestError::Dimensions { name, dimensions });
        }
        let shape = (0..dimensions).map(|_| r.u64("a shape")).collect::<Result<_, _>>()?;
        Ok(Tensor { name, dtype, shape, offset: r.u64("an offset")?, len: r.u64("a length")? })
    }
}

// === impl DType ===

impl DType {
    /// All element types, in the order of their codes.
    pub const ALL: [DType; 16] = [
        DType::Bool,
        DType::U8,
        DType::I8,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::F8E8M0,
        DType::I16,
        DType::U16,
        DType::F16,
        DType::BF16,
        DType::I32,
        DType::U32,
        DType::F32,
        DType::I64,
        DType::U64,
        DType::F64,
    ];

    /// Size of one element, in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 => 8,
        }
    }

    /// Name in a safetensors header, such as `BF16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E8M0 => "F8_E8M0",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::I64 => "I64",
            Self::U64 => "U64",
            Self::F64 => "F64",
        }
    }

    /// Element type with this name in a safetensors header.
    pub fn from_name(name: &str) -> Option<DType> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }

    /// Element type with this code in a manifest.
    pub fn from_code(code: u8) -> Option<DType> {
        Self::ALL.into_iter().find(|d| *d as u8 == code)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

// === impl Reader ===

struct Reader<'a> {
    rest: &'a [u8],
    total: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], ManifestError> {
        let (head, rest) =
            self.rest.split_at_checked(n).ok_or(ManifestError::Short { what, have: self.total })?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], ManifestError> {
        Ok(self.take(N, what)?.try_into().expect("take gave N bytes"))
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, ManifestError> {
        Ok(self.array::<1>(what)?[0])
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, ManifestError> {
        self.array(what).map(u16::from_le_bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, ManifestError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, ManifestError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn root(&mut self, what: &'static str) -> Result<Root, ManifestError> {
        self.array(what).map(Root)
    }
}

#[cfg(test)]
mod tests;
