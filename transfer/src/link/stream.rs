//! A link over any stream of bytes that is encrypted in this process: what tls and quic have in common.
//! Chunks are read from the file stride by stride, since the kernel cannot send them by itself.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anabranch_proto::manifest::ChunkHash;

use super::frame::{self, ReadError};
use super::{Closer, Link, LinkError};
use crate::shm::SharedMap;
use crate::wire::Message;

/// Read from the file at once, then encrypted while it is still in the cache.
const SEND_STRIDE: u64 = 64 << 10;

/// A stream whose reads and writes fail with `TimedOut` or `WouldBlock` when no byte moved for the
/// patience that was set.
pub(super) trait ByteStream: Read + Write + Send {
    fn peer(&self) -> String;

    fn closer(&self) -> io::Result<Closer>;

    fn set_patience(&mut self, patience: Duration) -> io::Result<()>;

    /// True if nothing can be read and the peer is there.
    fn is_idle(&mut self) -> bool;
}

pub(super) struct StreamLink<S> {
    stream: S,
    patience: Duration,
    out: Vec<u8>,
}

// === impl StreamLink ===

impl<S: ByteStream> StreamLink<S> {
    pub(super) fn over(stream: S) -> StreamLink<S> {
        StreamLink { stream, patience: Duration::MAX, out: Vec::new() }
    }

    fn failed(&self, error: io::Error) -> LinkError {
        LinkError::of(error, self.patience)
    }

    /// The bytes of the range, the first of them right behind the header that stands in `out`.
    fn send_strides(&mut self, file: &File, range: Range<u64>) -> io::Result<()> {
        let (mut at, mut filled) = (range.start, self.out.len());
        loop {
            let stride = (range.end - at).min(SEND_STRIDE);
            let end = filled + stride as usize;
            self.out.resize(self.out.len().max(end), 0);
            // A file that ends before the range was cut while we held it: an unexpected end.
            file.read_exact_at(&mut self.out[filled..end], at)?;
            self.stream.write_all(&self.out[..end])?;
            (at, filled) = (at + stride, 0);
            if at == range.end {
                return Ok(());
            }
        }
    }
}

impl<S: ByteStream> Link for StreamLink<S> {
    fn peer(&self) -> String {
        self.stream.peer()
    }

    fn closer(&self) -> Result<Closer, LinkError> {
        self.stream.closer().map_err(LinkError::Broken)
    }

    fn set_patience(&mut self, patience: Duration) -> Result<(), LinkError> {
        self.patience = patience;
        self.stream.set_patience(patience).map_err(LinkError::Broken)
    }

    fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.out.clear();
        message.encode(&mut self.out);
        self.stream.write_all(&self.out).map_err(|e| self.failed(e))
    }

    fn receive(&mut self) -> Result<Message, LinkError> {
        frame::read_message(&mut self.stream).map_err(|error| match error {
            ReadError::Io(error) => self.failed(error),
            ReadError::Wire(error) => error.into(),
        })
    }

    fn receive_chunk(
        &mut self,
        map: &SharedMap,
        range: Range<u64>,
    ) -> Result<ChunkHash, LinkError> {
        frame::read_chunk(&mut self.stream, map, range).map_err(|e| self.failed(e))
    }

    fn send_chunk(
        &mut self,
        header: &Message,
        file: &File,
        range: Range<u64>,
    ) -> Result<(), LinkError> {
        self.out.clear();
        header.encode(&mut self.out);
        self.send_strides(file, range).map_err(|e| self.failed(e))
    }

    fn is_idle(&mut self) -> bool {
        self.stream.is_idle()
    }
}
