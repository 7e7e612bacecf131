//! Switching modes: the trainer takes its GPUs back, or lends them again. A barrier with a deadline.
//!
//! To train: stop placement there, abort, wait for every terminal chunk, move the samples, release the memory,
//! answer per engine. Back: resume the memory, then through Syncing, because the weights are gone.

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_proto::{OrderId, SessionId};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::{Answer, EngineModeSet, ModeKind, Notice};
use crate::event::{ModeReport, ReplyTo};
use crate::fleet::EngineState;
use crate::timer::Timer;

/// A mode switch that waits for engines.
pub(super) struct Switch {
    reply: ReplyTo,
    train: bool,
    since: Now,
    /// Engines that have not answered, with the samples they ran when the switch began.
    waiting: BTreeMap<SessionId, u32>,
    done: Vec<EngineModeSet>,
}

impl Core {
    pub(super) fn switch_mode(
        &mut self,
        now: Now,
        session: SessionId,
        train: bool,
        deadline: Duration,
        reply: ReplyTo,
    ) {
        if let Err((kind, why)) = self.job_of(session) {
            return self.out.fail(reply, kind, why);
        }
        self.trainer_heard(now);
        self.mode_switch_over(now);
        self.fleet.set_training(train);
        let colocated: Vec<(SessionId, u32)> = self
            .fleet
            .colocated()
            .filter(|engine| engine.link.is_some())
            .map(|engine| (engine.session, engine.running.len() as u32))
            .collect();
        let mut waiting = BTreeMap::new();
        for (engine, running) in colocated {
            if self.order_switch(engine, train, deadline) {
                waiting.insert(engine, running);
            }
        }
        self.out.timers.set(Timer::ModeSwitch, now + deadline);
        self.mode_switch = Some(Switch { reply, train, since: now, waiting, done: Vec::new() });
        self.finish_switch(now, false);
    }

    /// False where the engine is in that mode already, or is told when it is heard again.
    fn order_switch(&mut self, session: SessionId, train: bool, deadline: Duration) -> bool {
        let Some(engine) = self.fleet.engine(session) else { return false };
        match (engine.state(), train) {
            (EngineState::Gone { .. } | EngineState::Quarantined, _) => false,
            (EngineState::Draining { .. }, _) => false,
            (EngineState::Released | EngineState::Releasing, true) => false,
            (_, true) => {
                self.set_engine(session, EngineState::Releasing);
                self.fleet.set_parked(session, true);
                self.fleet.set_attested(session, None);
                self.weights.drop_load(session);
                self.out.timers.clear(Timer::Load(session));
                self.order_mode(session, ModeKind::ReleaseMemory, deadline, "the trainer trains");
                true
            }
            (EngineState::Released | EngineState::Releasing, false) => {
                self.order_mode(session, ModeKind::ResumeMemory, deadline, "the trainer generates");
                true
            }
            (_, false) => false,
        }
    }

    pub(super) fn mode_reported(
        &mut self,
        now: Now,
        session: SessionId,
        order: OrderId,
        report: ModeReport,
    ) {
        self.engine_heard(now, session);
        let Some(engine) = self.fleet.engine(session) else { return };
        if engine.mode_order != Some(order) {
            return;
        }
        let (id, state) = (engine.id.clone(), engine.state().clone());
        self.fleet.update(session, |engine| engine.mode_order = None);
        match state {
            EngineState::Draining { .. } => return self.part_with(now, session, "drained", false),
            EngineState::Releasing => self.released(now, session, &report),
            EngineState::Released if report.ok => self.returned(session),
            _ => {}
        }
        let Some(switch) = self.mode_switch.as_mut() else { return };
        let Some(moved) = switch.waiting.remove(&session) else { return };
        switch.done.push(EngineModeSet {
            engine: id,
            drained: report.drained,
            memory_released: report.memory_released,
            moved,
            error: report.error,
        });
        self.finish_switch(now, false);
    }

    fn released(&mut self, now: Now, session: SessionId, report: &ModeReport) {
        // Every terminal chunk has come; what is left here by our books never started there.
        self.move_all(now, session, "mode switch", false);
        self.set_engine(session, EngineState::Released);
        self.weights.drop_holds(session, false);
        if report.memory_released {
            self.weights.drop_probe(session);
        }
        if let Some(engine) = self.fleet.engine(session).map(|engine| engine.id.clone()) {
            self.out.tell(Notice::EngineReleased { engine });
        }
    }

    fn returned(&mut self, session: SessionId) {
        self.fleet.set_parked(session, false);
        self.set_engine(session, EngineState::Syncing { to: self.weights.current() });
    }

    /// An engine left while the switch waited for it.
    pub(super) fn mode_switch_lost(&mut self, now: Now, session: SessionId) {
        let Some(engine) = self.fleet.engine(session).map(|engine| engine.id.clone()) else {
            return;
        };
        let Some(switch) = self.mode_switch.as_mut() else { return };
        let Some(moved) = switch.waiting.remove(&session) else { return };
        let error = "it left meanwhile".to_owned();
        switch.done.push(EngineModeSet {
            engine,
            drained: true,
            memory_released: true,
            moved,
            error,
        });
        self.finish_switch(now, false);
    }

    pub(super) fn mode_switch_over(&mut self, now: Now) {
        self.finish_switch(now, true);
    }

    fn finish_switch(&mut self, now: Now, deadline_over: bool) {
        let ready = |switch: &mut Switch| deadline_over || switch.waiting.is_empty();
        let Some(mut switch) = self.mode_switch.take_if(ready) else { return };
        self.out.timers.clear(Timer::ModeSwitch);
        for (session, moved) in std::mem::take(&mut switch.waiting) {
            // Fenced off: whatever it still makes is stale. Its GPU is not free, and that is said.
            self.move_all(now, session, "mode switch", false);
            let Some(engine) = self.fleet.engine(session) else { continue };
            let error = "did not answer within the deadline; its GPU is still in use".to_owned();
            let engine = engine.id.clone();
            switch.done.push(EngineModeSet {
                engine,
                drained: false,
                memory_released: false,
                moved,
                error,
            });
        }
        let (train, engines) = (switch.train, switch.done.len() as u32);
        let moved = switch.done.iter().map(|engine| engine.moved).sum();
        let ms = now.since(switch.since).as_millis() as u64;
        self.out.tell(Notice::ModeSwitched { train, engines, moved, ms });
        self.out.reply(switch.reply, Answer::ModeSet(switch.done));
    }
}
