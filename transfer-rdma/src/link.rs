//! Both ends of a stream. What the source registers is `lending`'s.
//!
//! ```text
//!   receiver                           source
//!   Hi{grant} ───────────────────────►  admitted?
//!             ◄─────────── Welcome, Remote{probe, address}      a read of the probe: the fabric works
//!   Want{i} ─────────────────────────►
//!             ◄─────────── Chunk{i}, Remote{at, key}
//!   fi_read ═════════════════════════  the file's memory, no thread of the source needed
//!   Taken{i} ────────────────────────►
//! ```
//! A key goes out only on a stream that was admitted, and is void once the memory changes hands. The source
//! announces chunks without waiting for `Taken`; a receiver that leaves them unread is dropped after the
//! same patience as one that takes no bytes over TCP.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_proto::address::HostPort;
use anabranch_proto::manifest::ChunkHash;
use anabranch_transfer::external::{
    Blob, Closer, Link, LinkError, RDMA_FIRST_BYTE, SharedMap, tcp_connect, tcp_link,
};
use anabranch_transfer::wire::{Message, WireError};

use crate::fabric::{self, Domain, Endpoint, FabricError, Peer, Pulse, Remote};
use crate::lending::{Lending, Lendings, SourceAddress};

/// Bytes that a receiver sends first, before any message.
const HELLO: &[u8; 4] = b"RDMA";
const _: () = assert!(HELLO[0] == RDMA_FIRST_BYTE);

/// Bounds how late a receiver looks at its deadline.
const TICK: Duration = Duration::from_millis(100);

/// The receiver's end.
struct ReadingLink {
    control: Box<dyn Link>,
    /// The same stream, to learn that the source hung up.
    watched: TcpStream,
    patience: Duration,
    endpoint: Endpoint,
    /// The source, once it was told and a probe was read.
    source: Option<Peer>,
    /// The chunk whose bulk is to be read next.
    next: Option<(u32, Remote)>,
}

/// The source's end.
struct LendingLink {
    control: Box<dyn Link>,
    lending: Arc<Lending>,
    introduced: bool,
    /// Chunks announced and not yet read.
    unread: u32,
    patience: Duration,
    /// The patience at the time when a chunk was last announced.
    bulk_patience: Duration,
}

/// The receiver's end of a new stream to the source at `at`.
pub(crate) fn connect(at: &HostPort, within: Duration) -> Result<Box<dyn Link>, LinkError> {
    Ok(Box::new(ReadingLink::connect(at, within)?))
}

/// The source's end of a stream that was accepted and begins with [`RDMA_FIRST_BYTE`].
pub(crate) fn accepted(mut stream: TcpStream, lendings: &Lendings) -> io::Result<Box<dyn Link>> {
    let mut hello = [0; HELLO.len()];
    stream.read_exact(&mut hello)?;
    if hello != *HELLO {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Box::new(LendingLink::over(stream, lendings).map_err(io::Error::other)?))
}

// === impl ReadingLink ===

impl ReadingLink {
    /// Opens the device that leads to the source as well.
    fn connect(at: &HostPort, within: Duration) -> Result<ReadingLink, LinkError> {
        fabric::load()?;
        let stream = tcp_connect(at, within)?;
        let interface = stream.local_addr().map_err(LinkError::Broken)?.ip();
        let endpoint = Endpoint::open(&Domain::at(interface)?)?;
        stream.set_write_timeout(Some(within)).map_err(LinkError::Broken)?;
        (&stream).write_all(HELLO).map_err(|e| LinkError::of(e, within))?;
        let watched = stream.try_clone().map_err(LinkError::Broken)?;
        let control = tcp_link(stream).map_err(LinkError::Broken)?;
        let (patience, source, next) = (within, None, None);
        Ok(ReadingLink { control, watched, patience, endpoint, source, next })
    }

    /// After the first welcome: makes the source known and reads its probe, so that a fabric that does not
    /// work is found here, where another address can still be tried.
    fn introduce(&mut self) -> Result<(), LinkError> {
        let (from, told) = self.remote()?;
        let address = SourceAddress::decode(&told).ok_or(WireError::Malformed("Remote"))?;
        let facts = self.endpoint.domain().facts();
        if address.format != facts.address_format {
            let own = facts.provider();
            let text = format!(
                "the source has addresses of another kind ({}); set FI_PROVIDER alike on both",
                address.provider
            );
            return Err(LinkError::Fabric { provider: own, text });
        }
        let peer = self.endpoint.insert(&address.bytes)?;
        let mut probe = vec![0; told.len()];
        let patience = self.patience;
        let mut pace = Pace::new(patience);
        self.endpoint.read((peer, from), &mut probe, None, self.watched.as_fd(), |_, pulse| {
            pace.step(pulse)
        })?;
        if probe != told {
            let provider = self.endpoint.domain().facts().provider();
            let text = "a read from the source gave other bytes than it has".to_owned();
            return Err(LinkError::Fabric { provider, text });
        }
        self.source = Some(peer);
        Ok(())
    }

    fn remote(&mut self) -> Result<(Remote, Vec<u8>), LinkError> {
        match self.control.receive()? {
            Message::Remote { at, key, address } => Ok((Remote { at, key }, address)),
            _ => Err(WireError::Malformed("Remote").into()),
        }
    }
}

impl Link for ReadingLink {
    fn peer(&self) -> String {
        format!("rdma://{}", self.control.peer())
    }

