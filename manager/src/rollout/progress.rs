//! Progress of samples: growth, losses, restarts, the way back into the queue.

use std::cmp::Reverse;

use anabranch_proto::{Attempt, GroupId, SampleId, SessionId};

use super::Rollout;
use super::change::Change;
use super::queue::{Class, Place, Rank};
use super::sample::SampleState;
use crate::outbox::Outbox;
use crate::timer::Timer;

/// Broken streams of one sample without a token in between, after which the sample is given up.
const MAX_LOSSES: u32 = 8;
/// Engine deaths without a token in between: from here on a sample runs alone.
pub(crate) const SUSPICIOUS_DEATHS: u32 = 2;
/// Engine deaths without a token in between, after which a sample is given up.
pub(crate) const POISON_DEATHS: u32 = 4;

/// A sample has more tokens, as the ledger found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grown {
    pub sample: SampleId,
    pub attempt: Attempt,
    pub kept: u32,
    pub oldest: u64,
}

impl Rollout {
    pub fn is_current(&self, session: SessionId, sample: SampleId, attempt: Attempt) -> bool {
        self.sample(sample).is_some_and(|s| s.running_on() == Some((session, attempt)))
    }

    /// Notes growth that the ledger told.
    pub fn grew(&mut self, session: SessionId, grown: Grown, out: &mut Outbox) {
        let Grown { sample: id, attempt, kept, oldest } = grown;
        // A fact may come after the sample was moved on: the ledger took the tokens before, so they count.
        let current = self.is_current(session, id, attempt);
        let Some(sample) = self.books.sample(id) else { return };
        if !sample.is_open() || kept < sample.live.kept || attempt.0 <= sample.live.fence {
            return;
        }
        let has_more = kept > sample.live.kept;
        let Some(live) = self.books.sample_live_mut(id) else { return };
        let older = live.oldest != oldest;
        (live.kept, live.oldest) = (kept, oldest);
        if current && has_more {
            if live.deaths > 0 {
                // An engine that is kept free for the sample is free for all again.
                out.wake_placement();
            }
            (live.deaths, live.losses) = (0, 0);
            live.had_token = true;
        }
        if older {
            self.ages_changed(id.group);
        }
        let Some(group) = self.books.live_mut(id.group) else { return };
        if has_more && !group.released {
            group.warm = Some(session);
            self.release_siblings(id.group, out);
        }
    }

    /// Notes what a finished sample has: exact, whatever was heard before.
    pub fn counted(&mut self, id: SampleId, kept: u32, oldest: u64) {
        if let Some(live) = self.books.sample_live_mut(id) {
            (live.kept, live.oldest) = (kept, oldest);
        }
        self.ages_changed(id.group);
    }

    /// Notes a broken stream. `Err` says why the sample must be given up over it.
    pub fn note_loss(&mut self, id: SampleId, what: &str) -> Result<(), String> {
        let Some(live) = self.books.sample_live_mut(id) else { return Ok(()) };
        live.losses += 1;
        match live.losses {
            losses if losses < MAX_LOSSES => Ok(()),
            losses => {
                Err(format!("its stream broke {losses} times without a new token, last: {what}"))
            }
        }
    }

    /// Notes the death of the engine the sample ran on; gives the deaths since its last token.
    pub fn note_death(&mut self, id: SampleId) -> u32 {
        let Some(live) = self.books.sample_live_mut(id) else { return 0 };
        live.deaths += 1;
        live.deaths
    }

    /// The sample is off its engine: waiting, and not queued yet.
    pub fn left(&mut self, id: SampleId, out: &mut Outbox) {
        let Some((session, _)) = self.sample(id).and_then(|sample| sample.running_on()) else {
            return;
        };
        if self.books.group(id.group).is_some_and(|group| group.ages()) {
            self.exposure.count(session, false);
        }
        self.commit_change(Change::Moved { sample: id, to: SampleState::Waiting });
        out.wake_placement();
    }

