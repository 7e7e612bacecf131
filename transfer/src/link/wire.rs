//! The data plane's messages in bytes. Sans-IO: a fixed little-endian header of 24 bytes, a body, and
//! for a chunk the bulk right after it, which this module never touches.
//!
//! ```text
//! 0 magic "ABD1"   4 kind u8   5 blob u8   6 code u16   8 len u32   12 first u32   16 count u32   20 zero
//!
//! receiver -> source   Hi{proto, base, grant}  WantManifest{blob}  Want{blob, first, count}  WatchHave{blob}
//! source -> receiver   Offer{proto, grant}  (the source dialled; then as above)
//!                      Welcome{complete, delta}  Manifest{blob}  Chunk{blob, index}  Have{ranges}
//!                      Fail{code, text}
//! over rdma also       Remote{at, key, address} after the first Welcome and after each Chunk, and
//!                      from the receiver Taken{index} once it has read the chunk
//! within one host      WantFile{blob} -> File{blob, len}: the descriptor, beside the stream's bytes
//! ```
//! A stream carries one `Hi` per version and may be used for the next version with another `Hi`.
//! `Want`s may be sent ahead of answers, which come in the same order.

use std::ops::Range;

use anabranch_proto::grant::MAX_GRANT_BYTES;
use anabranch_proto::manifest::{MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES};
use anabranch_proto::version::Root;

pub use crate::image::blob::BlobId;

/// Length of a header in bytes.
pub const HEADER_BYTES: usize = 24;

/// First wire of the data plane.
pub const PROTO: u16 = 1;

/// Chunks that a receiver may ask for and not have received, per stream.
pub const MAX_WANTED: u32 = 64;

const MAGIC: [u8; 4] = *b"ABD1";
const MAX_TEXT_BYTES: usize = 2 << 10;
const MAX_HAVE_RANGES: usize = 16 << 10;
const MAX_REMOTE_ADDRESS_BYTES: usize = 512;

/// A message of the data plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// First word of a receiver: binds the stream to the version that the grant names.
    Hi {
        /// Protocol of the data plane, [`PROTO`].
        proto: u16,
        /// Root of the version whose full image the receiver holds; zero for none.
        base: Root,
        /// The manager's permission to read.
        grant: Vec<u8>,
    },
    /// First word of a source that dialled: ask me on this stream.
    Offer {
        /// Protocol of the data plane, [`PROTO`].
        proto: u16,
        /// The manager's permission to be asked here.
        grant: Vec<u8>,
    },
    /// Answer to `Hi`: the grant is good.
    Welcome {
        /// True if all chunks of the image are here.
        complete: bool,
        /// True if all chunks of the delta are here.
        delta_complete: bool,
        /// Length of a delta from the base in bytes, 0 for none.
        delta_bytes: u64,
    },
    /// Asks for the manifest of a blob.
    WantManifest {
        /// The blob.
        blob: BlobId,
    },
    /// Answer to `WantManifest`.
    Manifest {
        /// The blob.
        blob: BlobId,
        /// The manifest as it is hashed.
        bytes: Vec<u8>,
    },
    /// Asks for a run of chunks, at most [`MAX_WANTED`].
    Want {
        /// The blob.
        blob: BlobId,
        /// Index of the first chunk.
        first: u32,
        /// Number of chunks.
        count: u32,
    },
    /// Asks the source to send `Have` whenever it gets chunks; the stream carries nothing else from then on.
    WatchHave {
        /// The blob.
        blob: BlobId,
    },
    /// Chunks that the source got since the `Have` before; none if it only tells that it lives.
    Have {
        /// Runs of chunks, in ascending order.
        ranges: Vec<Range<u32>>,
    },
    /// One chunk: `len` bytes of bulk follow the header.
    Chunk {
        /// The blob.
        blob: BlobId,
        /// Index of the chunk.
        index: u32,
        /// Length of the bulk in bytes.
        len: u32,
    },
    /// Asks for the memory of the whole blob, of a process of the same host.
    WantFile {
        /// The blob.
        blob: BlobId,
    },
    /// Answer to `WantFile`: the descriptor comes with the header.
    File {
        /// The blob.
        blob: BlobId,
        /// Length of the blob in bytes.
        len: u64,
    },
    /// A refusal. The stream ends, or goes on with other requests.
    Fail {
        /// The kind of reason.
        code: FailCode,
        /// The reason, for people.
        text: String,
    },
    /// Place of the bulk in the source's memory, for reads over a fabric.
    Remote {
        /// Address of the first byte, as the fabric counts.
        at: u64,
        /// Key of the registered memory.
        key: u64,
        /// Address of the source on the fabric; empty if it was told on this stream before.
        address: Vec<u8>,
    },
    /// The chunk was read; the source may forget that it announced it.
    Taken {
        /// Index of the chunk.
        index: u32,
    },
}

