//! What can go wrong on a stream.

use std::io::{self, ErrorKind};
use std::time::Duration;

use super::identity::PinMismatch;
use super::wire::WireError;

/// What can go wrong on a stream, from this side's view.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("cannot resolve `{addr}`: {error}")]
    Resolve { addr: String, error: io::Error },
    #[error("cannot connect to {addr} within {within:?}: {error}")]
    Connect { addr: String, within: Duration, error: io::Error },
    /// All addresses of the peer are of links that are not known here, or there is none.
    #[error("it has no address that can be dialled from here")]
    NoAddress,
    /// An `rdma://` address in a build without that link.
    #[error("this build has no rdma; build it with the feature `rdma`")]
    NoRdma,
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

// === impl LinkError ===

impl LinkError {
    /// By what a read or write said; `patience` is the deadline that it ran under.
    pub fn of(error: io::Error, patience: Duration) -> LinkError {
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