    /// Back to the queue, to be continued elsewhere from what the sample has.
    pub fn requeue(&mut self, id: SampleId, out: &mut Outbox) {
        let Some(group) = self.books.group(id.group) else { return };
        let sample = &group.samples()[id.index as usize];
        if !sample.is_open() {
            return;
        }
        // Whatever the core has heard: the ledger may have more.
        let restarts = group.spec.restarts && sample.attempts() > 0;
        out.counters.migrations += 1;
        if restarts {
            self.restart(id, out);
        }
        self.enqueue(id, out);
    }

    /// Throws the sample's tokens away: they cannot be continued exactly, or are too old.
    pub fn restart(&mut self, id: SampleId, out: &mut Outbox) {
        let Some(attempts) = self.sample(id).map(|sample| sample.attempts()) else { return };
        let Some(live) = self.books.sample_live_mut(id) else { return };
        (live.kept, live.oldest, live.fence) = (0, u64::MAX, attempts);
        self.ages_changed(id.group);
        out.act(crate::action::Action::ClearPage { sample: id });
    }

    /// The ledger has thrown `tokens` tokens of a sample away.
    pub fn cleared(&mut self, id: SampleId, tokens: u32, out: &mut Outbox) {
        if tokens == 0 {
            return;
        }
        out.counters.restarts += 1;
        out.counters.regenerated_tokens += u64::from(tokens);
        if self.books.sample(id).is_some() {
            self.commit_change(Change::Restarted { sample: id, lost: tokens });
        }
    }

    pub fn enqueue(&mut self, id: SampleId, out: &mut Outbox) {
        let waits = self
            .sample(id)
            .is_some_and(|sample| *sample.state() == SampleState::Waiting && !sample.live.ending);
        if waits && let Some((class, place)) = self.place_of(id) {
            self.queue.push(class, place);
            out.wake_placement();
        }
    }

    pub fn unqueue(&mut self, id: SampleId) {
        self.queue.remove(id);
    }

    fn place_of(&self, id: SampleId) -> Option<(Class, Place)> {
        let group = self.books.group(id.group)?;
        let sample = group.samples().get(id.index as usize)?;
        let rank = match (sample.live.deaths, sample.attempts()) {
            (deaths, _) if deaths >= SUSPICIOUS_DEATHS => Rank::Held,
            (_, 0) => Rank::Fresh,
            _ => Rank::Resumed,
        };
        let pin = group.spec.pin;
        let afresh = pin.is_none() && !group.live.has_tokens;
        let size = self.need(id)?.weight().max(1).ilog2();
        let priority = Reverse(group.spec.priority);
        let place = Place { rank, step: group.spec.step, priority, sample: id };
        Some((Class { rank, pin, afresh, size }, place))
    }

    /// Siblings leave the waiting room behind their leader.
    pub fn release_siblings(&mut self, group: GroupId, out: &mut Outbox) {
        let Some(live) = self.books.live_mut(group) else { return };
        if std::mem::replace(&mut live.released, true) {
            return;
        }
        out.timers.clear(Timer::Leader(group));
        for id in self.samples_of(group) {
            let waits = self.sample(id).is_some_and(|sample| {
                *sample.state() == SampleState::Waiting && sample.attempts() == 0
            });
            if waits && !self.queue.contains(id) {
                self.enqueue(id, out);
            }
        }
    }

    /// Follows the oldest token of a group into the indexes: a few comparisons for each sample of the group.
    pub(super) fn ages_changed(&mut self, id: GroupId) {
        let Some(group) = self.books.group(id) else { return };
        let (oldest, before) = (group.oldest(), group.live.age);
        let age = if group.ages() && !group.is_over() { oldest } else { u64::MAX };
        let turned = group.live.has_tokens != (oldest != u64::MAX);
        self.ages.set(id, before, age);
        if let Some(live) = self.books.live_mut(id) {
            live.age = age;
            live.has_tokens = oldest != u64::MAX;
        }
        if turned {
            self.requeue_class(id);
        }
    }

    /// Waiting samples of a group that has its first token, or lost its last one, change their class.
    fn requeue_class(&mut self, id: GroupId) {
        for sample in self.samples_of(id) {
            if self.queue.contains(sample)
                && let Some((class, place)) = self.place_of(sample)
            {
                self.queue.push(class, place);
            }
        }
    }
}
