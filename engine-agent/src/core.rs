//! The decisions of an agent: attach and re-attach, which sample runs, when a version is loaded,
//! how to leave. A pure state machine without sockets, clock or tasks; owns the tokens of every
//! attempt on this engine until the manager acknowledged them.
//!
//! The driver calls [`Core::handle`] with every event, [`Core::tokens`] with every chunk of a
//! stream, and [`Core::on_timeout`] at [`Core::next_timeout`]; after each call it takes all actions
//! from [`Core::poll_action`].
//!
//! Five state machines, each an enum with its graph drawn above it and one function that assigns
//! it: `AgentState` (`life`), `LinkState` (`link`), `LoadState` (`load`), `Memory` (`memory`),
//! `AttemptState` (`attempts`).

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::time::Duration;

use anabranch_proto::address::Address;
use anabranch_proto::pb;
use anabranch_runtime::{Backoff, Now, TimerTable};

use crate::engine::{EngineInfo, Utilization};

/// Actions of the core.
pub mod action;
mod attempts;
mod drain;
/// Events for the core.
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

/// Settings of the core, fixed for the life of the agent.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Id of the engine, stable over restarts.
    pub id: String,
    /// Number of this life, larger than that of every former life of an agent with this id.
    pub incarnation: u64,
    /// Join token for the manager; empty on loopback.
    pub token: String,
    /// Labels for placement, as the user gave them.
    pub labels: BTreeMap<String, String>,
    /// Number of GPUs of the engine.
    pub gpus: u32,
    /// Addresses where peers fetch weights from this agent, best first.
    pub addresses: Vec<Address>,
    /// Name of the host, equal for all agents that can pass memory to each other; empty if memory
    /// is not passed.
    pub host: String,
    /// True if the trainer loads this engine itself and attests the versions.
    pub weights_by_trainer: bool,
    /// Limit of unacknowledged bytes, above which the newest attempts are given back.
    pub buffer_bytes: usize,
}

/// The state of one agent.
pub struct Core {
    config: CoreConfig,
    state: AgentState,
    link: LinkState,
    session: Option<Session>,
    next_link: u64,
    /// Number of dials since the last Welcome.
    dials: u32,
    /// Delays between dials.
    redial: Backoff,
    /// Incarnation of the engine's present life, or of the last one.
    incarnation: u64,
    /// Facts that the engine tells about itself; `None` while the engine is down.
    engine: Option<EngineInfo>,
    /// Facts of the engine's last life, for a Hello while the engine is down.
    known: Option<EngineInfo>,
    utilization: Utilization,
    /// Tokens that engines generated since the agent started.
    engine_tokens: u64,
    outbox: Outbox,
    prompts: Prompts,
    attempts: Attempts,
    loader: Loader,
    memory: Memory,
    paused: bool,
    /// Id of the last order to pause or continue.
    paused_by: u64,
    /// Outcomes that the manager must learn and that no link could take; bounded by [`MAX_UNSENT`].
    unsent: VecDeque<pb::from_agent::Kind>,
    timers: TimerTable<Timer>,
    /// Actions for the driver, which takes them after each event; bounded by what one event causes.
    actions: VecDeque<Action>,
}

/// Most outcomes kept for the next link; the oldest is dropped.
const MAX_UNSENT: usize = 64;

/// Length of a tick, unless the manager says otherwise.
const TICK: Duration = Duration::from_millis(20);

impl Core {
    /// A core whose engine does not answer yet.
    pub fn new(config: CoreConfig) -> Core {
        let redial = link::redial_backoff(&config.id, config.incarnation);
        Core {
            incarnation: config.incarnation,
            config,
            state: AgentState::Booting,
            link: LinkState::Down,
            session: None,
            next_link: 1,
            dials: 0,
            redial,
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

    /// Takes one event that happened at `now`.
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

    /// Fires every timer that is due at `now`.
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

    /// The earliest deadline, when [`Core::on_timeout`] is due.
    pub fn next_timeout(&self) -> Option<Now> {
        self.timers.next()
    }

    /// The next action to perform; call until `None`.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// True if [`Core::poll_action`] would return an action.
    pub fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    /// The label that the engine must give its weights; `None` while a load changes the label, or
    /// if the trainer loads the engine.
    pub fn expected_label(&self) -> Option<String> {
        let ours = !self.config.weights_by_trainer;
        self.loader.settled_label().filter(|_| ours).map(str::to_owned)
    }

    /// Size of the model's vocabulary; 0 if unknown.
    pub fn vocab(&self) -> u32 {
        self.engine.as_ref().map_or(0, |engine| engine.model.vocab)
    }

    /// Number of requests at the engine, including those that are being aborted.
    pub fn streams_at_engine(&self) -> usize {
        self.attempts.at_engine()
    }

    /// Continues whatever the last event made possible.
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

/// Reports a state change that the graph of `machine` does not have: a panic in tests, an error
/// line in production, where the change is made all the same.
fn check_edge(machine: &str, legal: bool, from: &dyn Debug, to: &dyn Debug) {
    if legal {
        return;
    }
    if cfg!(test) {
        panic!("{machine}: no edge from {from:?} to {to:?}");
    }
    tracing::error!(machine, ?from, ?to, "a state change that the graph does not have");
}

#[cfg(test)]
mod tests;
