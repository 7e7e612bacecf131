//! Ways to move the data plane's bytes between two processes, behind one trait, [`Link`]: one stream each. The
//! address (`anabranch_proto::address`) says which link is dialled. Links decide nothing.

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
    /// Name of the other end, for logs.
    fn peer(&self) -> String;

    /// A function that ends the waits of this link from another thread.
    fn closer(&self) -> Result<Closer, LinkError>;

    /// Sets how long a call may wait without a byte moving.
    fn set_patience(&mut self, patience: Duration) -> Result<(), LinkError>;

    /// Sends a message.
    fn send(&mut self, message: &Message) -> Result<(), LinkError>;

    /// Receives a message. After a `Chunk`, the bulk must be taken with `receive_chunk`.
    fn receive(&mut self) -> Result<Message, LinkError>;

    /// Takes the bulk of a chunk straight to its place, hashing it on the way.
    fn receive_chunk(&mut self, map: &SharedMap, range: Range<u64>)
    -> Result<ChunkHash, LinkError>;

    /// Sends the header, then the bytes of `file` in `range`.
    fn send_chunk(
        &mut self,
        header: &Message,
        file: &File,
        range: Range<u64>,
    ) -> Result<(), LinkError>;

    /// Sends the header, then the bytes of the blob in `range`. For links that must know whose memory it is; others
    /// send the bytes of its file.
    fn send_blob(
        &mut self,
        header: &Message,
        blob: &Blob,
        range: Range<u64>,
    ) -> Result<(), LinkError> {
        let file = blob.file.get().ok_or(LinkError::Closed)?;
        self.send_chunk(header, &file, range)
    }

    /// Sends the header, and `file` itself: for the links within one host. Other links fail.
    fn send_file(&mut self, _header: &Message, _file: &File) -> Result<(), LinkError> {
        Err(LinkError::Broken(ErrorKind::Unsupported.into()))
    }

    /// Receives a message with the file that came along, if one did.
    fn receive_file(&mut self) -> Result<(Message, Option<File>), LinkError> {
        Ok((self.receive()?, None))
    }

    /// True if the peer has neither closed it nor sent anything: it may be kept for later.
    fn is_idle(&mut self) -> bool;
}

/// Ends the waits of a stream, from any thread.
pub type Closer = Box<dyn Fn() + Send + Sync>;
