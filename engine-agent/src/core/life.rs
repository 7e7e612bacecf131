//! The lives of the engine and the end of the agent: `impl Core`.

use anabranch_runtime::{Now, TimerTable};

use super::action::{Action, ExitReason};
use super::drain::DrainOrder;
use super::event::ProbeResult;
use super::memory::Memory;
use super::{Core, check_edge};
use crate::engine::{EngineInfo, Utilization};

/// State of the agent as a whole.
///
/// ```text
///              engine answers             drain order, notice, SIGTERM
///   Booting ──────────────────► Serving ───────────────────────────────► Draining ──► Stopped
///      ▲  │    engine died          │                                      ▲ ▲  │
///      │  └────────────────────────►│◄───────────────────────────────┐     │ └──┘ sooner deadline, next phase
///      └────────────────────────────┴─ (Booting drains as well) ─────┴─────┘
/// ```
///
/// Any state becomes `Stopped` when the manager refuses the agent or orders it to leave.
#[derive(Clone, Copy, Debug)]
pub(super) enum AgentState {
    /// The engine does not answer yet, or died.
    Booting,
    /// The engine answers; attempts are accepted.
    Serving,
    /// The agent leaves; no new attempt is accepted.
    Draining(DrainOrder),
    /// The agent said why it ends; events no longer change anything.
    Stopped,
}

impl AgentState {
    /// True if the graph has an edge from this state to `next`.
    pub(super) fn may_become(&self, next: &AgentState) -> bool {
        use AgentState::{Booting, Draining, Serving, Stopped};
        match (self, next) {
            (Booting, Serving) | (Serving, Booting) => true,
            (Booting | Serving, Draining(_)) => true,
            (Draining(old), Draining(new)) => old.may_become(new),
            (Stopped, _) => false,
            (_, Stopped) => true,
            _ => false,
        }
    }
}

impl Core {
    /// Assigns the state of the agent; no other code does.
    pub(super) fn set_state(&mut self, next: AgentState) {
        check_edge("agent", self.state.may_become(&next), &self.state, &next);
        self.state = next;
    }

    pub(super) fn engine_up(&mut self, now: Now, info: EngineInfo, probe: Option<ProbeResult>) {
        if matches!(self.state, AgentState::Stopped) || self.engine.is_some() {
            return;
        }
        self.incarnation += u64::from(self.known.is_some());
        self.known = Some(info.clone());
        self.loader.engine_started(&info, probe);
        self.set_memory(Memory::Resident);
        self.paused = false;
        self.engine = Some(info);
        match self.state {
            AgentState::Booting => self.set_state(AgentState::Serving),
            AgentState::Serving | AgentState::Draining(_) | AgentState::Stopped => return,
        }
        match self.session.is_some() {
            true => self.begin_rejoin(now),
            false => self.dial(),
        }
    }

    /// Ends everything that was in the engine's memory: attempts and weights.
    pub(super) fn engine_down(&mut self, now: Now, why: &str, will_restart: bool) {
        if self.engine.take().is_none() {
            return;
        }
        // Order: the tokens, then the death, then the ends that the death caused. The manager sees
        // a sample that kills engines as running at the death, and no token is lost to the end of
        // the session.
        let ends = self.outbox.take_lost_ends();
        self.outbox.seal();
        self.send_ticks(now);
        self.tell_engine_down(why, will_restart);
        ends.into_iter().for_each(|end| self.outbox.end(now, end));
        self.lose_all_attempts(now, why);
        self.outbox.seal();
        self.engine_lost_in_load(why);
        self.set_memory(Memory::Resident);
        self.utilization = Utilization::default();
        if matches!(self.state, AgentState::Serving) {
            self.set_state(AgentState::Booting);
        }
    }

    pub(super) fn exit(&mut self, exit: ExitReason) {
        if matches!(self.state, AgentState::Stopped) {
            return;
        }
        self.set_state(AgentState::Stopped);
        self.timers = TimerTable::new();
        self.act(Action::Exit(exit));
    }
}
