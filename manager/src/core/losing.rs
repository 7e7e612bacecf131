//! Losing: samples leave their engine, or are given up.

use anabranch_proto::{EngineId, GroupId, SampleId, SessionId, Version};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::Notice;
use crate::rollout::{POISON_DEATHS, SUSPICIOUS_DEATHS, Sample};

/// Samples that left an engine together, for one line in the log.
#[derive(Default)]
pub(super) struct Moved {
    pub samples: u32,
    /// At least so many: the core hears of a sample's tokens when they have doubled.
    pub kept_tokens: u64,
}

impl Moved {
    pub fn add(&mut self, sample: Option<&Sample>) {
        self.samples += 1;
        self.kept_tokens += sample.map_or(0, |sample| u64::from(sample.live.kept));
    }
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
    pub(super) fn restart_groups(&mut self, now: Now, groups: &[GroupId], floor: u64) {
        for &group in groups {
            for sample in self.rollout.samples_of(group) {
                let Some(record) = self.rollout.sample(sample) else { continue };
                if !record.is_open() || record.live.oldest >= floor {
                    continue;
                }
                if record.live.ending {
                    let why = "cancelled, and its tokens became too old";
                    self.rollout.give_up(self.at(now), sample, why, false, &mut self.out);
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
            moved.add(Some(record));
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
}
