//! What happens to samples: progress, ends, losses, and the end of their group.

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_proto::{Attempt, EngineId, GroupId, SampleId, SessionId};
use anabranch_runtime::clock::Now;

use super::Core;
use super::timer::Timer;
use crate::action::{Action, Finish, Notice, ShortGroup};
use crate::fleet::{Engine, EngineState, PromptUse};
use crate::ledger::{Ended, Fact, Finished};
use crate::rollout::queue::{Class, Place};
use crate::rollout::sample::SampleState;

/// An engine that said "busy", or lost a stream, gets nothing new for so long.
const BUSY_PAUSE: Duration = Duration::from_millis(200);
/// Broken streams of one sample without a token in between, after which it is given up.
const MAX_LOSSES: u32 = 8;
/// Engine deaths without a token in between: from here on it runs alone, two more and it is given up.
const SUSPICIOUS_DEATHS: u32 = 2;
const POISON_DEATHS: u32 = 4;
/// Malformed data from one engine, after which it must stay away for a while.
const MAX_BROKEN: u32 = 16;

/// Samples that left an engine together, for one line in the log.
#[derive(Default)]
pub(super) struct Moved {
    pub samples: u32,
    pub kept_tokens: u64,
}

impl Core {
    pub(super) fn facts_found(&mut self, now: Now, session: SessionId, facts: Vec<Fact>) {
        self.engine_heard(now, session);
        let mut moved: BTreeMap<&'static str, Moved> = BTreeMap::new();
        for fact in facts {
            match fact {
                Fact::Grew { sample, attempt, kept, oldest } => {
                    self.sample_grew(now, session, sample, attempt, kept, oldest);
                }
                Fact::Finished { sample, attempt, kept, oldest, how, running } => {
                    self.sample_grew(now, session, sample, attempt, kept, oldest);
                    self.sample_finished(now, session, sample, attempt, how, running);
                }
                Fact::Ended { sample, attempt, why, .. } => {
                    if let Some((label, kept)) =
                        self.sample_ended(now, session, sample, attempt, why)
                    {
                        let moved = moved.entry(label).or_default();
                        moved.samples += 1;
                        moved.kept_tokens += u64::from(kept);
                    }
                }
            }
        }
        for (why, moved) in moved {
            self.tell_moved(session, moved, why);
        }
    }

    pub(super) fn tell_moved(&mut self, session: SessionId, moved: Moved, why: &str) {
        let Some(engine) = self.engines.get(&session) else { return };
        let from: EngineId = engine.id.clone();
        if moved.samples > 0 {
            let Moved { samples, kept_tokens } = moved;
            self.tell(Notice::SamplesMoved { from, samples, kept_tokens, why: why.to_owned() });
        }
    }

    fn is_current(&self, session: SessionId, sample: SampleId, attempt: Attempt) -> bool {
        self.sample(sample).is_some_and(|s| s.running_on() == Some((session, attempt)))
    }

    fn sample_grew(
        &mut self,
        now: Now,
        session: SessionId,
        id: SampleId,
        attempt: Attempt,
        kept: u32,
        oldest: u64,
    ) {
        // A fact may come after the sample was moved on: the ledger took the tokens before, so they count.
        let current = self.is_current(session, id, attempt);
        let Some(sample) = self.sample_mut(id) else { return };
        if !sample.is_open() || kept < sample.kept {
            return;
        }
        let gained = u64::from(kept - sample.kept);
        if current {
            sample.grew(now, kept, oldest);
        } else {
            (sample.kept, sample.oldest) = (kept, oldest);
        }
        self.counters.tokens += gained;
        if let Some(engine) = self.engines.get_mut(&session) {
            engine.tokens += gained;
        }
        let group = self.groups.get_mut(&id.group).expect("the sample is in it");
        if !group.released {
            group.warm = Some(session);
            self.release_siblings(id.group);
        }
    }

    fn sample_finished(
        &mut self,
        now: Now,
        session: SessionId,
        id: SampleId,
        attempt: Attempt,
        how: Finished,
        running: bool,
    ) {
        let Some(sample) = self.sample(id) else { return };
        if !sample.is_open() {
            return;
        }
        if self.is_current(session, id, attempt) {
            self.detach_from_engine(id, session);
            if running {
                self.act(Action::Stop { session, sample: id, attempt, why: "finished" });
            }
        } else {
            // The finish was in the ledger before the sample was moved on.
            self.take_off(now, id, "finished elsewhere");
            self.unqueue(id);
        }
        let finish = match how {
            Finished::Stop(matched) => Finish::Stop(matched),
            Finished::Length => Finish::Length,
        };
        self.finish_sample(now, id, finish);
    }

