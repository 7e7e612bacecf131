//! Why the manager did not start, or did not end well.

use std::path::PathBuf;

use anabranch_runtime::drain::StillRunning;
use anabranch_runtime::safety::UnsafeListen;
use anabranch_runtime::tls::TlsError;
use anabranch_runtime::token::TokenStoreError;
use anabranch_runtime::{Exit, FileError, ListenError};

#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    #[error(transparent)]
    Exposed(#[from] UnsafeListen),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Tokens(#[from] TokenStoreError),
    #[error("the announce file: {0}")]
    Announce(#[from] FileError),
    #[error("cannot remove the announce file {}: {source}", path.display())]
    Unannounce { path: PathBuf, source: std::io::Error },
    #[error(
        "cannot publish events at {endpoint}: {why}. --zmq takes ipc:///PATH or tcp://127.0.0.1:PORT"
    )]
    Feed { endpoint: String, why: String },
    #[error("the deciding core stopped by itself, see the log above; this is a bug of Anabranch")]
    CoreStopped,
    #[error("shutdown took too long: {0}")]
    Shutdown(#[from] StillRunning),
}

impl ManagerError {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Exposed(error) => error.exit_code(),
            Self::Listen(error) => error.exit_code(),
            Self::Tls(_) | Self::Tokens(_) => Exit::Data.code(),
            Self::Announce(_) | Self::Unannounce { .. } => Exit::CannotCreate.code(),
            Self::Feed { .. } => Exit::CannotCreate.code(),
            Self::CoreStopped => Exit::Internal.code(),
            Self::Shutdown(_) => Exit::TryAgain.code(),
        }
    }
}
