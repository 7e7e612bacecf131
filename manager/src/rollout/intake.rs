//! Intake: admitted groups enter the books and the queue.

use std::sync::Arc;

use anabranch_proto::{GroupId, SampleId, Step};

use super::Rollout;
use super::change::Change;
use super::group::GroupSpec;
use crate::outbox::Outbox;

impl Rollout {
    /// Takes an admitted group in. Its leader enters the queue; siblings follow once the leader's prefix is cached.
    pub fn admit(&mut self, id: GroupId, spec: GroupSpec, out: &mut Outbox) {
        if let Some(pin) = spec.pin {
            let pinned = self.pins.entry(pin).or_default();
            pinned.open_samples += spec.n;
            pinned.groups.insert(id);
            self.pins_changed = true;
        }
        self.commit_change(Change::Admitted { group: id, spec: Arc::new(spec) });
        self.enqueue(SampleId { group: id, index: 0 }, out);
    }

    /// The trainer names a step; `is_final`: all groups of the step have been submitted.
    pub fn name_step(&mut self, step: Step, is_final: bool) {
        let known = self.books.step(step).is_some_and(|book| book.is_final || !is_final);
        if !known {
            self.commit_change(Change::StepNamed { step, is_final });
        }
    }
}