    pub(super) fn finish_sample(&mut self, now: Now, id: SampleId, how: Finish) {
        let Some(sample) = self.sample_mut(id) else { return };
        sample.state = SampleState::Finished { how };
        self.counters.finished += 1;
        self.pool_sample(now, id);
        self.sample_closed(now, id.group);
    }

    /// An attempt is over and the sample is not. Says under which heading it moves, and its tokens.
    fn sample_ended(
        &mut self,
        now: Now,
        session: SessionId,
        id: SampleId,
        attempt: Attempt,
        why: Ended,
    ) -> Option<(&'static str, u32)> {
        if !self.is_current(session, id, attempt) {
            return None;
        }
        self.detach_from_engine(id, session);
        let kept = self.sample(id)?.kept;
        let label = match why {
            Ended::Refused(why) => {
                self.abandon(now, id, format!("the engine refused it: {why}"));
                return None;
            }
            Ended::Aborted => "aborted",
            Ended::Busy(_) => {
                self.rest(now, session);
                "engine busy"
            }
            Ended::Lost(what) => {
                // If the engine is dying, its other streams end too, and its death is heard in a moment.
                self.rest(now, session);
                self.note_loss(now, id, &what)?;
                "stream lost"
            }
            Ended::Broken(what) => {
                self.act(Action::Stop { session, sample: id, attempt, why: "broken stream" });
                self.note_broken(now, session, &what);
                self.note_loss(now, id, &what)?;
                "malformed stream"
            }
        };
        self.requeue(now, id);
        Some((label, kept))
    }

    /// Nothing new for this engine for a moment.
    fn rest(&mut self, now: Now, session: SessionId) {
        let Some(engine) = self.engines.get_mut(&session) else { return };
        engine.not_before = engine.not_before.max(now + BUSY_PAUSE);
        self.timers.set(Timer::Rested(session), engine.not_before);
    }

    /// `None` when the sample was given up over it.
    fn note_loss(&mut self, now: Now, id: SampleId, what: &str) -> Option<()> {
        let sample = self.sample_mut(id)?;
        sample.losses += 1;
        if sample.losses < MAX_LOSSES {
            return Some(());
        }
        let losses = sample.losses;
        self.abandon(
            now,
            id,
            format!("its stream broke {losses} times without a new token, last: {what}"),
        );
        None
    }

    fn note_broken(&mut self, now: Now, session: SessionId, what: &str) {
        let Some(engine) = self.engines.get_mut(&session) else { return };
        engine.broken += 1;
        let (broken, id) = (engine.broken, engine.id.clone());
        self.counters.misbehaved += 1;
        self.tell(Notice::PeerMisbehaved { engine: id, what: what.to_owned() });
        if broken >= MAX_BROKEN {
            self.quarantine(now, session, format!("{broken} malformed streams, last: {what}"));
        }
    }

    /// The engine it ran on died. True if it is held back now.
    pub(super) fn note_death(&mut self, now: Now, id: SampleId, engine: &EngineId) {
        let Some(sample) = self.sample_mut(id) else { return };
        sample.deaths += 1;
        let deaths = sample.deaths;
        let key = self.groups[&id.group].key.to_string();
        if deaths >= POISON_DEATHS {
            let why =
                format!("{deaths} engines died under it without a token, the last was {engine}");
            self.abandon(now, id, why);
        } else {
            if deaths == SUSPICIOUS_DEATHS {
                self.tell(Notice::SampleHeld { sample: id.to_string(), key, deaths });
            }
            self.requeue(now, id);
        }
    }

    /// Takes a running sample off its engine: fenced off there, not queued yet.
    pub(super) fn take_off(&mut self, _now: Now, id: SampleId, why: &'static str) {
        let Some((session, attempt)) = self.sample(id).and_then(|sample| sample.running_on())
        else {
            return;
        };
        self.detach_from_engine(id, session);
        self.act(Action::Stop { session, sample: id, attempt, why });
    }

