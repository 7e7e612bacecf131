//! The core's books must agree with each other after every event. Called by the simulation; costs a walk
//! over everything.

use std::collections::BTreeMap;

use anabranch_proto::{SampleId, SessionId};

use super::Core;
use crate::fleet::EngineState;
use crate::rollout::sample::SampleState;

impl Core {
    /// `Err` names the first disagreement.
    pub fn check(&self) -> Result<(), String> {
        self.check_samples()?;
        self.check_engines()?;
        self.check_bounds()
    }

    /// What is at rest holds nothing: no admitted tokens, no queue, no retained batch.
    pub fn check_at_rest(&self) -> Result<(), String> {
        let left = [
            ("admitted tokens", self.admitted_tokens as usize),
            ("groups", self.groups.len()),
            ("steps", self.steps.len()),
            ("queued samples", self.queue.iter().count()),
            ("retained batches", self.egress.retained()),
            ("running samples", self.engines.values().map(|engine| engine.running.len()).sum()),
        ];
        match left.iter().find(|(_, count)| *count > 0) {
            Some((what, count)) => Err(format!("I7: at rest, but {count} {what} are left")),
            None => Ok(()),
        }
    }

    fn check_samples(&self) -> Result<(), String> {
        let mut running: BTreeMap<SampleId, SessionId> = BTreeMap::new();
        let queued: std::collections::BTreeSet<SampleId> =
            self.queue.iter().map(|place| place.sample).collect();
        if queued.len() != self.queue.iter().count() {
            return Err("a sample is queued twice".into());
        }
        for (group, record) in &self.groups {
            for (index, sample) in record.samples.iter().enumerate() {
                let id = SampleId { group: *group, index: index as u32 };
                let in_queue = queued.contains(&id);
                if in_queue != (sample.state == SampleState::Waiting { queued: true }) {
                    return Err(format!("{id} is {:?}, in the queue: {in_queue}", sample.state));
                }
                let waits_outside = sample.state == SampleState::Waiting { queued: false };
                if waits_outside && (record.released || index == 0) {
                    return Err(format!("{id} waits for nothing, outside the queue"));
                }
                if let Some((session, _)) = sample.running_on() {
                    running.insert(id, session);
                }
            }
        }
        for (session, engine) in &self.engines {
            for (sample, there) in &engine.running {
                let state = self.sample(*sample).map(|s| &s.state);
                match self.sample(*sample).and_then(|s| s.running_on()) {
                    Some((at, attempt)) if at == *session && attempt == there.attempt => {}
                    _ => return Err(format!("{sample} runs on {} but is {state:?}", engine.id)),
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

    fn check_engines(&self) -> Result<(), String> {
        for engine in self.engines.values() {
            let weight: u64 = engine.running.values().map(|running| running.weight).sum();
            if weight != engine.committed_tokens {
                return Err(format!("{}: {weight} != {}", engine.id, engine.committed_tokens));
            }
            let idle = matches!(
                engine.state,
                EngineState::Joining
                    | EngineState::Released
                    | EngineState::Gone { .. }
                    | EngineState::Quarantined
            );
            if idle && !engine.running.is_empty() {
                return Err(format!("I4: {} is {:?} and runs samples", engine.id, engine.state));
            }
            if let EngineState::Serving { at } = engine.state
                && !at.is_base()
                && engine.hello.loaded != at
            {
                return Err(format!(
                    "I5: {} serves {at}, loaded {}",
                    engine.id, engine.hello.loaded
                ));
            }
        }
        Ok(())
    }

    fn check_bounds(&self) -> Result<(), String> {
        let admitted: u64 = self.groups.values().map(|group| group.budget()).sum();
        if admitted != self.admitted_tokens {
            return Err(format!(
                "I7: {admitted} tokens are admitted, booked {}",
                self.admitted_tokens
            ));
        }
        if admitted > self.config.admission_tokens {
            return Err(format!("I7: {admitted} admitted tokens are above the limit"));
        }
        Ok(())
    }
}
