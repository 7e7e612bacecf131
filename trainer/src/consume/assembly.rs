//! Puts parts together to batches, each exactly once: a batch offered again after a lost link is known
//! by its number. Decides only; the link feeds it.
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

#[derive(Debug, Default)]
pub(crate) struct Assembly {
    last: Option<u64>,
    state: State,
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

#[derive(Debug, PartialEq)]
pub(crate) enum Took {
    More,
    /// A batch that was given out before: to be acknowledged again.
    Again {
        seq: u64,
    },
    Whole {
        batch: Batch,
        cost: Amount,
    },
}

// === impl Assembly ===

impl Assembly {
    /// The link was lost: a batch that was incomplete is sent again from its first part.
    pub(crate) fn reattached(&mut self) {
        self.state = State::Idle;
    }

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

    /// `None`: this step's end was told before.
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
}
