//! What can go wrong between a trainer and its manager, and whether trying again can help.

use std::time::Duration;

use tonic::{Code, Status};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Refused here, before anything was sent.
    #[error("{0}")]
    Invalid(String),
    #[error("cannot use the manager address {manager:?}: {why}")]
    Address { manager: String, why: String },
    #[error(
        "the manager could not be reached for {call} within {within:?}: {detail}. \
         Check that `anabranch manager` runs and that its address is right"
    )]
    Unreachable { call: &'static str, within: Duration, detail: String },
    #[error("the manager refused {call}: {why}")]
    Refused { call: &'static str, why: String },
    #[error(
        "the manager does not let this trainer {call}: {why}. Check the join token and its role"
    )]
    NotPermitted { call: &'static str, why: String },
    /// The manager restarted without its state: what was submitted and not delivered is gone.
    #[error(
        "the manager lost its state (its epoch was {was}, is {is}): \
         open the job with the next epoch and submit the open groups again"
    )]
    StateLost { was: u64, is: u64 },
    /// A trajectory that contradicts itself; its batch is not acknowledged.
    #[error("batch {seq}: {why}")]
    Malformed { seq: u64, why: String },
    #[error("the manager broke the protocol in {call}: {what}")]
    Protocol { call: &'static str, what: String },
    #[error("version {number}: {why}")]
    Publish { number: u64, why: String },
    #[error("the job was closed")]
    Closed,
}

/// What a failed call means for the one who made it.
pub(crate) enum Failure {
    /// The link or the manager's process; the same call may work later.
    Transport(String),
    /// The manager does not know something, most likely the session: open the job again, once.
    NotFound(String),
    Final(Error),
}

// === impl Error ===

impl Error {
    /// Whether the same call can succeed later, unchanged.
    pub fn retry(&self) -> bool {
        matches!(self, Error::Unreachable { .. })
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Error::Invalid(what.into())
    }
}

// === impl Failure ===

impl Failure {
    pub(crate) fn of(call: &'static str, status: &Status) -> Self {
        let why = status.message().to_owned();
        match status.code() {
            Code::NotFound => Failure::NotFound(why),
            Code::Unauthenticated | Code::PermissionDenied => {
                Failure::Final(Error::NotPermitted { call, why })
            }
            Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::AlreadyExists
            // Another consumer took this shard over.
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::DataLoss => Failure::Final(Error::Refused { call, why }),
            code => Failure::Transport(format!("{code:?}: {why}")),
        }
    }

    pub(crate) fn into_error(self, call: &'static str, within: Duration) -> Error {
        match self {
            Failure::Final(error) => error,
            Failure::NotFound(why) => Error::Refused { call, why },
            Failure::Transport(detail) => Error::Unreachable { call, within, detail },
        }
    }
}
