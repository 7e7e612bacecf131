//! Messages and chunks over any stream of bytes: for the links and for who looks at a stream first.

use std::io::{self, ErrorKind, Read};
use std::ops::Range;

use anabranch_proto::manifest::ChunkHash;

use crate::link::wire::{HEADER_BYTES, Header, Message, WireError};
use crate::memory::map::SharedMap;

/// Read at once, then hashed while it is still in the cache. Shorter strides cost more in waits for the
/// socket than the cache gives back: 0.1 s of CPU for 2 GiB at 128 KiB.
pub(super) const STRIDE: usize = 512 << 10;

/// Why no message came.
pub(super) enum ReadError {
    Io(io::Error),
    Wire(WireError),
}

pub(super) fn read_message(stream: &mut impl Read) -> Result<Message, ReadError> {
    let mut head = [0; HEADER_BYTES];
    stream.read_exact(&mut head).map_err(ReadError::Io)?;
    let header = Header::decode(&head).map_err(ReadError::Wire)?;
    // `take` grows the body as bytes come: a claimed length allocates nothing by itself.
    let want = header.body_bytes();
    let mut body = Vec::with_capacity(want.min(64 << 10));
    stream.take(want as u64).read_to_end(&mut body).map_err(ReadError::Io)?;
    if body.len() < want {
        return Err(ReadError::Io(ErrorKind::UnexpectedEof.into()));
    }
    header.finish(&body).map_err(ReadError::Wire)
}

/// A chunk's bytes straight to their place, hashed stride by stride.
pub(super) fn read_chunk(
    stream: &mut impl Read,
    map: &SharedMap,
    range: Range<u64>,
) -> io::Result<ChunkHash> {
    map.write(range, |bytes| {
        let mut hasher = blake3::Hasher::new();
        for stride in bytes.chunks_mut(STRIDE) {
            stream.read_exact(stride)?;
            hasher.update(stride);
        }
        Ok(*hasher.finalize().as_bytes())
    })
}
