//! The trainer's side of the bench: keeps the queue full, takes batches and commits them, numbers versions. Owns what a
//! trainer knows; when it speaks is the world's.

use std::ops::Range;
use std::sync::Arc;

use anabranch_proto::{BatchSeq, SessionId, Step};

use super::events::{self, Event};

/// Samples of a group.
pub const N: u32 = 4;
/// Groups of one submit request.
const REQUEST: u64 = 64;
/// Groups of a step, for each engine: a larger fleet trains on larger steps.
const STEP_GROUPS_PER_ENGINE: u64 = 32;

pub struct Trainer {
    pub session: SessionId,
    pub acked: BatchSeq,
    pub committed: BatchSeq,
    /// The newest version that was sealed.
    pub version: u64,
    /// The version that was current last.
    pub current: u64,
    /// The newest one waits to become current.
    pub waiting: bool,
    /// Set while the trainer has the colocated engines' memory.
    pub training: bool,
    step_groups: u64,
    submitted: u64,
    started: u64,
    sampling: Arc<events::Sampling>,
}

impl Trainer {
    pub fn new(engines: usize) -> Self {
        Self {
            session: SessionId(0),
            acked: BatchSeq(0),
            committed: BatchSeq(0),
            version: 0,
            current: 0,
            waiting: false,
            training: false,
            step_groups: (engines as u64 * STEP_GROUPS_PER_ENGINE).max(REQUEST),
            submitted: 0,
            started: 0,
            sampling: events::sampling(),
        }
    }

    /// A sample was placed; the first placement of a group's first sample takes the group off the queue.
    pub fn placed(&mut self, index: u32, attempt: u32) {
        self.started += u64::from(index == 0 && attempt == 1);
    }

    pub fn submitted(&self) -> u64 {
        self.submitted
    }

    /// Groups that wait for their first placement.
    pub fn queued(&self) -> u64 {
        self.submitted - self.started
    }

    /// A request that brings the queue nearer to `groups`; `None` while less than a request is missing.
    pub fn top_up(&mut self, groups: u64) -> Option<Event> {
        let missing = groups.saturating_sub(self.queued());
        (missing >= REQUEST).then(|| self.submit(REQUEST))
    }

    /// At most `groups` more, all of one step.
    pub fn submit(&mut self, groups: u64) -> Event {
        let step = self.submitted / self.step_groups;
        let keys = self.submitted..(self.submitted + groups).min((step + 1) * self.step_groups);
        self.submitted = keys.end;
        let is_final = keys.end.is_multiple_of(self.step_groups);
        self.request(Step(step), is_final, keys)
    }

    fn request(&self, step: Step, is_final: bool, keys: Range<u64>) -> Event {
        events::submitted(self.session, step, is_final, keys, N, &self.sampling)
    }

    /// Batches that the trainer has and has not committed yet.
    pub fn commit(&mut self) -> Option<Event> {
        let seq = self.acked;
        let newer = seq > std::mem::replace(&mut self.committed, seq);
        newer.then_some(Event::BatchCommitted { consumer: events::CONSUMER, seq })
    }

    pub fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_never_spans_two_steps_and_the_last_of_a_step_says_so() {
        let mut trainer = Trainer::new(3);
        let mut finals = Vec::new();
        for _ in 0..4 {
            if let Event::GroupsSubmitted { step, is_final, groups, .. } = trainer.submit(64) {
                finals.push((step.0, groups.len(), is_final));
            }
        }
        assert_eq!(finals, [(0, 64, false), (0, 32, true), (1, 64, false), (1, 32, true)]);
        assert_eq!(trainer.queued(), 192);
    }
}
