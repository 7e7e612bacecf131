//! A link over any stream of bytes: what tcp, shm, tls and quic have in common. Where a stream is encrypted in
//! this process, chunks are read from the file stride by stride, since the kernel cannot send them by itself.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anabranch_proto::manifest::ChunkHash;

use super::frame::{self, ReadError};
use super::{Closer, Link, LinkError};
use crate::link::wire::Message;
use crate::memory::map::SharedMap;

/// Read from the file at once, then encrypted while it is still in the cache.
const SEND_STRIDE: u64 = 64 << 10;

/// A stream whose reads and writes fail with `TimedOut` or `WouldBlock` when no byte moved for the
/// patience that was set.
pub(crate) trait ByteStream: Read + Write + Send {
    fn peer(&self) -> String;

    fn closer(&self) -> io::Result<Closer>;

    fn set_patience(&mut self, patience: Duration) -> io::Result<()>;

    /// True if nothing can be read and the peer is there.
    fn is_idle(&mut self) -> bool;

    /// Sends the bytes in `out`, then these bytes of the file. `out` may be used as the buffer for them.
    fn send_range(&mut self, out: &mut Vec<u8>, file: &File, range: Range<u64>) -> io::Result<()> {
        send_strides(self, out, file, range)
    }

    /// The bytes and, with the first of them, the file itself: for streams within one host.
    fn send_file(&mut self, _bytes: &[u8], _file: &File) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    /// One byte, with the file that came along.
    fn read_file(&mut self, byte: &mut [u8; 1]) -> io::Result<Option<File>> {
        self.read_exact(byte).map(|()| None)
    }
}

pub(crate) struct StreamLink<S> {
    stream: S,
    patience: Duration,
    out: Vec<u8>,
}

/// The bytes of the range, the first of them right behind what stands in `out`.
fn send_strides(
    stream: &mut (impl ByteStream + ?Sized),
    out: &mut Vec<u8>,
    file: &File,
    range: Range<u64>,
) -> io::Result<()> {
    let (mut at, mut filled) = (range.start, out.len());
    loop {
        let stride = (range.end - at).min(SEND_STRIDE);
        let end = filled + stride as usize;
        out.resize(out.len().max(end), 0);
        // A file that ends before the range was cut while we held it: an unexpected end.
        file.read_exact_at(&mut out[filled..end], at)?;
        stream.write_all(&out[..end])?;
        (at, filled) = (at + stride, 0);
        if at == range.end {
            return Ok(());
        }
    }
}

/// The bytes of the range by the kernel alone, without a copy through this process.
pub(super) fn sendfile(to: impl AsFd, file: &File, range: Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let want = (range.end - at) as usize;
        match rustix::fs::sendfile(&to, file, Some(&mut at), want) {
            Ok(0) => return Err(io::Error::other("the file was cut while it was sent")),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

// === impl StreamLink ===

impl<S: ByteStream> StreamLink<S> {
    pub(super) fn over(stream: S) -> StreamLink<S> {
        StreamLink { stream, patience: Duration::MAX, out: Vec::new() }
    }

    fn failed(&self, error: io::Error) -> LinkError {
        LinkError::of(error, self.patience)
    }

    fn refused(&self, error: ReadError) -> LinkError {
        match error {
            ReadError::Io(error) => self.failed(error),
            ReadError::Wire(error) => error.into(),
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
        frame::read_message(&mut self.stream).map_err(|e| self.refused(e))
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
        let sent = self.stream.send_range(&mut self.out, file, range);
        sent.map_err(|e| self.failed(e))
    }

    fn send_file(&mut self, header: &Message, file: &File) -> Result<(), LinkError> {
        self.stream.send_file(&header.to_bytes(), file).map_err(|e| self.failed(e))
    }

    fn receive_file(&mut self) -> Result<(Message, Option<File>), LinkError> {
        let mut first = [0; 1];
        let file = self.stream.read_file(&mut first).map_err(|e| self.failed(e))?;
        let message = frame::read_message(&mut first.chain(&mut self.stream));
        Ok((message.map_err(|e| self.refused(e))?, file))
    }

    fn is_idle(&mut self) -> bool {
        self.stream.is_idle()
    }
}
