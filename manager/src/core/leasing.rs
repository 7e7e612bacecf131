//! Leasing: who is alive, who is suspect, and the grace in which a lost agent may come back.

use std::time::Duration;

use anabranch_proto::SessionId;
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::Notice;
use crate::event::LinkId;
use crate::fleet::EngineState;
use crate::timer::Timer;

impl Core {
    pub(super) fn engine_heard(&mut self, now: Now, session: SessionId) {
        let Some(engine) = self.fleet.engine(session) else { return };
        if engine.is_gone() || engine.link.is_none() {
            return;
        }
        let suspect = matches!(engine.state(), EngineState::Suspect { .. });
        self.fleet.heard(now, session);
        self.out.timers.set(Timer::Lease(session), now + self.config.lease());
        // The lease was over while the link held: the engine was only slow.
        if suspect {
            self.out.timers.clear(Timer::Reattach(session));
            self.take_up_again(now, session);
        }
    }

    pub(super) fn engine_beat(&mut self, now: Now, session: SessionId, kv_used: f32) {
        self.engine_heard(now, session);
        self.fleet.update(session, |engine| engine.kv_used = kv_used);
    }

    pub(super) fn lose_link(&mut self, now: Now, link: LinkId, why: &'static str) {
        let Some(session) = self.fleet.unlink(link) else { return };
        self.follow(session);
        self.out.timers.clear(Timer::Lease(session));
        let Some(engine) = self.fleet.engine(session) else { return };
        let drained = matches!(engine.state(), EngineState::Draining { .. });
        if drained && engine.running.is_empty() {
            return self.part_with(now, session, "drained and left", false);
        }
        self.suspect(now, session, why);
    }

    pub(super) fn suspect(&mut self, now: Now, session: SessionId, why: &'static str) {
        let Some(engine) = self.fleet.engine(session) else { return };
        let (id, running) = (engine.id.clone(), engine.running.len() as u32);
        match engine.state() {
            EngineState::Gone { .. } | EngineState::Quarantined | EngineState::Suspect { .. } => {
                return;
            }
            // The engine was leaving anyway: its own deadline decides.
            EngineState::Draining { .. } => {}
            _ => self.set_engine(session, EngineState::Suspect { why: why.to_owned() }),
        }
        self.weights.drop_load(session);
        self.out.timers.clear(Timer::Load(session));
        self.out.timers.set(Timer::Reattach(session), now + self.config.reattach_grace());
        self.out.tell(Notice::EngineSuspect { engine: id, why: why.to_owned(), running });
    }

    pub(super) fn grace_over(&mut self, now: Now, session: SessionId) {
        self.part_with(now, session, "did not come back within the re-attach grace", true);
    }

    /// This process was itself stopped for `gap`: nobody could renew anything meanwhile.
    pub(super) fn forgive(&mut self, now: Now, gap: Duration) {
        let lease = now + self.config.lease();
        for session in self.fleet.sessions() {
            for timer in [Timer::Lease(session), Timer::Reattach(session)] {
                if let Some(at) = self.out.timers.get(timer) {
                    self.out.timers.set(timer, (at + gap).max(lease));
                }
            }
        }
        if let Some(at) = self.out.timers.get(Timer::TrainerLost) {
            self.out.timers.set(Timer::TrainerLost, at + gap);
        }
    }
}
