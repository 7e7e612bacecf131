//! Who is alive: leases, suspicion, and the grace in which a lost agent may come back.

use std::time::Duration;

use anabranch_proto::SessionId;
use anabranch_runtime::clock::Now;

use super::Core;
use super::timer::Timer;
use crate::action::Notice;
use crate::event::LinkId;
use crate::fleet::EngineState;

impl Core {
    pub(super) fn engine_heard(&mut self, now: Now, session: SessionId) {
        let Some(engine) = self.engines.get_mut(&session) else { return };
        if engine.is_gone() || engine.link.is_none() {
            return;
        }
        engine.heard = now;
        self.timers.set(Timer::Lease(session), now + self.config.lease());
        // A lease that was over while the link held: it was only slow.
        if matches!(engine.state, EngineState::Suspect { .. }) {
            self.timers.clear(Timer::Reattach(session));
            self.take_up_again(now, session);
        }
    }

    pub(super) fn engine_beat(&mut self, now: Now, session: SessionId, kv_used: f32) {
        self.engine_heard(now, session);
        if let Some(engine) = self.engines.get_mut(&session) {
            engine.kv_used = kv_used;
        }
    }

    pub(super) fn lose_link(&mut self, now: Now, link: LinkId, why: &'static str) {
        let Some(session) = self.by_link.remove(&link) else { return };
        let Some(engine) = self.engines.get_mut(&session) else { return };
        engine.link = None;
        self.timers.clear(Timer::Lease(session));
        if matches!(engine.state, EngineState::Draining { .. }) && engine.running.is_empty() {
            return self.part_with(now, session, "drained and left", false);
        }
        self.suspect(now, session, why);
    }

    pub(super) fn lease_over(&mut self, now: Now, session: SessionId) {
        self.suspect(now, session, "lease over");
    }

    fn suspect(&mut self, now: Now, session: SessionId, why: &'static str) {
        let grace = now + self.config.reattach_grace();
        let Some(engine) = self.engines.get_mut(&session) else { return };
        match engine.state {
            EngineState::Gone { .. } | EngineState::Quarantined | EngineState::Suspect { .. } => {
                return;
            }
            // It was leaving anyway: its own deadline decides.
            EngineState::Draining { .. } => {}
            _ => engine.state = EngineState::Suspect { why: why.to_owned() },
        }
        engine.load = None;
        let (id, running) = (engine.id.clone(), engine.running.len() as u32);
        self.timers.clear(Timer::Load(session));
        self.timers.set(Timer::Reattach(session), grace);
        self.tell(Notice::EngineSuspect { engine: id, why: why.to_owned(), running });
    }

    pub(super) fn grace_over(&mut self, now: Now, session: SessionId) {
        self.part_with(now, session, "did not come back within the re-attach grace", true);
    }

    /// This process was itself stopped for `gap`: nobody could renew anything meanwhile.
    pub(super) fn forgive(&mut self, now: Now, gap: Duration) {
        let sessions: Vec<SessionId> = self.engines.keys().copied().collect();
        for session in sessions {
            for timer in [Timer::Lease(session), Timer::Reattach(session)] {
                if let Some(at) = self.timers.get(timer) {
                    self.timers.set(timer, (at + gap).max(now + self.config.lease()));
                }
            }
            let Some(engine) = self.engines.get(&session) else { continue };
            let running: Vec<_> = engine.running.keys().copied().collect();
            for sample in running {
                if let Some(sample) = self.sample_mut(sample)
                    && let crate::rollout::sample::SampleState::Running { last_progress, .. } =
                        &mut sample.state
                {
                    *last_progress = *last_progress + gap;
                }
            }
        }
        if let Some(at) = self.timers.get(Timer::TrainerLost) {
            self.timers.set(Timer::TrainerLost, at + gap);
        }
    }
}
