//! Mechanisms that move the data plane's bytes between two processes, behind one trait. A link is one
//! stream; which link is dialled stands in the address. Links decide nothing.
//!
//! ```text
//!   host:port                   tcp
//!   tls://host:port#<sha256>    tcp in TLS; the certificate's digest is pinned
//!   quic://host:port#<sha256>   a QUIC stream, pinned as well
//!   shm:/path/to/socket         a process of this host: the memory itself is passed
//!   file:/dir                   versions that a trainer exported to a shared file system
//!   rdma://host:port            tcp for messages, bulk read through libfabric (feature `rdma`)
//!   feed:<source>               no address: the source dials this receiver
//! ```

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::time::Duration;

use anabranch_proto::manifest::ChunkHash;

use crate::link::wire::{Message, WireError};
use crate::memory::map::SharedMap;
use crate::send::holder::Blob;

pub(crate) mod file;
pub(crate) mod frame;
pub(crate) mod identity;
pub(crate) mod quic;
#[cfg_attr(not(feature = "rdma"), path = "link/rdma/absent.rs")]
pub(crate) mod rdma;
pub(crate) mod shm;
mod stream;
pub(crate) mod tcp;
pub(crate) mod tls;
pub mod wire;

pub use identity::PinMismatch;

use file::FileLink;
use identity::PinnedAddr;

/// One stream of the data plane, from either end. Blocking, with a deadline on every step: a call fails
/// with [`LinkError::Stalled`] when no byte moves for the patience that was set.
pub(crate) trait Link: Send {
    /// Who is at the other end, for logs.
    fn peer(&self) -> String;

    /// Ends the waits of this link from another thread.
    fn closer(&self) -> Result<Closer, LinkError>;

    fn set_patience(&mut self, patience: Duration) -> Result<(), LinkError>;

    fn send(&mut self, message: &Message) -> Result<(), LinkError>;

    /// A message; after a `Chunk`, its bulk must be taken with `receive_chunk`.
    fn receive(&mut self) -> Result<Message, LinkError>;

    /// Takes the bulk of a chunk straight to its place, hashing it on the way.
    fn receive_chunk(&mut self, map: &SharedMap, range: Range<u64>)
    -> Result<ChunkHash, LinkError>;

    /// The header, then the bytes of `file` in `range`.
    fn send_chunk(
        &mut self,
        header: &Message,
        file: &File,
        range: Range<u64>,
    ) -> Result<(), LinkError>;

    /// As `send_chunk`, for links that must know whose memory it is.
    fn send_blob(
        &mut self,
        header: &Message,
        blob: &Blob,
        range: Range<u64>,
    ) -> Result<(), LinkError> {
        let file = blob.file.get().ok_or(LinkError::Closed)?;
        self.send_chunk(header, &file, range)
    }

    /// The header, and `file` itself: for the links within one host.
    fn send_file(&mut self, _header: &Message, _file: &File) -> Result<(), LinkError> {
        Err(LinkError::Broken(ErrorKind::Unsupported.into()))
    }

    /// As `receive`, with the file that came along.
    fn receive_file(&mut self) -> Result<(Message, Option<File>), LinkError> {
        Ok((self.receive()?, None))
    }

    /// True if the peer has neither closed it nor sent anything: it may be kept for later.
    fn is_idle(&mut self) -> bool;
}

pub(crate) type Closer = Box<dyn Fn() + Send + Sync>;

/// What can go wrong on a stream, from this side's view.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("cannot resolve `{addr}`: {error}")]
    Resolve { addr: String, error: io::Error },
    #[error("cannot connect to {addr} within {within:?}: {error}")]
    Connect { addr: String, within: Duration, error: io::Error },
    #[error("`{addr}` is no address of the data plane: {why}")]
    Address { addr: String, why: String },
    #[error("`{holder}` did not dial this receiver within {within:?}")]
    NotDialled { holder: String, within: Duration },
    #[error("{addr} is not the listener that was asked for: {mismatch}")]
    Pin { addr: String, mismatch: PinMismatch },
    #[error("no secure stream to {addr}: {why}")]
    Handshake { addr: String, why: String },
    #[error("no byte moved for {0:?}")]
    Stalled(Duration),
    #[error("the peer closed the stream")]
    Closed,
    #[error("the stream broke: {0}")]
    Broken(io::Error),
    #[error(
        "no rdma through `{provider}`: {text} (look at FI_PROVIDER, `ulimit -l`, the device, and that \
         libfabric is installed: `libfabric1` on Debian; other addresses are used meanwhile)"
    )]
    Fabric { provider: String, text: String },
    #[error("the peer broke the protocol: {0}")]
    Wire(#[from] WireError),
}

/// Opens a stream to `addr` by the link that it names.
pub(crate) fn dial(addr: &str, within: Duration) -> Result<Box<dyn Link>, LinkError> {
    match addr.split_once(':') {
        Some(("file", dir)) => Ok(Box::new(FileLink::open(addr, dir)?)),
        Some(("shm", path)) => Ok(Box::new(shm::dial(addr, path, within)?)),
        Some(("rdma", at)) => rdma::connect(at.strip_prefix("//").unwrap_or(at), within),
        Some(("tls", rest)) => tls::connect(&pinned(addr, rest)?, within),
        Some(("quic", rest)) => quic::connect(&pinned(addr, rest)?, within),
        _ => Ok(Box::new(tcp::dial(addr, within)?)),
    }
}

fn pinned(addr: &str, rest: &str) -> Result<PinnedAddr, LinkError> {
    PinnedAddr::parse(addr, rest.strip_prefix("//").unwrap_or(rest))
}

// === impl LinkError ===

impl LinkError {
    /// By what a read or write said; `patience` is the deadline that it ran under.
    pub(crate) fn of(error: io::Error, patience: Duration) -> LinkError {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => LinkError::Stalled(patience),
            ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe => LinkError::Closed,
            _ => LinkError::Broken(error),
        }
    }
}