/// Why a source refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum FailCode {
    /// Forged, of another job, for another version, or expired.
    Grant = 1,
    /// This holder has not got the version, or not any more.
    UnknownVersion = 2,
    /// The memory was given to a newer version.
    Revoked = 3,
    /// The chunk did not arrive here in time.
    NotHeld = 4,
    /// The peer broke the protocol.
    Protocol = 5,
    /// Too many streams.
    Busy = 6,
    /// This holder has not begun with the version.
    NotYet = 7,
}

/// A message's header: its kind, and how many bytes of body to read before `finish`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    kind: Kind,
    blob: BlobId,
    code: u16,
    len: u32,
    first: u32,
    count: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Hi = 1,
    Welcome = 2,
    WantManifest = 3,
    Manifest = 4,
    Want = 5,
    WatchHave = 6,
    Have = 7,
    Chunk = 8,
    Fail = 9,
    Offer = 10,
    Remote = 11,
    Taken = 12,
    WantFile = 13,
    File = 14,
}

/// Why bytes are no message.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The stream is of another protocol.
    #[error("not an Anabranch data stream (starts with {0:02x?})")]
    Magic([u8; 4]),
    /// A kind, blob or code is unknown.
    #[error("unknown {what} {code}")]
    Code { what: &'static str, code: u32 },
    /// The body is above the bound of its kind.
    #[error("a {kind} of {len} bytes, more than {max}")]
    TooLong { kind: &'static str, len: usize, max: usize },
    /// The body does not fit its kind.
    #[error("malformed {0}")]
    Malformed(&'static str),
}

// === impl Message ===

impl Message {
    /// Appends header and body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + HEADER_BYTES, 0);
        let (mut blob, mut code, mut first, mut count) = (BlobId::Image, 0, 0, 0);
        let kind = match self {
            Message::Hi { proto, base, grant } => {
                code = *proto;
                out.extend_from_slice(&base.0);
                out.extend_from_slice(grant);
                Kind::Hi
            }
            Message::Offer { proto, grant } => {
                code = *proto;
                out.extend_from_slice(grant);
                Kind::Offer
            }
            Message::Welcome { complete, delta_complete, delta_bytes } => {
                code = u16::from(*complete) | u16::from(*delta_complete) << 1;
                out.extend_from_slice(&delta_bytes.to_le_bytes());
                Kind::Welcome
            }
            Message::WantManifest { blob: b } => {
                blob = *b;
                Kind::WantManifest
            }
            Message::Manifest { blob: b, bytes } => {
                blob = *b;
                out.extend_from_slice(bytes);
                Kind::Manifest
            }
            Message::Want { blob: b, first: f, count: c } => {
                (blob, first, count) = (*b, *f, *c);
                Kind::Want
            }
            Message::WatchHave { blob: b } => {
                blob = *b;
                Kind::WatchHave
            }
            Message::Have { ranges } => {
                for r in ranges {
                    out.extend_from_slice(&r.start.to_le_bytes());
                    out.extend_from_slice(&r.end.to_le_bytes());
                }
                Kind::Have
            }
            Message::Chunk { blob: b, index, len } => {
                (blob, first, count) = (*b, *index, *len);
                Kind::Chunk
            }
            Message::WantFile { blob: b } => {
                blob = *b;
                Kind::WantFile
            }
            Message::File { blob: b, len } => {
                blob = *b;
                out.extend_from_slice(&len.to_le_bytes());
                Kind::File
            }
            Message::Fail { code: c, text } => {
                code = *c as u16;
                out.extend_from_slice(clip(text).as_bytes());
                Kind::Fail
            }
            Message::Remote { at, key, address } => {
                out.extend_from_slice(&at.to_le_bytes());
                out.extend_from_slice(&key.to_le_bytes());
                out.extend_from_slice(address);
                Kind::Remote
            }
            Message::Taken { index } => {
                first = *index;
                Kind::Taken
            }
        };
        let len = (out.len() - start - HEADER_BYTES) as u32;
        let head = &mut out[start..start + HEADER_BYTES];
        head[..4].copy_from_slice(&MAGIC);
        head[4] = kind as u8;
        head[5] = blob as u8;
        head[6..8].copy_from_slice(&code.to_le_bytes());
        head[8..12].copy_from_slice(&len.to_le_bytes());
        head[12..16].copy_from_slice(&first.to_le_bytes());
        head[16..20].copy_from_slice(&count.to_le_bytes());
    }

    /// Header and body.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + 64);
        self.encode(&mut out);
        out
    }

    /// `Have` messages for any set: one is bounded, so large sets take several.
    pub fn have(ranges: &[Range<u32>]) -> Vec<Message> {
        ranges.chunks(MAX_HAVE_RANGES).map(|r| Message::Have { ranges: r.to_vec() }).collect()
    }
}

