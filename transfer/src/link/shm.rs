//! A unix socket between two processes of one host: a stream like tcp, over which memory itself can be
//! passed as a descriptor. Who may connect is said by the permissions of the socket's directory.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anabranch_proto::manifest::ChunkHash;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use super::frame::{self, ReadError};
use super::{Closer, Link, LinkError};
use crate::shm::SharedMap;
use crate::wire::Message;

pub(crate) struct ShmLink {
    stream: UnixStream,
    peer: String,
    patience: Duration,
    out: Vec<u8>,
}

// === impl ShmLink ===

impl ShmLink {
    pub(crate) fn connect(addr: &str, path: &str, within: Duration) -> Result<ShmLink, LinkError> {
        let failed = |error| LinkError::Connect { addr: addr.to_owned(), within, error };
        let stream = connect(path, within).map_err(|error| failed(error.into()))?;
        ShmLink::over(stream).map_err(failed)
    }

    pub(crate) fn over(stream: UnixStream) -> io::Result<ShmLink> {
        let pid = sockopt::socket_peercred(&stream)?.pid;
        let peer = format!("process {} of this host", pid.as_raw_nonzero());
        Ok(ShmLink { stream, peer, patience: Duration::MAX, out: Vec::new() })
    }

    fn failed(&self, error: io::Error) -> LinkError {
        LinkError::of(error, self.patience)
    }

    fn message(&mut self) -> Result<Message, LinkError> {
        read_message(&mut self.stream, self.patience)
    }
}

/// A unix socket whose listener is busy makes `connect` wait: not for ever.
fn connect(path: &str, within: Duration) -> rustix::io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(within))?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}

fn read_message(stream: &mut impl Read, patience: Duration) -> Result<Message, LinkError> {
    frame::read_message(stream).map_err(|error| match error {
        ReadError::Io(error) => LinkError::of(error, patience),
        ReadError::Wire(error) => error.into(),
    })
}

impl Link for ShmLink {
    fn peer(&self) -> String {
        self.peer.clone()
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
        self.message()
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
        self.send(header)?;
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

    fn send_file(&mut self, header: &Message, file: &File) -> Result<(), LinkError> {
        let bytes = header.to_bytes();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptor = [file.as_fd()];
        let room = control.push(SendAncillaryMessage::ScmRights(&descriptor));
        debug_assert!(room, "the buffer was made for one descriptor");
        let parts = [IoSlice::new(&bytes)];
        let sent = rustix::net::sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL);
        // The descriptor goes with the first byte, the rest may follow by itself.
        let sent = sent.map_err(|e| self.failed(e.into()))?;
        self.stream.write_all(&bytes[sent..]).map_err(|e| self.failed(e))
    }

    fn receive_file(&mut self) -> Result<(Message, Option<File>), LinkError> {
        let mut first = [0; 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut first)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(&self.stream, &mut parts, &mut control, flags);
        let got = got.map_err(|e| self.failed(e.into()))?;
        if got.bytes == 0 {
            return Err(LinkError::Closed);
        }
        let rights = |message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        };
        let descriptors: Vec<OwnedFd> = control.drain().filter_map(rights).flatten().collect();
        let message = read_message(&mut first.chain(&mut self.stream), self.patience)?;
        Ok((message, descriptors.into_iter().next().map(File::from)))
    }

    fn is_idle(&mut self) -> bool {
        let mut byte = [0; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let peeked = rustix::net::recv(&self.stream, &mut byte[..], flags);
        matches!(peeked, Err(rustix::io::Errno::WOULDBLOCK))
    }
}
