//! Errors of a stream.

use std::io::{self, ErrorKind};
use std::time::Duration;

use super::identity::PinMismatch;
use super::wire::WireError;

/// An error of a stream, as this end sees it.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The name of the host cannot be resolved.
    #[error("cannot resolve `{addr}`: {error}")]
    Resolve { addr: String, error: io::Error },
    /// No connection came about in time.
    #[error("cannot connect to {addr} within {within:?}: {error}")]
    Connect { addr: String, within: Duration, error: io::Error },
    /// The peer has no address, or only addresses of links that are not known here.
    #[error("it has no address that can be dialled from here")]
    NoAddress,
    /// An `rdma://` address in a build without that link.
    #[error("this build has no rdma; build it with the feature `rdma`")]
    NoRdma,
    /// The source that should dial did not.
    #[error("`{holder}` did not dial this receiver within {within:?}")]
    NotDialled { holder: String, within: Duration },
    /// The listener has another certificate than its address names.
    #[error("{addr} is not the listener that was asked for: {mismatch}")]
    Pin { addr: String, mismatch: PinMismatch },
    /// The TLS handshake failed.
    #[error("no secure stream to {addr}: {why}")]
    Handshake { addr: String, why: String },
    /// No byte moved for the patience that was set.
    #[error("no byte moved for {0:?}")]
    Stalled(Duration),
    /// The peer closed the stream.
    #[error("the peer closed the stream")]
    Closed,
    /// A read or write failed in another way.
    #[error("the stream broke: {0}")]
    Broken(io::Error),
    /// The fabric or its library failed.
    #[error(
        "no rdma through `{provider}`: {text} (look at FI_PROVIDER, `ulimit -l`, the device, and that \
         libfabric is installed: `libfabric1` on Debian; other addresses are used meanwhile)"
    )]
    Fabric { provider: String, text: String },
    /// The peer sent bytes that are no message.
    #[error("the peer broke the protocol: {0}")]
    Wire(#[from] WireError),
}

// === impl LinkError ===

impl LinkError {
    /// The error for a failed read or write; `patience` is the deadline that it ran under.
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
