//! Losing: samples leave their engine, or are given up.

use anabranch_proto::{EngineId, GroupId, SampleId, SessionId, Version};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::Notice;
use crate::fleet::{Engine, EngineState};
use crate::rollout::{POISON_DEATHS, SUSPICIOUS_DEATHS};
use crate::timer::Timer;

/// Samples that left an engine together, for one line in the log.
#[derive(Default)]
pub(super) struct Moved {
    pub samples: u32,
    pub kept_tokens: u64,
}

impl Core {
    pub(super) fn tell_moved(&mut self, session: SessionId, moved: Moved, why: &str) {
        let Some(engine) = self.fleet.engine(session) else { return };
        let from: EngineId = engine.id.clone();
        if moved.samples > 0 {
            let Moved { samples, kept_tokens } = moved;
            self.out.tell(Notice::SamplesMoved { from, samples, kept_tokens, why: why.to_owned() });
        }
    }

    /// Notes a broken stream; `None` where the sample was given up over it.
    pub(super) fn note_loss(&mut self, now: Now, id: SampleId, what: &str) -> Option<()> {
        match self.rollout.note_loss(id, what) {
            Ok(()) => Some(()),
            Err(why) => {
                self.abandon(now, id, &why);
                None
            }
        }
    }

    /// The engine died that the sample ran on, before the sample had a token there.
    fn note_death(&mut self, now: Now, id: SampleId, engine: &EngineId) {
        let deaths = self.rollout.note_death(id);
        if deaths >= POISON_DEATHS {
            let why =
                format!("{deaths} engines died under it without a token, the last was {engine}");
            return self.abandon(now, id, &why);
        }
        if deaths == SUSPICIOUS_DEATHS
            && let Some(group) = self.rollout.group(id.group)
        {
            let key = group.spec.key.to_string();
            self.out.tell(Notice::SampleHeld { sample: id.to_string(), key, deaths });
        }
        self.rollout.requeue(id, &mut self.out);
    }

    /// Gives a sample up, with its story; never delivered, always reported.
    pub(super) fn abandon(&mut self, now: Now, id: SampleId, why: &str) {
        self.rollout.unqueue(id);
        self.take_off(id, "abandoned");
        self.rollout.abandon(self.at(now), id, why, &mut self.out);
    }

    /// Ends every open sample of a group: delivered as it is (`keep_partial`) or not at all.
    pub(super) fn give_up_group(&mut self, now: Now, id: GroupId, why: &str, keep_partial: bool) {
        self.rollout.begin_giving_up(id, why);
        for sample in self.rollout.samples_of(id) {
            if !self.rollout.sample(sample).is_some_and(|sample| sample.is_open()) {
                continue;
            }
            self.rollout.unqueue(sample);
            self.take_off(sample, "given up");
            self.rollout.give_up(self.at(now), sample, why, keep_partial, &mut self.out);
        }
    }

    /// The whole group goes: running samples, and finished ones that are in no batch yet.
    pub(super) fn drop_group(&mut self, now: Now, id: GroupId, why: &str) {
        if self.rollout.drop_ready(id, why, &mut self.out) {
            self.give_up_group(now, id, why, false);
        }
    }

    /// Open samples of these groups with a token below `floor` restart from their prompt.
    pub(super) fn restart_groups(&mut self, groups: &[GroupId], floor: u64) {
        for &group in groups {
            for sample in self.rollout.samples_of(group) {
                let Some(record) = self.rollout.sample(sample) else { continue };
                if !record.is_open() || record.live.oldest >= floor {
                    continue;
                }
                self.rollout.unqueue(sample);
                self.take_off(sample, "too old");
                self.rollout.restart(sample, &mut self.out);
                self.rollout.enqueue(sample, &mut self.out);
            }
        }
    }

    /// Samples that are pinned to another version leave an engine that takes up `to`.
    pub(super) fn move_pinned(&mut self, session: SessionId, to: Version) {
        let Some(engine) = self.fleet.engine(session) else { return };
        let pinned = |id: &&SampleId| {
            self.rollout
                .group(id.group)
                .and_then(|group| group.spec.pin)
                .is_some_and(|pin| pin != to)
        };
        let leave: Vec<SampleId> = engine.running.keys().filter(pinned).copied().collect();
        for sample in leave {
            self.take_off(sample, "pinned to the version that goes");
            self.rollout.requeue(sample, &mut self.out);
        }
    }

    /// Everything an engine runs goes on elsewhere.
    pub(super) fn move_all(
        &mut self,
        now: Now,
        session: SessionId,
        why: &'static str,
        died: bool,
    ) -> u32 {
        let Some(engine) = self.fleet.engine(session) else { return 0 };
        let id = engine.id.clone();
        let running: Vec<SampleId> = engine.running.keys().copied().collect();
        let mut moved = Moved::default();
        for sample in running {
            let Some(record) = self.rollout.sample(sample) else { continue };
            moved.samples += 1;
            moved.kept_tokens += u64::from(record.live.kept);
            let silent = !record.live.had_token;
            self.take_off(sample, why);
            match died && silent {
                true => self.note_death(now, sample, &id),
                false => self.rollout.requeue(sample, &mut self.out),
            }
        }
        let samples = moved.samples;
        self.out.visit(samples as usize);
        self.tell_moved(session, moved, why);
        samples
    }

    /// Running samples whose engine has said nothing about them for too long go on elsewhere.
    pub(super) fn look_for_silence(&mut self, now: Now, session: SessionId) {
        self.out.wake_placement();
        let Some(engine) = self.fleet.engine(session) else { return };
        if engine.link.is_none() || engine.running.is_empty() || engine.is_gone() {
            return;
        }
        let silent = self.silent_samples(now, engine);
        self.out.timers.set(Timer::Progress(session), now + self.config.silence(0, true) / 4);
        let mut moved = Moved::default();
        for sample in silent {
            moved.samples += 1;
            moved.kept_tokens += self.rollout.sample(sample).map_or(0, |s| u64::from(s.live.kept));
            self.take_off(sample, "no progress");
            if self.note_loss(now, sample, "no progress within its deadline").is_some() {
                self.rollout.requeue(sample, &mut self.out);
            }
        }
        if moved.samples > 0 {
            // Do not send them straight back to an engine that hangs.
            let pause = now + self.config.silence(0, true);
            self.fleet.rest(session, pause);
            self.out.timers.set(Timer::Rested(session), pause);
        }
        self.tell_moved(session, moved, "no progress");
    }

    fn silent_samples(&self, now: Now, engine: &Engine) -> Vec<SampleId> {
        // While it loads weights an engine makes no tokens.
        if matches!(engine.state(), EngineState::Updating { .. } | EngineState::Suspect { .. }) {
            return Vec::new();
        }
        let overdue = |id: &&SampleId| {
            self.rollout.sample(**id).is_some_and(|sample| {
                let patience = self.config.silence(engine.running.len(), sample.live.had_token);
                now.since(sample.live.progress) > patience
            })
        };
        engine.running.keys().filter(overdue).copied().collect()
    }
}