    /// The engine's books, and the sample back to waiting (outside the queue).
    pub(super) fn detach_from_engine(&mut self, id: SampleId, session: SessionId) {
        if let Some(engine) = self.engines.get_mut(&session) {
            if let Some(PromptUse::Last(digest)) = engine.remove(id) {
                self.actions.push_back(Action::ForgetPrompt { session, digest });
            }
            if engine.reserved == Some(id) {
                engine.reserved = None;
            }
        }
        if let Some(sample) = self.sample_mut(id) {
            sample.state = SampleState::Waiting { queued: false };
        }
        self.placeable = true;
    }

    /// Back to the queue, to be continued elsewhere from what it has.
    pub(super) fn requeue(&mut self, _now: Now, id: SampleId) {
        let Some(group) = self.groups.get(&id.group) else { return };
        let restarts = group.restarts;
        let sample = &group.samples[id.index as usize];
        if !sample.is_open() {
            return;
        }
        self.counters.migrations += 1;
        if restarts && sample.kept > 0 {
            self.restart(id);
        } else {
            self.counters.moved_tokens += u64::from(sample.kept);
        }
        self.enqueue(id);
    }

    /// From its prompt again: what it has cannot be continued exactly, or is too old.
    pub(super) fn restart(&mut self, id: SampleId) {
        let Some(sample) = self.sample_mut(id) else { return };
        let lost = std::mem::take(&mut sample.kept);
        sample.oldest = u64::MAX;
        sample.discarded += lost;
        self.counters.restarts += 1;
        self.counters.regenerated_tokens += u64::from(lost);
        let step = self.groups[&id.group].step;
        if let Some(step) = self.steps.get_mut(&step) {
            step.discarded_tokens += u64::from(lost);
        }
        self.act(Action::ClearPage { sample: id });
    }

    pub(super) fn enqueue(&mut self, id: SampleId) {
        let place = self.place_of(id);
        if let Some(sample) = self.sample_mut(id)
            && sample.is_open()
        {
            sample.state = SampleState::Waiting { queued: true };
            self.queue.push(place);
            self.placeable = true;
        }
    }

    pub(super) fn unqueue(&mut self, id: SampleId) {
        let place = self.place_of(id);
        self.queue.remove(&place);
    }

    pub(super) fn place_of(&self, id: SampleId) -> Place {
        let group = &self.groups[&id.group];
        let sample = &group.samples[id.index as usize];
        let class = match (sample.deaths, sample.attempts) {
            (deaths, _) if deaths >= SUSPICIOUS_DEATHS => Class::Held,
            (_, 0) => Class::Fresh,
            _ => Class::Resumed,
        };
        let priority = std::cmp::Reverse(group.priority);
        Place { class, step: group.step, priority, sample: id }
    }

    pub(super) fn release_siblings(&mut self, group: GroupId) {
        let Some(record) = self.groups.get_mut(&group) else { return };
        if std::mem::replace(&mut record.released, true) {
            return;
        }
        self.timers.clear(Timer::Leader(group));
        for sample in self.samples_of(group) {
            let waits = self.sample(sample).is_some_and(|sample| {
                sample.state == SampleState::Waiting { queued: false } && sample.attempts == 0
            });
            if waits {
                self.enqueue(sample);
            }
        }
    }

    /// Given up, with its story; never delivered, always reported.
    pub(super) fn abandon(&mut self, now: Now, id: SampleId, why: String) {
        self.unqueue(id);
        self.take_off(now, id, "abandoned");
        let Some(group) = self.groups.get_mut(&id.group) else { return };
        let sample = &mut group.samples[id.index as usize];
        if !sample.is_open() {
            return;
        }
        sample.state = SampleState::Abandoned { why: why.clone() };
        group.why_short.get_or_insert_with(|| why.clone());
        let key = group.key.to_string();
        self.counters.abandoned += 1;
        self.tell(Notice::SampleAbandoned { sample: id.to_string(), key, why });
        self.act(Action::Forget { samples: vec![id] });
        self.release_siblings(id.group);
        self.sample_closed(now, id.group);
    }

