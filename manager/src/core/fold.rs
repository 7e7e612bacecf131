//! Fold: the durable state of the core as a journal would have it, folded from the changes of each turn.

use anabranch_proto::VersionState;

use super::Core;
use crate::fleet::EngineState;
use crate::rollout::SampleState;
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

/// A move along a state graph: the machine, and the names of both states.
pub type Move = (&'static str, &'static str, &'static str);

/// Every move that the graphs of samples, engines and versions have.
pub fn graphs() -> Vec<Move> {
    fn edges<S>(
        machine: &'static str,
        states: &[S],
        name: fn(&S) -> &'static str,
        may_become: fn(&S, &S) -> bool,
    ) -> Vec<Move> {
        let pairs = states.iter().flat_map(|from| states.iter().map(move |to| (from, to)));
        let legal = pairs.filter(|(from, to)| may_become(from, to));
        legal.map(|(from, to)| (machine, name(from), name(to))).collect()
    }
    let mut all = edges("engine", &EngineState::all(), EngineState::name, EngineState::may_become);
    all.extend(edges("sample", &SampleState::all(), SampleState::name, SampleState::may_become));
    all.extend(edges(
        "version",
        VersionState::ALL,
        |state| state.name(),
        |from, to| from.may_become(*to),
    ));
    all
}

impl Folded {
    /// The same, and tells each move along a state graph.
    pub fn apply_telling(&mut self, changes: &Changes, tell: &mut dyn FnMut(Move)) {
        for (_, change) in &changes.rollout {
            if let rollout::Change::Moved { sample, to } = change
                && let Some(sample) = self.rollout.sample(*sample)
            {
                tell(("sample", sample.state().name(), to.name()));
            }
            if let rollout::Change::BatchCut { batch, .. } = change {
                batch.samples.iter().for_each(|_| tell(("sample", "finished", "delivered")));
            }
            self.rollout.apply(change);
        }
        for change in &changes.fleet {
            if let fleet::Change::Moved { session, to } = change
                && let Some(session) = self.fleet.session(*session)
            {
                tell(("engine", session.state().name(), to.name()));
            }
            self.fleet.apply(change);
        }
        for (_, change) in &changes.weights {
            if let weights::Change::Moved { number, to } = change
                && let Some(record) = self.weights.get(*number)
            {
                tell(("version", record.state().name(), to.name()));
            }
            match change {
                weights::Change::Sealed { .. } => tell(("version", "announced", "available")),
                weights::Change::Current { .. } => tell(("version", "available", "current")),
                _ => {}
            }
            self.weights.apply(change);
        }
        changes.job.iter().for_each(|change| self.job.apply(change));
    }

    pub fn apply(&mut self, changes: &Changes) {
        self.apply_telling(changes, &mut |_| {});
    }
}
