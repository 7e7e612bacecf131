//! What an agent decides: attach and re-attach, which sample runs, when a version is loaded, how to
//! leave. A pure state machine: no sockets, no clock, no tasks. It owns every sample's ledger on
//! this engine.
//!
//! How to drive it: [`Core::handle`] with what happened, [`Core::tokens`] with what a stream
//! brought, [`Core::on_timeout`] at [`Core::next_timeout`]; after each, take actions from
//! [`Core::poll_action`].
//!
//! The states and their graphs: [`AgentState`](life::AgentState), [`LinkState`], `LoadState`,
//! `Memory`, `AttemptState`. One function assigns each, and checks the edge.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::time::Duration;

use anabranch_proto::address::Address;
use anabranch_proto::pb;
use anabranch_runtime::{Now, TimerTable};

use crate::engine::{EngineInfo, Utilization};

pub mod action;
mod attempts;
mod drain;
pub mod event;
mod life;
mod link;
mod load;
mod memory;
mod mode;
mod outbox;
mod prompts;
mod session;
mod timer;

pub use action::{Action, ExitReason, FetchOrder};
pub use attempts::AfterChunk;
pub use event::{Call, Event, LinkId, Moved, ProbeResult, RequestEnd, StagedVersion};
pub use link::DIAL_PATIENCE;
pub use outbox::WINDOW_TICKS;

use attempts::Attempts;
use life::AgentState;
use link::LinkState;
use load::Loader;
use memory::Memory;
use outbox::Outbox;
use prompts::Prompts;
use session::Session;
use timer::Timer;

/// What does not change while the agent lives.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    pub id: String,
    /// Larger than that of every former life of an agent with this id.
    pub incarnation: u64,
    pub token: String,
    pub labels: BTreeMap<String, String>,
    pub gpus: u32,
    pub addresses: Vec<Address>,
    /// The same for all agents that it can pass memory to; empty: none.
    pub host: String,
    pub weights_by_trainer: bool,
    /// Unacknowledged bytes above which samples are given back, newest first.
    pub buffer_bytes: usize,
}

pub struct Core {
    config: CoreConfig,
    state: AgentState,
    link: LinkState,
    session: Option<Session>,
    next_link: u64,
    /// Dials since the last Welcome.
    dials: u32,
    /// Of the present or last life of the engine.
    incarnation: u64,
    /// `None` while the engine is down.
    engine: Option<EngineInfo>,
    /// Of the last life, to speak for it when it is over.
    known: Option<EngineInfo>,
    utilization: Utilization,
    /// Made by engines since the agent started.
    engine_tokens: u64,
    outbox: Outbox,
    prompts: Prompts,
    attempts: Attempts,
    loader: Loader,
    memory: Memory,
    paused: bool,
    /// The order that paused or resumed last.
    paused_by: u64,
    /// Outcomes that the manager must learn and that no link could take; bounded by [`MAX_UNSENT`].
    unsent: VecDeque<pb::from_agent::Kind>,
    timers: TimerTable<Timer>,
    /// Drained after each event; bounded by what one event causes.
    actions: VecDeque<Action>,
}

const MAX_UNSENT: usize = 64;

/// Until the manager says otherwise.
const TICK: Duration = Duration::from_millis(20);

impl Core {
    pub fn new(config: CoreConfig) -> Core {
        Core {
            incarnation: config.incarnation,
            config,
            state: AgentState::Booting,
            link: LinkState::Down,
            session: None,
            next_link: 1,
            dials: 0,
            engine: None,
            known: None,
            utilization: Utilization::default(),
            engine_tokens: 0,
            outbox: Outbox::new(),
            prompts: Prompts::default(),
            attempts: Attempts::default(),
            loader: Loader::default(),
            memory: Memory::Resident,
            paused: false,
            paused_by: 0,
            unsent: VecDeque::new(),
            timers: TimerTable::new(),
            actions: VecDeque::new(),
        }
    }

    pub fn handle(&mut self, now: Now, event: Event) {
        match event {
            Event::EngineUp { info, probe } => self.engine_up(now, *info, probe),
            Event::EngineDown { why, will_restart } => self.engine_down(now, &why, will_restart),
            Event::UtilizationPolled(now) => self.utilization = now,
            Event::RequestEnded { attempt, end } => self.request_ended(now, attempt, end),
            Event::ManagerSaid { link, kind } => self.manager_said(now, link, kind),
            Event::DataCame { link, kind } => self.data_came(now, link, kind),
            Event::Bound { link } => self.bound(link),
            Event::LinkLost { link, why, fatal } => self.link_lost(now, link, &why, fatal),
            Event::FetchProgressed { order, so_far } => self.fetch_progressed(now, order, so_far),
            Event::Fetched { order, result } => self.fetched(now, order, result),
            Event::Called { call, result } => self.called(now, call, result),
            Event::Probed { result } => self.probed(now, result),
            Event::LeaveAsked { why, within } => self.leave_asked(now, &why, within),
        }
        self.settle(now);
    }

    pub fn on_timeout(&mut self, now: Now) {
        while let Some(timer) = self.timers.pop_due(now) {
            match timer {
                Timer::Tick => self.tick(now),
                Timer::Beat => self.beat(now),
                Timer::LinkSilent => self.link_silent(now),
                Timer::Redial => self.dial(),
                Timer::Rejoin => self.rejoin(),
                Timer::LoadDeadline => self.load_deadline(now),
                Timer::Quiesce => self.quiesce_gave_up(now),
                Timer::DrainCut => self.drain_cut(now),
                Timer::DrainGiveUp => self.drain_gave_up(),
                Timer::MemoryDeadline => self.memory_deadline(),
            }
        }
        self.settle(now);
    }

    pub fn next_timeout(&self) -> Option<Now> {
        self.timers.next()
    }

    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    /// What the engine must call its weights; `None` while that changes, or when it is not our
    /// business.
    pub fn expected_label(&self) -> Option<String> {
        let ours = !self.config.weights_by_trainer;
        self.loader.settled_label().filter(|_| ours).map(str::to_owned)
    }

    pub fn vocab(&self) -> u32 {
        self.engine.as_ref().map_or(0, |engine| engine.model.vocab)
    }

    pub fn streams_at_engine(&self) -> usize {
        self.attempts.at_engine()
    }

    /// What every event may have made possible.
    fn settle(&mut self, now: Now) {
        self.settle_load();
        self.settle_memory();
        self.settle_drain(now);
        self.arm_tick(now);
        self.send_ticks(now);
        self.settle_rejoin();
    }

    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    fn tick(&mut self, now: Now) {
        self.outbox.seal();
        if self.outbox.bytes() > self.config.buffer_bytes {
            self.shed(now);
        }
    }

    fn arm_tick(&mut self, now: Now) {
        if self.outbox.has_open() && self.timers.get(Timer::Tick).is_none() {
            self.timers.set(Timer::Tick, now + self.tick_length());
        }
    }

    fn tick_length(&self) -> Duration {
        self.session.as_ref().map_or(TICK, |session| session.tick)
    }
}

/// Tells of a state change that the graph of `machine` does not have: a panic in tests, an error
/// line in production, where the change is made all the same.
fn check_edge(machine: &str, legal: bool, from: &dyn Debug, to: &dyn Debug) {
    if legal {
        return;
    }
    assert!(!cfg!(test), "{machine}: no edge from {from:?} to {to:?}");
    tracing::error!(machine, ?from, ?to, "a state change that the graph does not have");
}

#[cfg(test)]
mod tests;
