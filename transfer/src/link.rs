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
use std::io::ErrorKind;
use std::ops::Range;
use std::time::Duration;

use anabranch_proto::manifest::ChunkHash;

use crate::image::blob::Blob;
use crate::memory::map::SharedMap;
use wire::Message;

mod dial;
mod error;
pub(crate) mod external;
pub(crate) mod file;
pub(crate) mod frame;
pub(crate) mod identity;
pub(crate) mod quic;
pub(crate) mod shm;
mod stream;
pub(crate) mod tcp;
pub(crate) mod tls;
pub mod wire;

pub(crate) use dial::dial;
pub use error::LinkError;
pub use identity::PinMismatch;

/// One stream of the data plane, from either end. Blocking, with a deadline on every step: a call fails
/// with [`LinkError::Stalled`] when no byte moves for the patience that was set.
pub trait Link: Send {
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

pub type Closer = Box<dyn Fn() + Send + Sync>;
