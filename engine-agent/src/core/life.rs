//! The lives of the engine and the end of the agent: `impl Core`.

use anabranch_runtime::{Now, TimerTable};

use super::action::{Action, ExitReason};
use super::event::ProbeResult;
use super::mode::Memory;
use super::{AgentState, Core};
use crate::engine::{EngineInfo, Utilization};

impl Core {
    pub(super) fn engine_up(&mut self, now: Now, info: EngineInfo, probe: Option<ProbeResult>) {
        if matches!(self.state, AgentState::Stopped) || self.engine.is_some() {
            return;
        }
        self.incarnation += u64::from(self.known.is_some());
        self.known = Some(info.clone());
        self.loader.engine_started(&info, probe);
        self.memory = Memory::Resident;
        self.paused = false;
        self.engine = Some(info);
        match self.state {
            AgentState::Booting => self.state = AgentState::Serving,
            AgentState::Serving | AgentState::Draining(_) | AgentState::Stopped => return,
        }
        match self.session.is_some() {
            true => self.begin_rejoin(now),
            false => self.dial(),
        }
    }

    /// Nothing of the engine's memory is left: not the samples, not the weights.
    pub(super) fn engine_down(&mut self, now: Now, why: &str, will_restart: bool) {
        if self.engine.take().is_none() {
            return;
        }
        // First what it made, then that it died, then what that ended: so a sample that kills engines is
        // seen to have run at its death, and no token is lost to the end of the session.
        let ends = self.outbox.take_lost_ends();
        self.outbox.seal();
        self.send_ticks(now);
        self.tell_engine_down(why, will_restart);
        ends.into_iter().for_each(|end| self.outbox.end(now, end));
        self.lose_all_attempts(now, why);
        self.outbox.seal();
        self.engine_lost_in_load(why);
        self.memory = Memory::Resident;
        self.utilization = Utilization::default();
        if matches!(self.state, AgentState::Serving) {
            self.state = AgentState::Booting;
        }
    }

    pub(super) fn exit(&mut self, exit: ExitReason) {
        if matches!(self.state, AgentState::Stopped) {
            return;
        }
        self.state = AgentState::Stopped;
        self.timers = TimerTable::new();
        self.act(Action::Exit(exit));
    }
}
