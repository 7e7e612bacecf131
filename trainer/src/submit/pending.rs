//! Groups of one submit that are still to be sent, in requests of bounded size, and the verdicts so far.
//! Decides only; the builder sends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anabranch_proto::{Invalid, pb};
use pb::submitted::result::Kind;

use crate::error::Error;
use crate::group::{GROUP_BYTES, Group};
use crate::verdict::{Outcome, Verdict};

/// Bytes of one request: few enough that a retry is cheap, far below the manager's limit.
const REQUEST_BYTES: usize = 8 << 20;

/// Longest pause that stands in for a very short one of the manager.
const FULL_PAUSE: Duration = Duration::from_millis(200);

/// Groups of one submit call, sent and to be sent.
///
/// ```text
///   open ── accepted, duplicate, rejected ──► settled
///     ▲── full for now ──┘                    (all settled: the step may be closed)
/// ```
#[derive(Debug)]
pub(crate) struct Pending {
    order: Vec<String>,
    open: Vec<pb::Group>,
    full: BTreeMap<String, String>,
    settled: BTreeMap<String, Outcome>,
}

// === impl Pending ===

impl Pending {
    /// All groups open. Refuses groups that could never work, and a key that stands twice.
    pub(crate) fn new(groups: Vec<Group>) -> Result<Self, Error> {
        let mut seen = BTreeSet::new();
        for group in &groups {
            group.check()?;
            if !seen.insert(group.key()) {
                let key = group.key();
                let what = format!("{key:?} stands twice in one submit; a key names one group");
                return Err(Invalid::rule("key", what).into());
            }
        }
        Ok(Self {
            order: groups.iter().map(|g| g.key().to_owned()).collect(),
            open: groups.into_iter().map(Group::into_wire).collect(),
            full: BTreeMap::new(),
            settled: BTreeMap::new(),
        })
    }

    /// True if no group is to be sent any more.
    pub(crate) fn is_settled(&self) -> bool {
        self.open.is_empty()
    }

    /// The groups of the next request, in the order given.
    pub(crate) fn next_request(&self) -> Vec<pb::Group> {
        let mut bytes = 0;
        let fits = self.open.iter().take_while(|group| {
            bytes += group.prompt.len() + group.meta.len() + group.key.len() + GROUP_BYTES;
            bytes <= REQUEST_BYTES
        });
        let count = fits.count().max(1).min(self.open.len());
        self.open[..count].to_vec()
    }

    /// Takes the answer to `sent`; returns how long to wait before the next request.
    pub(crate) fn answered(
        &mut self,
        sent: &[pb::Group],
        reply: pb::Submitted,
    ) -> Result<Duration, String> {
        let mut asked: BTreeSet<&str> = sent.iter().map(|group| group.key.as_str()).collect();
        let mut pause = Duration::ZERO;
        for result in reply.results {
            if !asked.remove(result.key.as_str()) {
                return Err(format!("an answer for {:?}, which was not asked", result.key));
            }
            pause = pause.max(self.settle(result)?);
        }
        if let Some(key) = asked.first() {
            return Err(format!("no answer for {key:?}"));
        }
        self.open.retain(|group| !self.settled.contains_key(&group.key));
        Ok(pause)
    }

    fn settle(&mut self, result: pb::submitted::Result) -> Result<Duration, String> {
        let outcome = match result.kind() {
            Kind::Accepted => Outcome::Accepted,
            Kind::Duplicate => Outcome::Duplicate,
            Kind::Rejected if result.retry_after_ms > 0 => {
                self.full.insert(result.key, result.why);
                return Ok(Duration::from_millis(result.retry_after_ms.into()).max(FULL_PAUSE / 4));
            }
            Kind::Rejected => Outcome::Rejected { why: result.why },
            Kind::Unspecified => return Err(format!("no outcome for {:?}", result.key)),
        };
        self.settled.insert(result.key, outcome);
        Ok(Duration::ZERO)
    }

    /// One verdict per group, in the order given.
    pub(crate) fn finish(mut self) -> Vec<Verdict> {
        let verdict = |key: String| {
            let outcome = self.settled.remove(&key).unwrap_or_else(|| Outcome::Full {
                why: self.full.remove(&key).unwrap_or_else(|| "not sent: the time was up".into()),
            });
            Verdict { key, outcome }
        };
        self.order.into_iter().map(verdict).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_proto::Sampling;

    fn pending(keys: &[&str], prompt: usize) -> Pending {
        let group = |key: &&str| Group::new(*key, vec![7; prompt], 1, Sampling::new(4));
        Pending::new(keys.iter().map(group).collect()).expect("sound")
    }

    fn answer(key: &str, kind: Kind, retry_after_ms: u32) -> pb::submitted::Result {
        let why = "because".to_owned();
        pb::submitted::Result { key: key.into(), kind: kind as i32, why, retry_after_ms }
    }

    fn reply(results: Vec<pb::submitted::Result>) -> pb::Submitted {
        pb::Submitted { results }
    }

    #[test]
    fn a_full_manager_is_asked_again_and_the_order_of_results_is_the_callers() {
        let mut p = pending(&["b", "a", "c"], 1);
        let sent = p.next_request();
        let pause = p
            .answered(
                &sent,
                reply(vec![
                    answer("a", Kind::Accepted, 0),
                    answer("b", Kind::Rejected, 500),
                    answer("c", Kind::Rejected, 0),
                ]),
            )
            .expect("sound");
        assert_eq!(pause, Duration::from_millis(500));
        assert!(!p.is_settled());
        let sent = p.next_request();
        assert_eq!(sent.iter().map(|g| g.key.as_str()).collect::<Vec<_>>(), ["b"]);
        p.answered(&sent, reply(vec![answer("b", Kind::Duplicate, 0)])).expect("sound");
        assert!(p.is_settled());
        let results: Vec<(String, bool)> =
            p.finish().into_iter().map(|v| (v.key.clone(), v.is_taken())).collect();
        assert_eq!(results, [("b".into(), true), ("a".into(), true), ("c".into(), false)]);
    }

    #[test]
    fn when_the_time_is_up_the_rest_is_reported_as_full() {
        let mut p = pending(&["a"], 1);
        let sent = p.next_request();
        p.answered(&sent, reply(vec![answer("a", Kind::Rejected, 1)])).expect("sound");
        let full = Outcome::Full { why: "because".into() };
        assert_eq!(p.finish()[0].outcome, full);
    }

    #[test]
    fn requests_are_cut_by_bytes_and_a_large_group_goes_alone() {
        let p = pending(&["a", "b", "c"], 1 << 20);
        assert_eq!(p.next_request().len(), 1, "two of 4 MiB are more than a request with overhead");
        assert_eq!(pending(&["a", "b", "c"], 1 << 19).next_request().len(), 3);
        assert_eq!(pending(&["a", "b"], 4 << 20).next_request().len(), 1);
    }

    #[test]
    fn answers_that_do_not_fit_the_request_are_errors() {
        let mut p = pending(&["a", "b"], 1);
        let sent = p.next_request();
        let foreign = reply(vec![answer("x", Kind::Accepted, 0)]);
        assert!(p.answered(&sent, foreign).expect_err("foreign").contains("\"x\""));
        let missing = reply(vec![answer("a", Kind::Accepted, 0)]);
        assert!(p.answered(&sent, missing).expect_err("missing").contains("\"b\""));
        let twice = vec![Group::new("a", vec![1], 1, Sampling::new(1)); 2];
        assert!(Pending::new(twice).is_err());
    }
}
