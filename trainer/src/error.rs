//! Errors of the SDK, and what a failed call means: try again, open the job again, or give up.

use std::time::Duration;

use anabranch_proto::{BatchSeq, Invalid, Step};
use tonic::{Code, Status};

use crate::verdict::{Outcome, Verdict};

/// Failures between a trainer and its manager. Each message says what was wrong and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Refused here, before anything was sent.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The manager's address is none.
    #[error("cannot use the manager address {manager:?}: {why}")]
    Address {
        /// Address as given.
        manager: String,
        /// Reason.
        why: String,
    },
    /// Nobody answered in time. May be tried again.
    #[error(
        "the manager could not be reached for {call} within {within:?}: {detail}. \
         Check that `anabranch manager` runs and that its address is right"
    )]
    Unreachable {
        /// Call that was made.
        call: &'static str,
        /// Time that it had.
        within: Duration,
        /// Result of the last try.
        detail: String,
    },
    /// The manager refuses the call; it will refuse it again.
    #[error("the manager refused {call}: {why}")]
    Refused {
        /// Call that was made.
        call: &'static str,
        /// Reason that the manager gave.
        why: String,
    },
    /// The token is missing, void, or of another role.
    #[error(
        "the manager does not let this trainer {call}: {why}. Check the join token and its role"
    )]
    NotPermitted {
        /// Call that was made.
        call: &'static str,
        /// Reason that the manager gave.
        why: String,
    },
    /// Groups of a submit were not taken; the others were. The step is still open.
    #[error("step {}: {}", step.0, not_taken(verdicts, *of))]
    Rejected {
        /// Step of the submit.
        step: Step,
        /// Groups of the submit.
        of: usize,
        /// Verdicts on those that were not taken.
        verdicts: Vec<Verdict>,
    },
    /// The manager restarted without its state: what was submitted and not delivered is gone.
    #[error(
        "the manager lost its state (its epoch was {was}, is {is}): \
         open the job with the next epoch and submit the open groups again"
    )]
    StateLost {
        /// Epoch of the manager when the job was opened.
        was: u64,
        /// Epoch of the manager now.
        is: u64,
    },
    /// A trajectory contradicts itself; its batch is not acknowledged.
    #[error("batch {}: {why}", seq.0)]
    Malformed {
        /// The batch.
        seq: BatchSeq,
        /// The contradiction.
        why: String,
    },
    /// The manager said something that the protocol does not allow.
    #[error("the manager broke the protocol in {call}: {what}")]
    Protocol {
        /// Call that was made.
        call: &'static str,
        /// The breach.
        what: String,
    },
    /// A version was not published.
    #[error("version {number}: {why}")]
    Publish {
        /// Number of the version.
        number: u64,
        /// Reason.
        why: String,
    },
    /// The job was closed here.
    #[error("the job was closed")]
    Closed,
}

/// Kinds of failures, by what the caller must do.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The link or the manager's process failed: the same call may work later.
    Transport(String),
    /// The manager does not know something, most likely the session: open the job again, once.
    NotFound(String),
    /// Nothing helps.
    Final(Error),
}

/// Groups that a message names, at most.
const NAMED: usize = 3;

// === impl Error ===

impl Error {
    /// True if the same call can succeed later, unchanged.
    pub fn retry(&self) -> bool {
        match self {
            Error::Unreachable { .. } => true,
            Error::Rejected { verdicts, .. } => {
                verdicts.iter().all(|verdict| matches!(verdict.outcome, Outcome::Full { .. }))
            }
            _ => false,
        }
    }
}

fn not_taken(verdicts: &[Verdict], of: usize) -> String {
    let mut text = format!("the manager did not take {} of {of} groups", verdicts.len());
    for verdict in verdicts.iter().take(NAMED) {
        let why = verdict.why_not().unwrap_or_default();
        text += &format!("; group {:?}: {why}", verdict.key);
    }
    if verdicts.len() > NAMED {
        text += &format!("; and {} more", verdicts.len() - NAMED);
    }
    text
}

// === impl Failure ===

impl Failure {
    /// Failure of `call`, which the manager or the transport answered with `status`.
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

    /// Error of a call that is not tried again.
    pub(crate) fn into_error(self, call: &'static str, within: Duration) -> Error {
        match self {
            Failure::Final(error) => error,
            Failure::NotFound(why) => Error::Refused { call, why },
            Failure::Transport(detail) => Error::Unreachable { call, within, detail },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_say_whether_to_try_again_to_open_again_or_to_give_up() {
        let failure = |code| Failure::of("submit", &Status::new(code, "why"));
        for code in [Code::Unavailable, Code::Unknown, Code::DeadlineExceeded, Code::Cancelled] {
            assert!(matches!(failure(code), Failure::Transport(_)), "{code:?}");
        }
        assert!(matches!(failure(Code::NotFound), Failure::NotFound(_)));
        for code in [Code::InvalidArgument, Code::Aborted, Code::Unimplemented] {
            let Failure::Final(error) = failure(code) else { panic!("{code:?} is final") };
            assert_eq!(error.to_string(), "the manager refused submit: why");
        }
        let Failure::Final(error) = failure(Code::PermissionDenied) else { panic!("final") };
        assert!(error.to_string().contains("join token"), "{error}");
    }

    #[test]
    fn a_long_list_of_rejected_groups_is_cut() {
        let verdict = |i: u32| Verdict {
            key: format!("g{i}"),
            outcome: Outcome::Rejected { why: "no".into() },
        };
        let verdicts = (0..5).map(verdict).collect();
        let text = Error::Rejected { step: Step(2), of: 8, verdicts }.to_string();
        assert_eq!(
            text,
            "step 2: the manager did not take 5 of 8 groups; group \"g0\": no; group \"g1\": no; group \"g2\": no; and 2 more"
        );
    }
}