// === impl Header ===

impl Header {
    /// Reads a header. Fails for another protocol, an unknown kind, or a body above the bound of its kind.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        if bytes[..4] != MAGIC {
            return Err(WireError::Magic(bytes[..4].try_into().expect("4 bytes")));
        }
        let kind = Kind::from_code(bytes[4])?;
        let blob = match bytes[5] {
            0 => BlobId::Image,
            1 => BlobId::Delta,
            code => return Err(WireError::Code { what: "blob", code: code.into() }),
        };
        let code = u16::from_le_bytes(bytes[6..8].try_into().expect("2 bytes"));
        let header =
            Header { kind, blob, code, len: u32_at(8), first: u32_at(12), count: u32_at(16) };
        let (max, len) = (kind.max_body(), header.len as usize);
        if len > max {
            return Err(WireError::TooLong { kind: kind.name(), len, max });
        }
        if kind == Kind::Chunk && header.count > MAX_CHUNK_BYTES {
            let (len, max) = (header.count as usize, MAX_CHUNK_BYTES as usize);
            return Err(WireError::TooLong { kind: kind.name(), len, max });
        }
        Ok(header)
    }

    /// Bytes of body to read; bounded by the kind.
    pub fn body_bytes(&self) -> usize {
        self.len as usize
    }

    /// The message, from `body_bytes` bytes of body.
    pub fn finish(&self, body: &[u8]) -> Result<Message, WireError> {
        let malformed = || WireError::Malformed(self.kind.name());
        let blob = self.blob;
        Ok(match self.kind {
            Kind::Hi => {
                let (base, grant) = body.split_at_checked(32).ok_or_else(malformed)?;
                let base = Root(base.try_into().expect("split at 32"));
                Message::Hi { proto: self.code, base, grant: grant.to_vec() }
            }
            Kind::Offer => Message::Offer { proto: self.code, grant: body.to_vec() },
            Kind::Welcome => {
                let delta_bytes = u64::from_le_bytes(body.try_into().map_err(|_| malformed())?);
                let [complete, delta_complete] = [self.code & 1 == 1, self.code & 2 == 2];
                Message::Welcome { complete, delta_complete, delta_bytes }
            }
            Kind::WantManifest => Message::WantManifest { blob },
            Kind::Manifest => Message::Manifest { blob, bytes: body.to_vec() },
            Kind::Want if self.count > 0 && self.first.checked_add(self.count).is_some() => {
                Message::Want { blob, first: self.first, count: self.count }
            }
            Kind::Want => return Err(malformed()),
            Kind::WatchHave => Message::WatchHave { blob },
            Kind::Have => Message::Have { ranges: ranges(body).ok_or_else(malformed)? },
            Kind::WantFile => Message::WantFile { blob },
            Kind::File => {
                let len = u64::from_le_bytes(body.try_into().map_err(|_| malformed())?);
                Message::File { blob, len }
            }
            Kind::Chunk => Message::Chunk { blob, index: self.first, len: self.count },
            Kind::Fail => {
                let code = FailCode::from_code(self.code)?;
                Message::Fail { code, text: String::from_utf8_lossy(body).into_owned() }
            }
            Kind::Remote => {
                let (numbers, address) = body.split_at_checked(16).ok_or_else(malformed)?;
                let u64_at = |at: usize| {
                    u64::from_le_bytes(numbers[at..at + 8].try_into().expect("8 of 16 bytes"))
                };
                Message::Remote { at: u64_at(0), key: u64_at(8), address: address.to_vec() }
            }
            Kind::Taken => Message::Taken { index: self.first },
        })
    }
}

