//! TCP: `sendfile` on one side, receiving into shared memory while hashing on the other.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::time::Duration;

use anabranch_proto::manifest::ChunkHash;

use super::frame::{self, ReadError};
use super::{Closer, Link, LinkError};
use crate::shm::SharedMap;
use crate::wire::Message;

pub(crate) struct TcpLink {
    stream: TcpStream,
    peer: SocketAddr,
    patience: Duration,
    out: Vec<u8>,
}

// === impl TcpLink ===

impl TcpLink {
    pub(crate) fn connect(addr: &str, within: Duration) -> Result<TcpLink, LinkError> {
        TcpLink::over(connect(addr, within)?).map_err(LinkError::Broken)
    }

    pub(crate) fn over(stream: TcpStream) -> io::Result<TcpLink> {
        // Socket buffers are left alone: setting them turns the kernel's autotuning off.
        stream.set_nodelay(true)?;
        let peer = stream.peer_addr()?;
        Ok(TcpLink { stream, peer, patience: Duration::MAX, out: Vec::new() })
    }

    fn failed(&self, error: io::Error) -> LinkError {
        LinkError::of(error, self.patience)
    }
}

/// A TCP connection to the first address of `addr` that accepts.
pub(crate) fn connect(addr: &str, within: Duration) -> Result<TcpStream, LinkError> {
    let resolve = |error| LinkError::Resolve { addr: addr.to_owned(), error };
    let mut last = io::Error::new(ErrorKind::AddrNotAvailable, "the name has no address");
    for candidate in addr.to_socket_addrs().map_err(resolve)? {
        match TcpStream::connect_timeout(&candidate, within) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(LinkError::Connect { addr: addr.to_owned(), within, error: last })
}

impl Link for TcpLink {
    fn peer(&self) -> String {
        self.peer.to_string()
    }

    fn closer(&self) -> Result<Closer, LinkError> {
        let stream = self.stream.try_clone().map_err(LinkError::Broken)?;
        Ok(Box::new(move || {
            stream.shutdown(Shutdown::Both).ok();
        }))
    }

    fn set_patience(&mut self, patience: Duration) -> Result<(), LinkError> {
        self.patience = patience;
        let set = self.stream.set_read_timeout(Some(patience));
        set.and_then(|()| self.stream.set_write_timeout(Some(patience))).map_err(LinkError::Broken)
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

    /// The bytes are not copied through this process.
    fn send_chunk(
        &mut self,
        header: &Message,
        file: &File,
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

    fn is_idle(&mut self) -> bool {
        let quiet = self.stream.set_nonblocking(true).is_ok()
            && matches!(self.stream.peek(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
        quiet && self.stream.set_nonblocking(false).is_ok()
    }
}
