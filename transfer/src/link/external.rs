//! Links that other crates bring, because they need libraries that a default build does without. Today one
//! kind of them is known: rdma.

use std::io;
use std::net::{IpAddr, TcpStream};
use std::sync::OnceLock;
use std::time::Duration;

use anabranch_proto::address::HostPort;

use super::{Link, LinkError};

/// First byte that a receiver of an rdma stream sends, before any message: a listener takes other links on the
/// same port. Other streams begin with the first byte of a TLS handshake or of the wire's magic.
pub const RDMA_FIRST_BYTE: u8 = b'R';

/// A link of another crate, from both ends.
pub trait ExternalLink: Send + Sync {
    /// Connects to the source at `at`. Fails after about `within`.
    fn connect(&self, at: &HostPort, within: Duration) -> Result<Box<dyn Link>, LinkError>;

    /// Makes ready to take streams that come in by `interface`; by any where it is `None`. Fails where the
    /// library or a device is missing.
    fn listen(&self, interface: Option<IpAddr>) -> Result<Box<dyn Accept>, LinkError>;
}

/// A listener's part of an [`ExternalLink`]. Closed when it is dropped.
pub trait Accept: Send + Sync {
    /// The source's end of a connection that was accepted, from its first byte on.
    fn accept(&self, stream: TcpStream) -> io::Result<Box<dyn Link>>;
}

static RDMA: OnceLock<Box<dyn ExternalLink>> = OnceLock::new();

/// Makes `link` the link of `rdma://` addresses, for the whole process. A second call changes nothing.
pub fn register_rdma(link: Box<dyn ExternalLink>) {
    RDMA.set(link).ok();
}

/// The link of `rdma://` addresses, where this build has one.
pub(crate) fn rdma() -> Result<&'static dyn ExternalLink, LinkError> {
    RDMA.get().map(AsRef::as_ref).ok_or(LinkError::NoRdma)
}
