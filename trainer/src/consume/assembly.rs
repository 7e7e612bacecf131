//! Assembly of parts into batches, each exactly once: a batch that is offered again after a lost link is
//! recognized by its number. Decides only; the attachment feeds it.
//!
//! ```text
//!   Idle ── part 0 ──► Open{seq, next part} ── last part ──► Idle (batch given out)
//! ```

use std::collections::BTreeSet;

use anabranch_proto::{BatchSeq, Step, pb};

use super::credit::Amount;
use super::{Batch, StepDone};
use crate::trajectory::Trajectory;

/// Steps whose end was told, so that telling it again is not seen; older ones are forgotten.
const STEPS_REMEMBERED: usize = 4096;

/// Batches of one consumer, over all its attachments.
#[derive(Debug, Default)]
pub(crate) struct Assembly {
    /// Number of the last whole batch.
    last: Option<u64>,
    state: State,
    /// Steps whose end was told; at most [`STEPS_REMEMBERED`].
    steps: BTreeSet<u64>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    Open {
        batch: Batch,
        next_part: u32,
        cost: Amount,
    },
}

/// Result of taking a part.
#[derive(Debug, PartialEq)]
pub(crate) enum Took {
    /// The batch is incomplete.
    More,
    /// The batch was given out before; it is to be acknowledged again.
    Again {
        /// Number of the batch.
        seq: u64,
    },
    /// The batch is complete.
    Whole {
        /// The batch.
        batch: Batch,
        /// Sum over its parts.
        cost: Amount,
    },
}

// === impl Assembly ===

impl Assembly {
    /// Starts a new attachment, on which an incomplete batch comes again from its first part.
    pub(crate) fn reattached(&mut self) {
        self.state = State::Idle;
    }

    /// Takes a part that cost `cost`. The error says how the part contradicts what came before.
    pub(crate) fn part(&mut self, part: pb::Part, cost: Amount) -> Result<Took, String> {
        if part.seq == 0 {
            return Err("batches count from 1".into());
        }
        if self.last.is_some_and(|last| part.seq <= last) {
            return Ok(match part.last_part {
                true => Took::Again { seq: part.seq },
                false => Took::More,
            });
        }
        let (mut batch, next_part, so_far) = self.open(&part)?;
        if part.part != next_part {
            let got = part.part;
            return Err(format!("part {got} came where part {next_part} was expected"));
        }
        let cost = so_far.plus(cost, 1);
        for trajectory in part.trajectories {
            batch.trajectories.push(Trajectory::from_wire(trajectory)?);
        }
        batch.last_of_step |= part.last_of_step;
        if part.last_part {
            self.last = Some(batch.seq.0);
            return Ok(Took::Whole { batch, cost });
        }
        self.state = State::Open { batch, next_part: next_part + 1, cost };
        Ok(Took::More)
    }

    /// Takes the end of a step; `None` if it was told before.
    pub(crate) fn step_done(&mut self, done: pb::StepDone) -> Option<StepDone> {
        if !self.steps.insert(done.step) {
            return None;
        }
        if self.steps.len() > STEPS_REMEMBERED {
            self.steps.pop_first();
        }
        Some(StepDone::from_wire(done))
    }

    fn open(&mut self, part: &pb::Part) -> Result<(Batch, u32, Amount), String> {
        match std::mem::take(&mut self.state) {
            State::Idle => {
                if let Some(last) = self.last.filter(|last| part.seq != last + 1) {
                    return Err(format!("it followed batch {last}: batches between are missing"));
                }
                Ok((Batch::open(part), 0, Amount::default()))
            }
            State::Open { batch, next_part, cost } if batch.seq.0 == part.seq => {
                Ok((batch, next_part, cost))
            }
            State::Open { batch, .. } => {
                Err(format!("it began before batch {} had its last part", batch.seq.0))
            }
        }
    }
}

