//! Checks: the core's books and indexes agree with each other. Called by the simulation after every event; costs
//! a walk over everything.

use std::collections::BTreeMap;

use anabranch_proto::{SampleId, SessionId};

use super::Core;
use crate::fleet::EngineState;
use crate::rollout::{Sample, SampleState};

impl Core {
    /// `Err` names the first disagreement.
    pub fn check(&self) -> Result<(), String> {
        self.check_moves()?;
        self.check_samples()?;
        self.check_engines()?;
        self.fleet.check_tally()?;
        self.weights.check_stages()?;
        self.check_bounds()
    }

    /// What is at rest holds nothing: no admitted tokens, no queue, no retained batch.
    pub fn check_at_rest(&self) -> Result<(), String> {
        let books = self.rollout.books();
        let left = [
            ("admitted tokens", books.admitted_tokens() as usize),
            ("groups", books.groups().count()),
            ("steps", books.steps().count()),
            ("queued samples", self.rollout.queue().len()),
            ("retained batches", books.retained()),
            ("running samples", self.fleet.engines().map(|engine| engine.running.len()).sum()),
            ("samples by state", books.counts().iter().sum::<u64>() as usize),
            ("pins", self.rollout.pins().len()),
            ("reserves", self.fleet.reserves().len()),
        ];
        match left.iter().find(|(_, count)| *count > 0) {
            Some((what, count)) => Err(format!("I7: at rest, but {count} {what} are left")),
            None => Ok(()),
        }
    }

    fn check_moves(&self) -> Result<(), String> {
        let illegal = [
            ("sample", self.rollout.books().illegal_moves()),
            ("engine", self.fleet.illegal_moves()),
            ("version", self.weights.books().illegal_moves()),
        ];
        match illegal.iter().find(|(_, moves)| *moves > 0) {
            Some((machine, _)) => Err(format!("a {machine} moved off its graph")),
            None => Ok(()),
        }
    }

    fn check_samples(&self) -> Result<(), String> {
        let mut running: BTreeMap<SampleId, SessionId> = BTreeMap::new();
        let mut oldest = Vec::new();
        for (id, group) in self.rollout.books().groups() {
            for (index, sample) in group.samples().iter().enumerate() {
                let sample_id = SampleId { group: id, index: index as u32 };
                self.check_queued(sample_id, sample, group.live.released)?;
                running.extend(sample.running_on().map(|(session, _)| (sample_id, session)));
            }
            let open = group.samples().iter().filter(|sample| sample.is_open()).count() as u32;
            if open != group.open_samples() {
                return Err(format!(
                    "group {}: {open} open, counted {}",
                    id.0,
                    group.open_samples()
                ));
            }
            if group.ages() && !group.is_over() && group.oldest() != u64::MAX {
                oldest.push((group.oldest(), id));
            }
        }
        let lowest = oldest.iter().map(|(oldest, _)| *oldest).min();
        if let Some(lowest) = lowest
            && (self.rollout.has_older_than(lowest) || !self.rollout.has_older_than(lowest + 1))
        {
            return Err(format!("ages: the oldest token is of v{lowest}, the index differs"));
        }
        for engine in self.fleet.engines() {
            for (sample, there) in &engine.running {
                let record = self.rollout.sample(*sample);
                match record.and_then(Sample::running_on) {
                    Some((at, attempt)) if at == engine.session && attempt == there.attempt => {}
                    _ => return Err(format!("{sample} runs on {} but is {record:?}", engine.id)),
                }
                running.remove(sample);
            }
        }
        match running.first_key_value() {
            Some((sample, session)) => {
                Err(format!("{sample} runs on session {}, which does not know it", session.0))
            }
            None => Ok(()),
        }
    }

    fn check_queued(&self, id: SampleId, sample: &Sample, released: bool) -> Result<(), String> {
        let queued = self.rollout.queue().contains(id);
        let waits = *sample.state() == SampleState::Waiting;
        if queued && !waits {
            return Err(format!("{id} is {:?} and in the queue", sample.state()));
        }
        if waits && !queued && !sample.live.ending && (released || id.index == 0) {
            return Err(format!("{id} waits for nothing, outside the queue"));
        }
        Ok(())
    }

    fn check_engines(&self) -> Result<(), String> {
        for engine in self.fleet.engines() {
            let weight: u64 = engine.running.values().map(|running| running.weight).sum();
            if weight != engine.committed_tokens {
                return Err(format!("{}: {weight} != {}", engine.id, engine.committed_tokens));
            }
            let book = self.fleet.books().session(engine.session);
            let Some(book) = book else { return Err(format!("{} has no book", engine.id)) };
            if book.state() != engine.state() {
                return Err(format!("{}: state and book differ", engine.id));
            }
            let idle = matches!(
                engine.state(),
                EngineState::Joining
                    | EngineState::Released
                    | EngineState::Gone { .. }
                    | EngineState::Quarantined
            );
            if idle && !engine.running.is_empty() {
                return Err(format!("I4: {} is {:?} and runs samples", engine.id, engine.state()));
            }
            if let EngineState::Serving { at } = *engine.state()
                && !at.is_base()
                && book.loaded() != at
            {
                return Err(format!("I5: {} serves {at}, loaded {}", engine.id, book.loaded()));
            }
        }
        Ok(())
    }

    fn check_bounds(&self) -> Result<(), String> {
        let books = self.rollout.books();
        let admitted: u64 = books.groups().map(|(_, group)| group.booked()).sum();
        let booked = books.admitted_tokens();
        if admitted != booked {
            return Err(format!("I7: {admitted} tokens are admitted, booked {booked}"));
        }
        if admitted > self.config.admission_tokens {
            return Err(format!("I7: {admitted} admitted tokens are above the limit"));
        }
        Ok(())
    }
}
