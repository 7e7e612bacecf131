//! Submitting prompt groups for a step: the builder, and the loop that sends until every group is settled.
//! The next request and the meaning of an answer are decided in `pending`.

mod pending;

use std::time::Duration;

use anabranch_proto::{Step, pb};

use crate::error::Error;
use crate::group::Group;
use crate::retry::Tries;
use crate::session::{CALL_WITHIN, Session};
use crate::verdict::{Outcome, Verdict};
use pending::Pending;

/// Name of the call in errors and logs.
const CALL: &str = "submit";

/// A submit that is being put together. [`Submit::send`] sends it; until then nothing happens.
///
/// Groups that do not fit into the manager now, and lost links, are tried again until the
/// [`Submit::timeout`]. Sending the same groups again is safe: the manager knows their keys.
#[derive(Debug)]
#[must_use = "nothing is submitted before `send` is awaited"]
pub struct Submit<'a> {
    session: &'a Session,
    step: Step,
    groups: Vec<Group>,
    last: bool,
    timeout: Duration,
    allow_rejected: bool,
}

/// Result of a submit: a verdict on every group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submitted {
    /// The step.
    pub step: Step,
    /// One verdict for each group, in the order given.
    pub verdicts: Vec<Verdict>,
    /// The manager knows that no more groups come for the step.
    pub closed: bool,
}

// === impl Submit ===

impl<'a> Submit<'a> {
    pub(crate) fn new(session: &'a Session, step: Step) -> Self {
        let (groups, timeout) = (Vec::new(), CALL_WITHIN);
        Self { session, step, groups, last: false, timeout, allow_rejected: false }
    }

    /// Adds one group.
    pub fn group(mut self, group: Group) -> Self {
        self.groups.push(group);
        self
    }

    /// Adds groups.
    pub fn groups(mut self, groups: impl IntoIterator<Item = Group>) -> Self {
        self.groups.extend(groups);
        self
    }

    /// Closes the step once its groups are settled: no more groups come for it. Without groups it only
    /// closes the step.
    pub fn last(mut self) -> Self {
        self.last = true;
        self
    }

    /// Gives up on groups that the manager has no room for, and on a manager that is away, after
    /// `timeout`. Default 60 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Makes groups that were not taken part of the result; without it they are
    /// [`Error::Rejected`].
    pub fn allow_rejected(mut self) -> Self {
        self.allow_rejected = true;
        self
    }

    /// Sends the groups, and closes the step if this is its [`Submit::last`] submit.
    ///
    /// The step stays open, for the caller to decide, in two cases: the call fails with
    /// [`Error::Rejected`], or it is allowed to be rejected and some groups found no room
    /// ([`Outcome::Full`]). [`Submitted::closed`] tells.
    pub async fn send(self) -> Result<Submitted, Error> {
        let Self { session, step, groups, last, timeout, allow_rejected } = self;
        let mut pending = Pending::new(groups)?;
        let tries = Tries::new(CALL, timeout);
        while !pending.is_settled() {
            let sent = pending.next_request();
            let reply = request(session, step, sent.clone(), false, tries.left()).await?;
            let pause = pending
                .answered(&sent, reply)
                .map_err(|what| Error::Protocol { call: CALL, what })?;
            if !pause.is_zero() && pause >= tries.left() {
                break;
            }
            tokio::time::sleep(pause).await;
        }
        let mut submitted = Submitted::new(step, pending.finish(), allow_rejected)?;
        if last && submitted.is_settled() {
            request(session, step, Vec::new(), true, tries.left().max(CALL_WITHIN)).await?;
            submitted.closed = true;
        }
        Ok(submitted)
    }
}