impl Batch {
    fn open(part: &pb::Part) -> Self {
        Self {
            seq: BatchSeq(part.seq),
            step: Step(part.step),
            last_of_step: false,
            trajectories: Vec::new(),
            samples_of_all_shards: part.batch_samples,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trajectory::tests::sample;

    const COST: Amount = Amount { bytes: 10, samples: 1 };

    fn part(seq: u64, part: u32, last: bool) -> pb::Part {
        pb::Part {
            seq,
            step: 1,
            part,
            last_part: last,
            last_of_step: false,
            trajectories: vec![sample(&format!("{seq}"), part, &[1, 2])],
            batch_samples: 2,
        }
    }

    fn whole(took: Result<Took, String>) -> (u64, usize, i64) {
        match took.expect("sound") {
            Took::Whole { batch, cost } => (batch.seq.0, batch.trajectories.len(), cost.bytes),
            other => panic!("expected a whole batch, got {other:?}"),
        }
    }

    #[test]
    fn parts_become_one_batch() {
        let mut assembly = Assembly::default();
        assert_eq!(assembly.part(part(5, 0, false), COST), Ok(Took::More));
        assert_eq!(whole(assembly.part(part(5, 1, true), COST)), (5, 2, 20));
        assert_eq!(whole(assembly.part(part(6, 0, true), COST)), (6, 1, 10));
    }

    #[test]
    fn a_batch_offered_again_is_not_given_out_again() {
        let mut assembly = Assembly::default();
        whole(assembly.part(part(1, 0, true), COST));
        assembly.part(part(2, 0, false), COST).expect("sound");
        assembly.reattached();
        assert_eq!(assembly.part(part(1, 0, false), COST), Ok(Took::More));
        assert_eq!(assembly.part(part(1, 1, true), COST), Ok(Took::Again { seq: 1 }));
        assert_eq!(assembly.part(part(2, 0, false), COST), Ok(Took::More));
        assert_eq!(whole(assembly.part(part(2, 1, true), COST)), (2, 2, 20));
    }

    #[test]
    fn gaps_and_broken_orders_are_errors_that_say_where() {
        let mut assembly = Assembly::default();
        whole(assembly.part(part(1, 0, true), COST));
        let why = assembly.part(part(3, 0, true), COST).expect_err("batch 2 is missing");
        assert!(why.contains("followed batch 1"), "{why}");
        assembly.part(part(2, 0, false), COST).expect("sound");
        assert!(assembly.part(part(3, 0, true), COST).expect_err("2 is open").contains("batch 2"));
        assembly.part(part(2, 0, false), COST).expect("sound");
        assert!(
            assembly.part(part(2, 2, true), COST).expect_err("1 is missing").contains("part 1")
        );
    }

    #[test]
    fn the_end_of_a_step_is_told_once() {
        let mut assembly = Assembly::default();
        let done = pb::StepDone { step: 4, delivered: 8, ..Default::default() };
        assert_eq!(assembly.step_done(done.clone()).map(|d| d.delivered), Some(8));
        assert_eq!(assembly.step_done(done), None);
    }

    #[test]
    fn a_new_attachment_begins_an_incomplete_batch_again() {
        let mut assembly = Assembly::default();
        assembly.part(part(1, 0, false), COST).expect("sound");
        assembly.reattached();
        let why = assembly.part(part(1, 1, true), COST).expect_err("part 0 is missing");
        assert!(why.contains("part 1 came where part 0"), "{why}");
        assembly.reattached();
        assembly.part(part(1, 0, false), COST).expect("sound");
        assert_eq!(whole(assembly.part(part(1, 1, true), COST)), (1, 2, 20));
    }

    #[test]
    fn a_batch_tells_its_step_and_whether_it_is_the_steps_last() {
        let mut assembly = Assembly::default();
        let last = pb::Part { last_of_step: true, ..part(1, 0, true) };
        match assembly.part(last, COST).expect("sound") {
            Took::Whole { batch, .. } => {
                assert_eq!((batch.step, batch.last_of_step), (Step(1), true));
                assert_eq!(batch.samples_of_all_shards, 2);
            }
            other => panic!("expected a whole batch, got {other:?}"),
        }
        assert!(assembly.part(part(0, 0, true), COST).expect_err("no 0").contains("from 1"));
    }

    #[test]
    fn ends_of_steps_are_remembered_up_to_a_bound() {
        let mut assembly = Assembly::default();
        let done = |step| pb::StepDone { step, ..Default::default() };
        for step in 0..=STEPS_REMEMBERED as u64 {
            assert!(assembly.step_done(done(step)).is_some());
        }
        assert_eq!(assembly.steps.len(), STEPS_REMEMBERED);
        assert!(assembly.step_done(done(STEPS_REMEMBERED as u64)).is_none());
    }
}