    /// Ends every open sample of a group: delivered as it is (`keep_partial`) or not at all.
    pub(super) fn give_up_group(&mut self, now: Now, id: GroupId, why: &str, keep_partial: bool) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.released = true;
        group.why_short.get_or_insert_with(|| why.to_owned());
        for sample in self.samples_of(id) {
            let Some(record) = self.sample(sample) else { continue };
            if !record.is_open() {
                continue;
            }
            let has_tokens = record.kept > 0;
            self.unqueue(sample);
            self.take_off(now, sample, "given up");
            if keep_partial && has_tokens {
                self.act(Action::FreezePage { sample });
                self.finish_sample(now, sample, Finish::Cancelled);
            } else {
                let record = self.sample_mut(sample).expect("looked up above");
                record.state = SampleState::Abandoned { why: why.to_owned() };
                self.act(Action::Forget { samples: vec![sample] });
                self.sample_closed(now, id);
            }
        }
    }

    /// A sample of the group has ended; when it was the last, so has the group.
    fn sample_closed(&mut self, now: Now, id: GroupId) {
        let Some(group) = self.groups.get(&id) else { return };
        if !group.is_over() {
            return;
        }
        let (step, short) = (group.step, group.has_abandoned());
        let report = short.then(|| ShortGroup {
            key: group.key.clone(),
            delivered: group.n() - abandoned(group),
            n: group.n(),
            why: group.why_short.clone().unwrap_or_default(),
            lengths: group.lengths(),
        });
        self.timers.clear(Timer::Group(id));
        self.timers.clear(Timer::Leader(id));
        let Some(state) = self.steps.get_mut(&step) else { return };
        state.open_groups -= 1;
        state.pool.complete(id);
        match report {
            Some(report) if report.delivered == 0 => state.dropped.push(report),
            Some(report) => state.short.push(report),
            None => {}
        }
        self.cut_batches(now, step);
    }

    /// Everything an engine runs goes on elsewhere.
    pub(super) fn move_all(
        &mut self,
        now: Now,
        session: SessionId,
        why: &'static str,
        died: bool,
    ) -> u32 {
        let Some(engine) = self.engines.get(&session) else { return 0 };
        let id = engine.id.clone();
        let running: Vec<SampleId> = engine.running.keys().copied().collect();
        let mut moved = Moved::default();
        for sample in running {
            moved.samples += 1;
            moved.kept_tokens += self.sample(sample).map_or(0, |s| u64::from(s.kept));
            let silent = matches!(
                self.sample(sample).map(|s| &s.state),
                Some(SampleState::Running { had_token: false, .. })
            );
            self.take_off(now, sample, why);
            match died && silent {
                true => self.note_death(now, sample, &id),
                false => self.requeue(now, sample),
            }
        }
        let samples = moved.samples;
        self.tell_moved(session, moved, why);
        samples
    }

    /// Running samples whose engine has said nothing about them for too long.
    pub(super) fn look_for_silence(&mut self, now: Now, session: SessionId) {
        self.placeable = true;
        let Some(engine) = self.engines.get(&session) else { return };
        if engine.link.is_none() || engine.running.is_empty() || engine.is_gone() {
            return;
        }
        let silent = self.silent_samples(now, engine);
        self.timers.set(Timer::Progress(session), now + self.config.silence(0, true) / 4);
        let mut moved = Moved::default();
        for sample in silent {
            moved.samples += 1;
            moved.kept_tokens += self.sample(sample).map_or(0, |s| u64::from(s.kept));
            self.take_off(now, sample, "no progress");
            if self.note_loss(now, sample, "no progress within its deadline").is_some() {
                self.requeue(now, sample);
            }
        }
        if moved.samples > 0 {
            // Do not send them straight back to an engine that hangs.
            let pause = now + self.config.silence(0, true);
            if let Some(engine) = self.engines.get_mut(&session) {
                engine.not_before = pause;
                self.timers.set(Timer::Rested(session), pause);
            }
        }
        self.tell_moved(session, moved, "no progress");
    }

    fn silent_samples(&self, now: Now, engine: &Engine) -> Vec<SampleId> {
        // While it loads weights an engine makes no tokens.
        if matches!(engine.state, EngineState::Updating { .. } | EngineState::Suspect { .. }) {
            return Vec::new();
        }
        let overdue = |id: &&SampleId| match self.sample(**id).map(|sample| &sample.state) {
            Some(SampleState::Running { last_progress, had_token, .. }) => {
                let patience = self.config.silence(engine.running.len(), *had_token);
                now.since(*last_progress) > patience
            }
            _ => false,
        };
        engine.running.keys().filter(overdue).copied().collect()
    }
}

fn abandoned(group: &crate::rollout::group::Group) -> u32 {
    let abandoned =
        |s: &&crate::rollout::sample::Sample| matches!(s.state, SampleState::Abandoned { .. });
    group.samples.iter().filter(abandoned).count() as u32
}
