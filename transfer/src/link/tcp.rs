//! One TCP stream of the data plane, blocking, with a deadline on every step. Owns the mechanics
//! (timeouts, `sendfile`, receiving into shared memory while hashing); decides nothing.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::time::Duration;

use anabranch_proto::manifest::ChunkHash;

use crate::shm::SharedMap;
use crate::wire::{HEADER_BYTES, Header, Message, WireError};

/// Read at once, then hashed while it is still in the cache.
const HASH_STRIDE: usize = 128 << 10;

pub(crate) struct TcpLink {
    stream: TcpStream,
    peer: SocketAddr,
    out: Vec<u8>,
}

/// What can go wrong on a stream, from this side's view.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("cannot resolve `{addr}`: {error}")]
    Resolve { addr: String, error: io::Error },
    #[error("cannot connect to {addr} within {within:?}: {error}")]
    Connect { addr: String, within: Duration, error: io::Error },
    #[error("no byte moved for {0:?}")]
    Stalled(Duration),
    #[error("the peer closed the stream")]
    Closed,
    #[error("the stream broke: {0}")]
    Broken(io::Error),
    #[error("the peer broke the protocol: {0}")]
    Wire(#[from] WireError),
}

// === impl TcpLink ===

impl TcpLink {
    pub(crate) fn connect(addr: &str, within: Duration) -> Result<TcpLink, LinkError> {
        let resolve = |error| LinkError::Resolve { addr: addr.to_owned(), error };
        let mut last = io::Error::new(ErrorKind::AddrNotAvailable, "the name has no address");
        for candidate in addr.to_socket_addrs().map_err(resolve)? {
            match TcpStream::connect_timeout(&candidate, within) {
                Ok(stream) => return TcpLink::over(stream).map_err(LinkError::Broken),
                Err(error) => last = error,
            }
        }
        Err(LinkError::Connect { addr: addr.to_owned(), within, error: last })
    }

    pub(crate) fn over(stream: TcpStream) -> io::Result<TcpLink> {
        // Socket buffers are left alone: setting them turns the kernel's autotuning off.
        stream.set_nodelay(true)?;
        let peer = stream.peer_addr()?;
        Ok(TcpLink { stream, peer, out: Vec::new() })
    }

    pub(crate) fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// A handle that can end this stream's waits from another thread.
    pub(crate) fn handle(&self) -> io::Result<TcpStream> {
        self.stream.try_clone()
    }

    /// Each read or write must move a byte within `patience`.
    pub(crate) fn set_patience(&self, patience: Duration) -> Result<(), LinkError> {
        let set = self.stream.set_read_timeout(Some(patience));
        set.and_then(|()| self.stream.set_write_timeout(Some(patience))).map_err(LinkError::Broken)
    }

    pub(crate) fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.out.clear();
        message.encode(&mut self.out);
        self.stream.write_all(&self.out).map_err(|e| self.failed(e))
    }

    /// A message; for a chunk, its bulk is still to be read.
    pub(crate) fn receive(&mut self) -> Result<Message, LinkError> {
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head).map_err(|e| self.failed(e))?;
        let header = Header::decode(&head)?;
        // `take` grows the body as bytes come: a claimed length allocates nothing by itself.
        let mut body = Vec::with_capacity(header.body_bytes().min(64 << 10));
        let want = header.body_bytes() as u64;
        Read::by_ref(&mut self.stream)
            .take(want)
            .read_to_end(&mut body)
            .map_err(|e| self.failed(e))?;
        if (body.len() as u64) < want {
            return Err(LinkError::Closed);
        }
        Ok(header.finish(&body)?)
    }

    /// Receives a chunk's bytes straight to their place, hashing what is still in the cache.
    pub(crate) fn receive_chunk(
        &mut self,
        map: &SharedMap,
        range: Range<u64>,
    ) -> Result<ChunkHash, LinkError> {
        let stream = &mut self.stream;
        let received = map.write(range, |bytes| {
            let mut hasher = blake3::Hasher::new();
            for stride in bytes.chunks_mut(HASH_STRIDE) {
                stream.read_exact(stride)?;
                hasher.update(stride);
            }
            Ok(*hasher.finalize().as_bytes())
        });
        received.map_err(|e| self.failed(e))
    }

    /// Header, then the bytes of `file` in `range` without copying them through this process.
    pub(crate) fn send_chunk(
        &mut self,
        header: &Message,
        file: &std::fs::File,
        range: Range<u64>,
    ) -> Result<(), LinkError> {
        self.out.clear();
        header.encode(&mut self.out);
        // MORE keeps header and first bytes in one segment.
        let flags = rustix::net::SendFlags::MORE | rustix::net::SendFlags::NOSIGNAL;
        let mut rest: &[u8] = &self.out;
        while !rest.is_empty() {
            let sent = rustix::net::send(&self.stream, rest, flags);
            rest = &rest[sent.map_err(|e| self.failed(e.into()))?..];
        }
        let mut at = range.start;
        while at < range.end {
            let want = (range.end - at) as usize;
            match rustix::fs::sendfile(&self.stream, file, Some(&mut at), want) {
                // The file ends before the range: it was cut while we held it.
                Ok(0) => return Err(LinkError::Broken(ErrorKind::UnexpectedEof.into())),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(self.failed(e.into())),
            }
        }
        Ok(())
    }

    /// True if the peer has not closed it: an idle stream of the pool has nothing to read.
    pub(crate) fn is_idle(&self) -> bool {
        let quiet = self.stream.set_nonblocking(true).is_ok()
            && matches!(self.stream.peek(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
        quiet && self.stream.set_nonblocking(false).is_ok()
    }

    fn failed(&self, error: io::Error) -> LinkError {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                let patience = self.stream.read_timeout().ok().flatten();
                LinkError::Stalled(patience.unwrap_or_default())
            }
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                LinkError::Closed
            }
            _ => LinkError::Broken(error),
        }
    }
}
