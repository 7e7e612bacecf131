//! Messages that one consumer still owes to the manager: acknowledgements and the newest commit. Decides only;
//! the attachment sends.

use anabranch_proto::{BatchSeq, Version, pb};
use pb::from_consumer::Kind as Out;

/// Acknowledgements in order, then the commit.
#[derive(Debug, Default)]
pub(crate) struct Due {
    acked: u64,
    received: u64,
    /// A step's last batch is acknowledged with its `StepDone`, which would else be lost with the link.
    step_open: Option<u64>,
    /// Given to the stream of this attachment.
    committed: u64,
    commit: Option<(BatchSeq, Version)>,
}

// === impl Due ===

impl Due {
    /// Starts again on a new stream: the manager may not have heard what was said on the old one.
    pub(crate) fn reattached(&mut self) {
        self.committed = 0;
    }

    /// A whole batch was received.
    pub(crate) fn received(&mut self, seq: u64, last_of_step: bool) {
        if self.received == 0 {
            self.acked = seq.saturating_sub(1);
        }
        self.received = seq;
        self.step_open = last_of_step.then_some(seq);
    }

    /// The end of the step whose last batch is `seq` was told.
    pub(crate) fn step_done(&mut self, seq: u64) {
        self.step_open = self.step_open.filter(|open| *open > seq);
    }

    /// A batch that was received before came once more: its acknowledgement was lost.
    pub(crate) fn again(&mut self, seq: u64) {
        self.acked = self.acked.min(seq.saturating_sub(1));
    }

    /// The caller committed up to here.
    pub(crate) fn commit(&mut self, commit: Option<(BatchSeq, Version)>) {
        self.commit = commit;
    }

    /// Highest batch whose commit was given to the stream of this attachment.
    pub(crate) fn committed(&self) -> BatchSeq {
        BatchSeq(self.committed)
    }

    /// True if there is something to say.
    pub(crate) fn any(&self) -> bool {
        self.acked < self.ack_to() || self.commit_due().is_some()
    }

    /// The next thing to say; only called if there is one.
    pub(crate) fn next(&mut self) -> Out {
        if self.acked < self.ack_to() {
            self.acked += 1;
            return Out::Ack(pb::Ack { seq: self.acked });
        }
        let (seq, version) = self.commit_due().expect("next is called where something is due");
        self.committed = seq.0;
        Out::Commit(pb::Commit { seq: seq.0, version: Some(version.into()) })
    }

    fn ack_to(&self) -> u64 {
        self.step_open.map_or(self.received, |open| open - 1)
    }

    fn commit_due(&self) -> Option<(BatchSeq, Version)> {
        self.commit.filter(|(seq, _)| seq.0 > self.committed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that is due: acknowledgements as they are, commits from 100 up.
    fn said(due: &mut Due) -> Vec<u64> {
        let mut said = Vec::new();
        while due.any() {
            said.push(match due.next() {
                Out::Ack(ack) => ack.seq,
                Out::Commit(commit) => 100 + commit.seq,
                other => panic!("neither ack nor commit: {other:?}"),
            });
        }
        said
    }

    #[test]
    fn batches_are_acknowledged_in_order_from_the_first_one_received() {
        let mut due = Due::default();
        due.received(5, false);
        due.received(6, false);
        assert_eq!(said(&mut due), [5, 6]);
        due.again(5);
        assert_eq!(said(&mut due), [5, 6]);
    }

    #[test]
    fn a_steps_last_batch_waits_for_the_end_of_its_step() {
        let mut due = Due::default();
        due.received(1, false);
        due.received(2, true);
        assert_eq!(said(&mut due), [1]);
        due.step_done(1);
        assert_eq!(said(&mut due), [] as [u64; 0], "an older step's end");
        due.step_done(2);
        assert_eq!(said(&mut due), [2]);
    }

    #[test]
    fn the_newest_commit_is_said_once_on_every_stream() {
        let mut due = Due::default();
        due.received(1, false);
        due.commit(Some((BatchSeq(1), Version::base(0))));
        assert_eq!(said(&mut due), [1, 101]);
        assert_eq!(due.committed(), BatchSeq(1));
        due.reattached();
        assert_eq!(said(&mut due), [101]);
    }
}
