//! A unix socket between two processes of one host: a stream like tcp, over which memory itself can be
//! passed as a descriptor. Who may connect is said by the permissions of the socket and of its directory.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anabranch_proto::address::Address;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use super::stream::{ByteStream, StreamLink, sendfile};
use super::{Closer, LinkError};

pub(crate) type ShmLink = StreamLink<LocalStream>;

pub(crate) struct LocalStream {
    socket: UnixStream,
}

/// A stream to the process of this host that listens at `path`.
pub(crate) fn dial(path: &Path, within: Duration) -> Result<ShmLink, LinkError> {
    let addr = || Address::Shm(path.to_owned()).to_string();
    let failed = |error| LinkError::Connect { addr: addr(), within, error };
    let socket = connect(path, within).map_err(|error| failed(error.into()))?;
    Ok(link(socket))
}

pub(crate) fn link(socket: UnixStream) -> ShmLink {
    StreamLink::over(LocalStream { socket })
}

/// A unix socket whose listener is busy makes `connect` wait: not for ever.
fn connect(path: &Path, within: Duration) -> rustix::io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(within))?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}

// === impl LocalStream ===

impl Read for LocalStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.socket.read(out)
    }
}

impl Write for LocalStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ByteStream for LocalStream {
    /// Says no process number: a process in a container of its own has none here.
    fn peer(&self) -> String {
        "a process of this host".to_owned()
    }

    fn closer(&self) -> io::Result<Closer> {
        let socket = self.socket.try_clone()?;
        Ok(Box::new(move || {
            socket.shutdown(Shutdown::Both).ok();
        }))
    }

    fn set_patience(&mut self, patience: Duration) -> io::Result<()> {
        self.socket.set_read_timeout(Some(patience))?;
        self.socket.set_write_timeout(Some(patience))
    }

    fn is_idle(&mut self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let peeked = rustix::net::recv(&self.socket, &mut [0; 1][..], flags);
        matches!(peeked, Err(rustix::io::Errno::WOULDBLOCK))
    }

    fn send_range(&mut self, out: &mut Vec<u8>, file: &File, range: Range<u64>) -> io::Result<()> {
        self.socket.write_all(out)?;
        sendfile(&self.socket, file, range)
    }

    fn send_file(&mut self, bytes: &[u8], file: &File) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptor = [file.as_fd()];
        let room = control.push(SendAncillaryMessage::ScmRights(&descriptor));
        debug_assert!(room, "the buffer was made for one descriptor");
        let parts = [IoSlice::new(bytes)];
        let sent = rustix::net::sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL)?;
        // The descriptor goes with the first byte, the rest may follow by itself.
        self.socket.write_all(&bytes[sent..])
    }

    fn read_file(&mut self, byte: &mut [u8; 1]) -> io::Result<Option<File>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(byte)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(&self.socket, &mut parts, &mut control, flags)?;
        if got.bytes == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let rights = |message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        };
        let descriptors: Vec<OwnedFd> = control.drain().filter_map(rights).flatten().collect();
        Ok(descriptors.into_iter().next().map(File::from))
    }
}
