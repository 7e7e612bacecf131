//! Attempts that end before their time: `impl Core` for stops, aborts, cuts and losses.

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, SampleId};
use anabranch_runtime::Now;

use super::{AttemptState, LiveAttempt};
use crate::core::Core;
use crate::core::action::Action;
use crate::engine::AttemptId;

impl Core {
    /// Stops an attempt, as the manager ordered.
    pub(in crate::core) fn stop(&mut self, now: Now, stop: pb::Stop) {
        let Some(sample) = stop.sample.map(SampleId::from) else { return };
        let Some(id) = self.attempts.by_sample.get(&sample).copied() else { return };
        if self.attempts.by_id.get(&id).is_some_and(|attempt| attempt.number.0 == stop.attempt) {
            self.abort(now, id, &stop.why);
        }
    }

    /// Ends an attempt as `aborted`: at once if the engine has no request of it, else with the
    /// terminal chunk.
    fn abort(&mut self, now: Now, id: AttemptId, why: &str) {
        let Some(attempt) = self.attempts.by_id.get_mut(&id) else { return };
        match attempt.state() {
            AttemptState::Waiting | AttemptState::Cut => {
                self.end_now(now, id, Why::Aborted, why.to_owned())
            }
            AttemptState::Cutting => attempt.set_state(AttemptState::Stopping),
            AttemptState::Running => {
                attempt.set_state(AttemptState::Stopping);
                let rid = attempt.rid();
                self.act(Action::Abort { attempt: id, rid });
            }
            AttemptState::Stopping | AttemptState::Discarding => {}
        }
    }

    /// Aborts every attempt.
    pub(in crate::core) fn abort_all(&mut self, now: Now, why: &str) {
        for id in self.attempts.ids(|_| true) {
            self.abort(now, id, why);
        }
    }

    /// Cuts attempts for a load: ends every request that can continue as a new one. The rest stay,
    /// to be paused.
    pub(in crate::core) fn cut_attempts(&mut self) {
        for id in self
            .attempts
            .ids(|attempt| attempt.state() == AttemptState::Running && attempt.can_be_cut())
        {
            let Some(attempt) = self.attempts.by_id.get_mut(&id) else { continue };
            attempt.set_state(AttemptState::Cutting);
            let rid = attempt.rid();
            self.act(Action::Abort { attempt: id, rid });
        }
    }

    /// Number of requests that a load waits for; with `all`, also those that would be paused.
    pub(in crate::core) fn unquiet(&self, all: bool) -> usize {
        let counts = |attempt: &&LiveAttempt| match attempt.state() {
            AttemptState::Waiting | AttemptState::Cut => false,
            AttemptState::Running => all,
            AttemptState::Stopping | AttemptState::Discarding | AttemptState::Cutting => true,
        };
        self.attempts.by_id.values().filter(counts).count()
    }

    /// Marks attempts that were only paused for a load. The engine says at their end where the
    /// versions meet.
    pub(in crate::core) fn mark_boundaries(&mut self) {
        for attempt in self.attempts.by_id.values_mut() {
            attempt.boundary |= attempt.state().at_engine();
        }
    }

    /// Reports the end of an attempt now; tokens that its stream still brings are dropped.
    pub(super) fn close_attempt(&mut self, now: Now, id: AttemptId, why: Why, matched: String) {
        let Some(attempt) = self.attempts.by_id.get(&id) else { return };
        let end = attempt.end(why, matched);
        self.outbox.end(now, end);
        self.discard(id);
    }

    /// Removes an attempt without a request and reports its end.
    pub(super) fn end_now(&mut self, now: Now, id: AttemptId, why: Why, matched: String) {
        let Some(attempt) = self.attempts.remove(id) else { return };
        self.outbox.end(now, attempt.end(why, matched));
    }

    /// Drops an attempt without a report. Its request is aborted, and counts as running until its
    /// stream ends.
    pub(super) fn discard(&mut self, id: AttemptId) {
        let Some(attempt) = self.attempts.by_id.get_mut(&id) else { return };
        self.attempts.by_sample.remove(&attempt.sample);
        match attempt.state() {
            AttemptState::Waiting | AttemptState::Cut => {
                self.attempts.by_id.remove(&id);
            }
            AttemptState::Running => {
                attempt.set_state(AttemptState::Discarding);
                let rid = attempt.rid();
                self.act(Action::Abort { attempt: id, rid });
            }
            AttemptState::Stopping | AttemptState::Cutting => {
                attempt.set_state(AttemptState::Discarding)
            }
            AttemptState::Discarding => {}
        }
    }

    /// Discards the attempts that `want` selects; returns their number.
    pub(in crate::core) fn discard_attempts(
        &mut self,
        want: impl Fn(SampleId, Attempt) -> bool,
    ) -> usize {
        let ids: Vec<AttemptId> = self.attempts.by_sample.values().copied().collect();
        let wanted = |id: &AttemptId| {
            self.attempts.by_id.get(id).is_some_and(|attempt| want(attempt.sample, attempt.number))
        };
        let ids: Vec<AttemptId> = ids.into_iter().filter(wanted).collect();
        ids.iter().for_each(|id| self.discard(*id));
        ids.len()
    }

    /// Gives back the newest eighth of the attempts, which have the least to lose: the buffer is
    /// full. The agent never stops reading the engine.
    pub(in crate::core) fn shed(&mut self, now: Now) {
        let live: Vec<AttemptId> = self.attempts.by_sample.values().copied().collect();
        let mut ids = live;
        ids.sort_unstable();
        let shed = ids.len().div_ceil(8);
        for id in ids.into_iter().rev().take(shed) {
            self.close_attempt(now, id, Why::Busy, "the agent's buffer is full".to_owned());
        }
        tracing::warn!(
            shed,
            bytes = self.outbox.bytes(),
            "unacknowledged ticks fill the buffer; gave back the newest samples"
        );
    }

    /// Reports every attempt as lost after the engine's death.
    pub(in crate::core) fn lose_all_attempts(&mut self, now: Now, why: &str) {
        self.loader.drop_withheld();
        for id in self.attempts.ids(|_| true) {
            let Some(attempt) = self.attempts.remove(id) else { continue };
            match attempt.state() {
                AttemptState::Discarding => {}
                AttemptState::Waiting => {
                    self.outbox.end(now, attempt.end(Why::Busy, why.to_owned()))
                }
                _ => self.outbox.end(now, attempt.end(Why::Lost, why.to_owned())),
            }
            self.act(Action::DropStream { attempt: id });
        }
    }

    /// Ends every attempt at the engine as `aborted` after the new weights were refused: tokens
    /// made since must not leave.
    pub(in crate::core) fn abort_unverified(&mut self, now: Now, why: &str) {
        self.loader.drop_withheld();
        for id in self.attempts.ids(|attempt| {
            attempt.state().at_engine() && attempt.state() != AttemptState::Discarding
        }) {
            self.close_attempt(now, id, Why::Aborted, why.to_owned());
        }
    }
}