    fn closer(&self) -> Result<Closer, LinkError> {
        self.control.closer()
    }

    fn set_patience(&mut self, patience: Duration) -> Result<(), LinkError> {
        self.patience = patience;
        self.control.set_patience(patience)
    }

    fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.control.send(message)
    }

    fn receive(&mut self) -> Result<Message, LinkError> {
        let message = self.control.receive()?;
        match &message {
            Message::Welcome { .. } if self.source.is_none() => self.introduce()?,
            Message::Chunk { index, .. } => self.next = Some((*index, self.remote()?.0)),
            _ => {}
        }
        Ok(message)
    }

    fn receive_chunk(
        &mut self,
        map: &SharedMap,
        range: Range<u64>,
    ) -> Result<ChunkHash, LinkError> {
        let (Some(source), Some((index, from))) = (self.source, self.next.take()) else {
            return Err(WireError::Malformed("Chunk").into());
        };
        let (mut hasher, mut hashed) = (blake3::Hasher::new(), 0);
        let mut pace = Pace::new(self.patience);
        let (endpoint, watched) = (&mut self.endpoint, self.watched.as_fd());
        map.write(range, |into| {
            endpoint.read((source, from), into, Some(map), watched, |front, pulse| {
                hasher.update(&front[hashed..]);
                hashed = front.len();
                pace.step(pulse)
            })
        })?;
        self.control.send(&Message::Taken { index })?;
        Ok(*hasher.finalize().as_bytes())
    }

    fn send_chunk(&mut self, _: &Message, _: &File, _: Range<u64>) -> Result<(), LinkError> {
        let text = "only the source's end of an rdma stream sends chunks".to_owned();
        let provider = self.endpoint.domain().facts().provider();
        Err(LinkError::Fabric { provider, text })
    }

    fn is_idle(&mut self) -> bool {
        self.control.is_idle()
    }
}

/// The deadline of a read: some piece of it must move within the patience.
struct Pace {
    patience: Duration,
    moved: Instant,
}

impl Pace {
    fn new(patience: Duration) -> Pace {
        Pace { patience, moved: Instant::now() }
    }

    fn step(&mut self, pulse: Pulse) -> Result<Duration, LinkError> {
        match pulse {
            Pulse::HungUp => return Err(LinkError::Closed),
            Pulse::Moved => self.moved = Instant::now(),
            Pulse::Still if self.moved.elapsed() >= self.patience => {
                return Err(LinkError::Stalled(self.patience));
            }
            Pulse::Still => {}
        }
        Ok(self.patience.saturating_sub(self.moved.elapsed()).min(TICK))
    }
}

// === impl LendingLink ===

impl LendingLink {
    fn over(stream: TcpStream, lendings: &Lendings) -> Result<LendingLink, LinkError> {
        let interface = stream.local_addr().map_err(LinkError::Broken)?.ip();
        let lending = lendings.at(interface)?;
        let control = tcp_link(stream).map_err(LinkError::Broken)?;
        let (patience, bulk_patience) = (Duration::MAX, Duration::MAX);
        let (introduced, unread) = (false, 0);
        Ok(LendingLink { control, lending, introduced, unread, patience, bulk_patience })
    }

    fn remote(&mut self, remote: Remote, address: Vec<u8>) -> Result<(), LinkError> {
        let Remote { at, key } = remote;
        self.control.send(&Message::Remote { at, key, address })
    }
}

impl Link for LendingLink {
    fn peer(&self) -> String {
        format!("rdma://{}", self.control.peer())
    }

    fn closer(&self) -> Result<Closer, LinkError> {
        self.control.closer()
    }

    fn set_patience(&mut self, patience: Duration) -> Result<(), LinkError> {
        self.patience = patience;
        Ok(())
    }

    fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.control.set_patience(self.patience)?;
        self.control.send(message)?;
        if matches!(message, Message::Welcome { .. }) && !self.introduced {
            self.introduced = true;
            let (probe, address) = self.lending.introduction();
            self.remote(probe, address)?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Message, LinkError> {
        while self.unread > 0 {
            self.control.set_patience(self.bulk_patience)?;
            match self.control.receive()? {
                Message::Taken { .. } => self.unread -= 1,
                message => return Ok(message),
            }
        }
        self.control.set_patience(self.patience)?;
        self.control.receive()
    }

    fn receive_chunk(&mut self, _: &SharedMap, _: Range<u64>) -> Result<ChunkHash, LinkError> {
        Err(WireError::Malformed("Chunk").into())
    }

    fn send_chunk(&mut self, _: &Message, _: &File, _: Range<u64>) -> Result<(), LinkError> {
        Err(LinkError::Broken(io::ErrorKind::Unsupported.into()))
    }

    fn send_blob(
        &mut self,
        header: &Message,
        blob: &Blob,
        range: Range<u64>,
    ) -> Result<(), LinkError> {
        let remote = self.lending.lend(blob, range.start)?;
        self.control.set_patience(self.patience)?;
        self.control.send(header)?;
        self.remote(remote, Vec::new())?;
        self.unread += 1;
        self.bulk_patience = self.patience;
        Ok(())
    }

    fn is_idle(&mut self) -> bool {
        self.control.is_idle()
    }
}

impl From<FabricError> for LinkError {
    fn from(error: FabricError) -> LinkError {
        LinkError::Fabric { provider: error.provider, text: error.text }
    }
}

#[cfg(test)]
mod tests;