async fn request(
    session: &Session,
    step: Step,
    groups: Vec<pb::Group>,
    last: bool,
    within: Duration,
) -> Result<pb::Submitted, Error> {
    let call = session.call(CALL, within, |mut rpc, session| {
        let (groups, step) = (groups.clone(), step.0);
        async move { rpc.submit(pb::SubmitRequest { session, step, r#final: last, groups }).await }
    });
    call.await
}

// === impl Submitted ===

impl Submitted {
    fn new(step: Step, verdicts: Vec<Verdict>, allow_rejected: bool) -> Result<Self, Error> {
        if allow_rejected || verdicts.iter().all(Verdict::is_taken) {
            return Ok(Self { step, verdicts, closed: false });
        }
        let of = verdicts.len();
        let not_taken = verdicts.into_iter().filter(|verdict| !verdict.is_taken()).collect();
        Err(Error::Rejected { step, of, verdicts: not_taken })
    }

    fn is_settled(&self) -> bool {
        !self.verdicts.iter().any(|verdict| matches!(verdict.outcome, Outcome::Full { .. }))
    }

    /// Number of groups that the manager took with this submit.
    pub fn accepted(&self) -> usize {
        self.verdicts.iter().filter(|verdict| verdict.outcome == Outcome::Accepted).count()
    }

    /// Keys that the manager had already, from an earlier submit.
    pub fn duplicates(&self) -> impl Iterator<Item = &str> {
        let known = |verdict: &&Verdict| verdict.outcome == Outcome::Duplicate;
        self.verdicts.iter().filter(known).map(|verdict| verdict.key.as_str())
    }

    /// Verdicts on the groups that were not taken: rejected, or without room. Empty unless the submit was
    /// [allowed](Submit::allow_rejected) to be rejected.
    pub fn rejected(&self) -> impl Iterator<Item = &Verdict> {
        self.verdicts.iter().filter(|verdict| !verdict.is_taken())
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Sampling;

    use super::*;

    fn verdict(key: &str, outcome: Outcome) -> Verdict {
        Verdict { key: key.into(), outcome }
    }

    fn mixed() -> Vec<Verdict> {
        vec![
            verdict("a", Outcome::Accepted),
            verdict("b", Outcome::Rejected { why: "too long".into() }),
            verdict("c", Outcome::Duplicate),
            verdict("d", Outcome::Rejected { why: "no engine fits".into() }),
        ]
    }

    #[test]
    fn rejections_are_an_error_that_names_the_groups() {
        let error = Submitted::new(Step(7), mixed(), false).expect_err("two were rejected");
        assert_eq!(
            error.to_string(),
            "step 7: the manager did not take 2 of 4 groups; group \"b\": too long; group \"d\": no engine fits"
        );
        assert!(!error.retry(), "rejected groups stay rejected");
        let Error::Rejected { verdicts, .. } = error else { panic!("another error") };
        assert_eq!(verdicts.len(), 2);
    }

    #[test]
    fn allowed_rejections_are_verdicts_and_duplicates_can_be_seen() {
        let submitted = Submitted::new(Step(7), mixed(), true).expect("allowed");
        assert_eq!(submitted.accepted(), 1);
        assert_eq!(submitted.duplicates().collect::<Vec<_>>(), ["c"]);
        let rejected: Vec<_> = submitted.rejected().map(|v| v.key.as_str()).collect();
        assert_eq!(rejected, ["b", "d"]);
        assert!(submitted.is_settled() && !submitted.closed);
    }

    #[test]
    fn a_group_without_room_keeps_the_step_open_and_may_be_tried_again() {
        let full = || vec![verdict("a", Outcome::Full { why: "full".into() })];
        let error = Submitted::new(Step(1), full(), false).expect_err("no room");
        assert!(error.retry());
        assert!(!Submitted::new(Step(1), full(), true).expect("allowed").is_settled());
    }

    #[tokio::test]
    async fn the_builder_collects_groups_and_refuses_what_could_never_work() {
        let session = Session::offline();
        let group = |key: &str| Group::new(key, vec![1], 1, Sampling::new(4));
        let submit = Submit::new(&session, Step(3))
            .group(group("a"))
            .groups([group("b"), group("c")])
            .timeout(Duration::from_secs(5))
            .last();
        assert_eq!((submit.groups.len(), submit.last, submit.allow_rejected), (3, true, false));
        assert_eq!(submit.timeout, Duration::from_secs(5));
        let twice = submit.group(group("a")).send().await.expect_err("the key a, twice");
        assert!(matches!(twice, Error::Invalid(_)), "{twice}");
        let nothing = Submit::new(&session, Step(3)).send().await.expect("nothing to send");
        assert_eq!((nothing.verdicts.len(), nothing.closed), (0, false));
    }
}
