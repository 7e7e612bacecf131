//! Parting: engines leave by drain, notice or order, die, and are kept away for a while.

use std::time::Duration;

use anabranch_proto::{EngineId, SessionId};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::{Action, Answer, FailKind, ModeKind, Notice};
use crate::event::ReplyTo;
use crate::fleet::{Engine, EngineState};
use crate::timer::Timer;

/// Engines named where a person asked for one that is not attached.
const NAMED: usize = 32;

impl Core {
    /// The end of a session: its samples move, the engine is gone. `died`: not by anybody's wish.
    pub(super) fn part_with(&mut self, now: Now, session: SessionId, why: &str, died: bool) {
        let Some(engine) = self.fleet.engine(session) else { return };
        // A quarantined engine is apart already, and stays away for its time.
        if engine.is_gone() || *engine.state() == EngineState::Quarantined {
            return;
        }
        let id = engine.id.clone();
        self.set_engine(session, EngineState::Gone { why: why.to_owned() });
        self.fleet.drop_link(session);
        self.follow(session);
        self.clear_timers(session);
        self.move_all(now, session, "engine lost", died);
        self.out.tell(Notice::EngineGone { engine: id.clone(), why: why.to_owned() });
        self.out.act(Action::EndSession { session, why: why.to_owned() });
        self.mode_switch_lost(now, session);
        self.weights.drop_holds(session, true);
        if died {
            self.out.counters.engine_deaths += 1;
            let window = Duration::from_millis(self.config.quarantine_window_ms);
            if self.fleet.note_death(now, &id, self.config.quarantine_deaths, window) {
                self.hold_back(now, session, "it died too often");
            }
        }
        for session in self.fleet.forget_old_sessions() {
            self.weights.forget(session);
            self.rollout.engine_at(session, None);
        }
    }

    fn clear_timers(&mut self, session: SessionId) {
        for timer in [
            Timer::Lease(session),
            Timer::Reattach(session),
            Timer::Rested(session),
            Timer::Drain(session),
            Timer::Load(session),
            Timer::LoadRetry(session),
        ] {
            self.out.timers.clear(timer);
        }
    }

    pub(super) fn quarantine(&mut self, now: Now, session: SessionId, why: &str) {
        self.part_with(now, session, why, false);
        self.hold_back(now, session, why);
    }

    fn hold_back(&mut self, now: Now, session: SessionId, why: &str) {
        let Some(engine) = self.fleet.engine(session) else { return };
        let (engine, for_ms) = (engine.id.clone(), self.config.quarantine_ms);
        self.set_engine(session, EngineState::Quarantined);
        self.out.timers.set(Timer::Quarantine(session), now + Duration::from_millis(for_ms));
        self.out.tell(Notice::EngineQuarantined { engine, for_ms, why: why.to_owned() });
    }

    pub(super) fn quarantine_over(&mut self, session: SessionId) {
        let why = "quarantine over; may attach again".to_owned();
        self.set_engine(session, EngineState::Gone { why });
    }

    pub(super) fn drain_requested(
        &mut self,
        now: Now,
        id: &EngineId,
        deadline: Duration,
        reply: ReplyTo,
    ) {
        let Some(session) = self.fleet.live(id) else { return self.no_such_engine(id, reply) };
        let state = self.fleet.engine(session).map(|engine| engine.state().name());
        if !self.drain(now, session, deadline, "asked for by a person") {
            let said = format!("engine {id} is {} already", state.unwrap_or("gone"));
            return self.out.reply(reply, Answer::Said(said));
        }
        let running = self.fleet.engine(session).map_or(0, |engine| engine.running.len());
        let said = format!(
            "engine {id} drains: {running} samples have {} ms to finish, then they continue elsewhere",
            deadline.as_millis()
        );
        self.out.reply(reply, Answer::Said(said));
    }

    pub(super) fn remove_requested(&mut self, now: Now, id: &EngineId, reply: ReplyTo) {
        let Some(session) = self.fleet.live(id) else { return self.no_such_engine(id, reply) };
        let Some(engine) = self.fleet.engine(session) else { return };
        let running = engine.running.len();
        if *engine.state() == EngineState::Quarantined {
            self.out.timers.clear(Timer::Quarantine(session));
            self.quarantine_over(session);
            let said = format!("engine {id} was quarantined; it may attach again");
            return self.out.reply(reply, Answer::Said(said));
        }
        self.order_mode(session, ModeKind::Leave, Duration::ZERO, "removed by a person");
        self.part_with(now, session, "removed by a person", false);
        let said = format!("engine {id} is removed; {running} samples continue elsewhere");
        self.out.reply(reply, Answer::Said(said));
    }

    fn no_such_engine(&mut self, id: &EngineId, reply: ReplyTo) {
        let live = self.fleet.engines().filter(|engine| !engine.is_gone());
        let known: Vec<String> = live.take(NAMED).map(|engine| engine.id.to_string()).collect();
        let why = format!("no engine {id} is attached; attached are: {}", known.join(", "));
        self.out.fail(reply, FailKind::NotFound, why);
    }

    /// False where the engine leaves already.
    fn drain(&mut self, now: Now, session: SessionId, deadline: Duration, why: &str) -> bool {
        let Some(engine) = self.fleet.engine(session) else { return false };
        let leaving = |engine: &Engine| {
            matches!(engine.state(), EngineState::Draining { .. } | EngineState::Quarantined)
                || engine.is_gone()
        };
        if leaving(engine) {
            return false;
        }
        let id = engine.id.clone();
        self.set_engine(session, EngineState::Draining { why: why.to_owned() });
        self.weights.drop_load(session);
        // The agent aborts at the deadline and reports each end; past it by a lease, it is not waited for.
        self.out.timers.set(Timer::Drain(session), now + deadline + self.config.lease());
        let deadline_ms = deadline.as_millis() as u64;
        self.out.tell(Notice::EngineDraining { engine: id, deadline_ms, why: why.to_owned() });
        self.order_mode(session, ModeKind::Drain, deadline, why);
        true
    }

    pub(super) fn preempted(&mut self, now: Now, session: SessionId, within: Duration, why: &str) {
        self.fleet.note_preemption(session);
        self.follow(session);
        // A fifth of the notice is left for the last ticks to arrive.
        self.drain(now, session, within * 4 / 5, why);
    }
}