fn ranges(body: &[u8]) -> Option<Vec<Range<u32>>> {
    if !body.len().is_multiple_of(8) {
        return None;
    }
    let parse = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("4 bytes"));
    let one = |b: &[u8]| Some(parse(&b[..4])..parse(&b[4..])).filter(|r| r.start < r.end);
    body.chunks_exact(8).map(one).collect()
}

fn clip(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

// === impl Kind ===

impl Kind {
    fn from_code(code: u8) -> Result<Kind, WireError> {
        use Kind::*;
        let known = [
            Hi,
            Welcome,
            WantManifest,
            Manifest,
            Want,
            WatchHave,
            Have,
            Chunk,
            Fail,
            Offer,
            Remote,
            Taken,
            WantFile,
            File,
        ];
        let unknown = WireError::Code { what: "message", code: code.into() };
        known.into_iter().find(|k| *k as u8 == code).ok_or(unknown)
    }

    fn max_body(self) -> usize {
        match self {
            Kind::Hi => 32 + MAX_GRANT_BYTES,
            Kind::Offer => MAX_GRANT_BYTES,
            Kind::Welcome | Kind::File => 8,
            Kind::Manifest => MAX_MANIFEST_BYTES,
            Kind::Have => MAX_HAVE_RANGES * 8,
            Kind::Fail => MAX_TEXT_BYTES,
            Kind::Remote => 16 + MAX_REMOTE_ADDRESS_BYTES,
            Kind::WantManifest | Kind::Want | Kind::WatchHave | Kind::Chunk => 0,
            Kind::Taken | Kind::WantFile => 0,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Hi => "Hi",
            Kind::Welcome => "Welcome",
            Kind::WantManifest => "WantManifest",
            Kind::Manifest => "Manifest",
            Kind::Want => "Want",
            Kind::WatchHave => "WatchHave",
            Kind::Have => "Have",
            Kind::Chunk => "Chunk",
            Kind::Fail => "Fail",
            Kind::Offer => "Offer",
            Kind::Remote => "Remote",
            Kind::Taken => "Taken",
            Kind::WantFile => "WantFile",
            Kind::File => "File",
        }
    }
}

// === impl FailCode ===

impl FailCode {
    fn from_code(code: u16) -> Result<FailCode, WireError> {
        use FailCode::*;
        let known = [Grant, UnknownVersion, Revoked, NotHeld, Protocol, Busy, NotYet];
        let unknown = WireError::Code { what: "failure", code: code.into() };
        known.into_iter().find(|c| *c as u16 == code).ok_or(unknown)
    }
}

#[cfg(test)]
mod tests;
