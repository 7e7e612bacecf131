//! Why a fetch failed, and why one stream of it did.

use std::time::Duration;

use anabranch_proto::manifest::ManifestError;
use anabranch_proto::version::Version;

use crate::image::checkpoint::LayoutDiff;
use crate::link::LinkError;
use crate::link::wire::{FailCode, Message};
use crate::receive::staging::StageError;

/// Why a version is not here.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The version has no root yet.
    #[error("{0} has no root yet: it can be fetched after its seal")]
    Unsealed(Version),
    /// No source could be asked, or all failed.
    #[error("no path to any holder of {version}: {}", story(.tried))]
    NoSource { version: Version, tried: Vec<Tried> },
    /// A manifest with the right root is malformed.
    #[error("{version}: the manifest from {holder} is bad: {error}")]
    Manifest { version: Version, holder: String, error: ManifestError },
    /// The tensors differ from the engine's.
    #[error("{version} does not fit this engine, which keeps its old weights: {diff}")]
    Layout { version: Version, diff: LayoutDiff },
    /// The staging area cannot take the version.
    #[error("{version}: {error}")]
    Stage { version: Version, error: StageError },
    /// No chunk was verified for too long.
    #[error(
        "{version}: no chunk arrived for {waited:?}, {verified} of {chunks} are here: {}",
        story(.tried)
    )]
    Stalled { version: Version, waited: Duration, verified: u32, chunks: u32, tried: Vec<Tried> },
    /// The fetch was cancelled.
    #[error("{0}: the fetch was cancelled")]
    Cancelled(Version),
    /// A thread of the fetch failed.
    #[error("{0}: the fetch ended early because its thread failed")]
    Thread(Version),
}

/// A source that was tried, and why that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// Name of the holder.
    pub holder: String,
    /// Addresses that were tried.
    pub addr: String,
    /// The failure, for people.
    pub why: String,
}

/// Why a stream to a source failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("it refused ({code:?}): {text}")]
    Refused { code: FailCode, text: String },
    #[error("it answered with an unexpected {0}")]
    Unexpected(String),
}

fn story(tried: &[Tried]) -> String {
    if tried.is_empty() {
        return "no source was named".to_owned();
    }
    let one = |t: &Tried| format!("{} at {}: {}", t.holder, t.addr, t.why);
    tried.iter().map(one).collect::<Vec<_>>().join("; ")
}

// === impl StreamError ===

impl StreamError {
    pub(super) fn from_reply(message: Message) -> StreamError {
        match message {
            Message::Fail { code, text } => StreamError::Refused { code, text },
            other => StreamError::Unexpected(format!("{other:?}").chars().take(100).collect()),
        }
    }

    /// The source is well, but has not begun with what was asked.
    pub(super) fn is_early(&self) -> bool {
        matches!(self, StreamError::Refused { code: FailCode::NotYet, .. })
    }

    /// Asking this source again for this version is useless.
    pub(super) fn is_final(&self) -> bool {
        match self {
            StreamError::Refused { code, .. } => match code {
                FailCode::Grant | FailCode::UnknownVersion => true,
                FailCode::Revoked | FailCode::Protocol => true,
                FailCode::NotHeld | FailCode::Busy | FailCode::NotYet => false,
            },
            StreamError::Link(_) | StreamError::Unexpected(_) => false,
        }
    }
}
