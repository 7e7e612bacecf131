//! Fold: the durable state of the core as a journal would have it, folded from the changes of each turn.

use super::Core;
use crate::{fleet, job, rollout, weights};

/// Durable changes of a turn, owner by owner, each in order.
#[derive(Debug, Default)]
pub struct Changes {
    job: Vec<job::Change>,
    rollout: Vec<(rollout::StreamId, rollout::Change)>,
    fleet: Vec<fleet::Change>,
    weights: Vec<(weights::LineageId, weights::Change)>,
}

/// Durable state that was folded from changes alone.
#[derive(Default)]
pub struct Folded {
    job: job::Books,
    rollout: rollout::Books,
    fleet: fleet::Books,
    weights: weights::Books,
}

impl Changes {
    /// Number of changes of all owners.
    pub fn len(&self) -> usize {
        self.job.len() + self.rollout.len() + self.fleet.len() + self.weights.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Core {
    /// Durable changes since the last call. Whoever drives the core takes them each turn.
    pub fn take_changes(&mut self) -> Changes {
        let (stream, lineage) = (self.rollout.stream, self.weights.lineage);
        let of_stream = |change| (stream, change);
        let of_lineage = |change| (lineage, change);
        Changes {
            job: self.job.take_changes(),
            rollout: self.rollout.take_changes().into_iter().map(of_stream).collect(),
            fleet: self.fleet.take_changes(),
            weights: self.weights.take_changes().into_iter().map(of_lineage).collect(),
        }
    }

    /// `Err` names the first part in which folded state differs from the live one.
    pub fn check_fold(&self, folded: &Folded) -> Result<(), String> {
        let differs =
            |owner: &str, part: &str| format!("{owner}: folded {part} differ from live ones");
        let rollout = self.rollout.books().same_books(&folded.rollout);
        rollout.map_err(|part| differs("rollout", part))?;
        let weights = self.weights.books().same_books(&folded.weights);
        weights.map_err(|part| differs("weights", part))?;
        if *self.job.books() != folded.job {
            return Err(differs("job", "settings or sessions"));
        }
        match *self.fleet.books() == folded.fleet {
            true => Ok(()),
            false => Err(differs("fleet", "sessions")),
        }
    }
}

impl Folded {
    pub fn apply(&mut self, changes: &Changes) {
        changes.job.iter().for_each(|change| self.job.apply(change));
        changes.rollout.iter().for_each(|(_, change)| self.rollout.apply(change));
        changes.weights.iter().for_each(|(_, change)| self.weights.apply(change));
        changes.fleet.iter().for_each(|change| {
            self.fleet.apply(change);
        });
    }
}
