//! TCP: `sendfile` on one side, receiving into shared memory while hashing on the other.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::time::Duration;

use anabranch_proto::address::HostPort;

use super::stream::{ByteStream, StreamLink, sendfile};
use super::{Closer, Link, LinkError};

struct PlainStream {
    socket: TcpStream,
    peer: SocketAddr,
}

/// A stream to the listener at `at`.
pub(crate) fn dial(at: &HostPort, within: Duration) -> Result<Box<dyn Link>, LinkError> {
    link(connect(at, within)?).map_err(LinkError::Broken)
}

/// A stream of the data plane over a connection, from either end.
pub fn link(socket: TcpStream) -> io::Result<Box<dyn Link>> {
    // Socket buffers are left alone: setting them turns the kernel's autotuning off.
    socket.set_nodelay(true)?;
    let peer = socket.peer_addr()?;
    Ok(Box::new(StreamLink::over(PlainStream { socket, peer })))
}

/// A TCP connection to the first address of `at` that accepts. Each of them gets the time `within`.
pub fn connect(at: &HostPort, within: Duration) -> Result<TcpStream, LinkError> {
    let resolve = |error| LinkError::Resolve { addr: at.to_string(), error };
    let mut last = io::Error::new(ErrorKind::AddrNotAvailable, "the name has no address");
    for candidate in at.as_str().to_socket_addrs().map_err(resolve)? {
        match TcpStream::connect_timeout(&candidate, within) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(LinkError::Connect { addr: at.to_string(), within, error: last })
}

/// Ends the waits on both sides of it.
pub(super) fn closer(socket: &TcpStream) -> io::Result<Closer> {
    let socket = socket.try_clone()?;
    Ok(Box::new(move || {
        socket.shutdown(Shutdown::Both).ok();
    }))
}

pub(super) fn set_patience(socket: &TcpStream, patience: Duration) -> io::Result<()> {
    socket.set_read_timeout(Some(patience))?;
    socket.set_write_timeout(Some(patience))
}

/// True if nothing can be read and the peer is there.
pub(super) fn is_quiet(socket: &TcpStream) -> bool {
    let quiet = socket.set_nonblocking(true).is_ok()
        && matches!(socket.peek(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
    quiet && socket.set_nonblocking(false).is_ok()
}

// === impl PlainStream ===

impl Read for PlainStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.socket.read(out)
    }
}

impl Write for PlainStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ByteStream for PlainStream {
    fn peer(&self) -> String {
        self.peer.to_string()
    }

    fn closer(&self) -> io::Result<Closer> {
        closer(&self.socket)
    }

    fn set_patience(&mut self, patience: Duration) -> io::Result<()> {
        set_patience(&self.socket, patience)
    }

    fn is_idle(&mut self) -> bool {
        is_quiet(&self.socket)
    }

    fn send_range(&mut self, out: &mut Vec<u8>, file: &File, range: Range<u64>) -> io::Result<()> {
        // MORE keeps header and first bytes in one segment.
        let flags = rustix::net::SendFlags::MORE | rustix::net::SendFlags::NOSIGNAL;
        let mut rest: &[u8] = out;
        while !rest.is_empty() {
            rest = &rest[rustix::net::send(&self.socket, rest, flags)?..];
        }
        sendfile(&self.socket, file, range)
    }
}
