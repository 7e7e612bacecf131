//! The world of the bench: a virtual clock in slices of one millisecond, the real core and ledger, and what each action
//! does to the fleet and the trainer. Times only the calls of core and ledger; owns no figure.

mod act;
mod agents;

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_manager::core::Core;
use anabranch_manager::core::config::CoreConfig;
use anabranch_manager::ledger::Ledger;
use anabranch_proto::{OrderId, SessionId};
use anabranch_runtime::clock::Now;
use anabranch_views::StatePage;

use super::actions::{self, Action};
use super::events::{self, Event};
use super::fleet::{Agent, Columns, Lives};
use super::meter::{self, Kind, Meter, Sight};
use super::trainer::{N, Trainer};
use crate::rng::Rng;

/// Between two ticks of an engine.
const TICK_MS: u64 = 20;
/// Between two words of a living engine that the driver passes on.
const HEARD_MS: u64 = 100;
const BEAT_MS: u64 = 1000;
/// Between two looks for silent samples.
const SWEEP_MS: u64 = 250;
/// Shards of the ledger: the manager's default on 16 cores.
const SHARDS: usize = 32;
/// One engine of so many shares its GPU with the trainer.
const COLOCATED: usize = 50;

/// How large a world is and how fast.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    pub engines: usize,
    /// Samples that each engine runs.
    pub seats: u32,
    /// Tokens of a chunk.
    pub chunk: u32,
    /// Groups that wait for their first placement.
    pub queued: u64,
    /// Below 1 where a short run must see what happens in half a minute: waits shrink by it.
    pub pace: f64,
    pub seed: u64,
}

/// Things that will happen, by time.
pub enum Due {
    Say(Event),
    Attach(usize),
    LoadStep {
        engine: usize,
        incarnation: u64,
        order: OrderId,
    },
    /// The samples of an engine that gives its memory back have ended.
    Drained {
        engine: usize,
        incarnation: u64,
        order: OrderId,
    },
    Announce,
    Seal,
    Switch {
        train: bool,
    },
    Lose {
        round: usize,
    },
    TrainerHeard,
    Commit,
    Page,
}

pub struct World {
    pub scale: Scale,
    pub core: Core,
    pub ledger: Ledger,
    pub meter: Meter,
    pub agents: Vec<Agent>,
    pub trainer: Trainer,
    pub lives: Lives,
    /// Reason for which the run is not what it says it is, where there is one.
    pub trouble: Option<String>,
    /// Tokens of trajectories that were committed, so that the ledger has forgotten them.
    pub forgotten_tokens: u64,
    /// The queue is kept full.
    pub submits: bool,
    columns: Columns,
    sessions: BTreeMap<SessionId, usize>,
    agenda: BTreeMap<u64, Vec<Due>>,
    actions: Vec<Action>,
    newest_group: u64,
    next_link: u64,
    ms: u64,
    now: Now,
    rng: Rng,
}

impl World {
    pub fn new(scale: Scale) -> Self {
        let now = Now::from_millis(1);
        let config = CoreConfig {
            admission_tokens: 1 << 44,
            quarantine_deaths: u32::MAX,
            ..CoreConfig::default()
        };
        let per_second = f64::from(scale.chunk) * 1000.0 / (TICK_MS as f64 * 4.0);
        let lives = Lives::new(N, (5.0 * scale.pace).max(0.3), per_second, scale.chunk);
        let agent = |at: usize| Agent::new(at, at % COLOCATED == 5);
        Self {
            scale,
            ledger: Ledger::new(SHARDS, config.patience()),
            core: Core::new(config, now),
            meter: Meter::new(),
            agents: (0..scale.engines).map(agent).collect(),
            trainer: Trainer::new(scale.engines),
            lives,
            trouble: None,
            forgotten_tokens: 0,
            submits: false,
            columns: Columns::new(scale.chunk, scale.seats),
            sessions: BTreeMap::new(),
            agenda: BTreeMap::new(),
            actions: Vec::new(),
            newest_group: 0,
            next_link: 0,
            ms: 2,
            now,
            rng: Rng::new(scale.seed),
        }
    }

    pub fn ms(&self) -> u64 {
        self.ms
    }

    pub fn running(&self) -> usize {
        self.agents.iter().map(Agent::running).sum()
    }

    /// Groups that were placed until now started in the middle of their lives.
    pub fn end_first_wave(&mut self) {
        self.lives.first_wave = self.newest_group;
    }

    pub fn after(&mut self, ms: u64, due: Due) {
        self.agenda.entry(self.ms + ms.max(1)).or_default().push(due);
    }

    /// One millisecond.
    pub fn slice(&mut self) {
        self.now = self.now.max(Now::from_millis(self.ms));
        for due in self.agenda.remove(&self.ms).unwrap_or_default() {
            self.happen(due);
        }
        for engine in every(self.ms, BEAT_MS, self.agents.len()) {
            self.beat(engine);
        }
        for engine in every(self.ms, HEARD_MS, self.agents.len()) {
            self.hear(engine);
        }
        if self.ms.is_multiple_of(SWEEP_MS) {
            self.sweep();
        }
        for engine in every(self.ms, TICK_MS, self.agents.len()) {
            self.tick(engine);
        }
        if self.submits
            && let Some(request) = self.trainer.top_up(self.scale.queued)
        {
            self.input(request);
        }
        self.meter.end_turn();
        self.ms += 1;
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Say(event) => self.input(event),
            Due::Attach(engine) => self.attach(engine),
            Due::LoadStep { engine, incarnation, order } => {
                self.load_step(engine, incarnation, order);
            }
            Due::Drained { engine, incarnation, order } => self.drained(engine, incarnation, order),
            Due::Announce => {
                let number = self.trainer.next_version();
                self.input(events::announced(self.trainer.session, number));
                self.after(10, Due::Seal);
            }
            Due::Seal => self.input(events::sealed(self.trainer.version)),
            Due::Switch { train } => {
                self.trainer.training = train;
                self.input(events::mode_requested(self.trainer.session, train));
            }
            Due::Lose { round } => self.lose(round),
            Due::TrainerHeard => {
                self.input(Event::TrainerHeard);
                self.after(HEARD_MS, Due::TrainerHeard);
            }
            Due::Commit => {
                if let Some(event) = self.trainer.commit() {
                    self.input(event);
                }
                self.after(500, Due::Commit);
            }
            Due::Page => {
                self.page();
                self.after(1000, Due::Page);
            }
        }
    }

    /// Deadlines come at their own times, then the event at its own.
    pub fn input(&mut self, event: Event) {
        let at = self.now + Duration::from_micros(1);
        while let Some(due) = self.core.next_timeout().filter(|due| *due <= at) {
            self.now = self.now.max(due);
            self.tell(Event::TimePassed { gap: Duration::ZERO });
        }
        self.now = at;
        self.tell(event);
    }

    fn tell(&mut self, event: Event) {
        let mut kind = Kind { event: events::kind(&event), waiting: self.trainer.waiting };
        let brought = events::brings(&event);
        let mut actions = std::mem::take(&mut self.actions);
        let visited = self.core.visited();
        let from = meter::cpu_ns();
        self.core.handle(self.now, event);
        actions.extend(std::iter::from_fn(|| self.core.poll_action()));
        let ns = self.meter.since(from);
        let visited = self.core.visited() - visited;
        let moved = actions::moved(&actions);
        if moved.current {
            kind.event = meter::CURRENT;
        } else if moved.lost > 0 {
            kind.event = meter::LOSS;
        }
        self.meter.saw(kind, Sight { ns, visited, moved: moved.entities + brought });
        for action in actions.drain(..) {
            self.carry_out(action);
        }
        self.actions = actions;
    }

    fn page(&mut self) {
        let visited = self.core.visited();
        let from = meter::cpu_ns();
        let page = self.core.state_page(self.now, StatePage::default());
        let ns = self.meter.since(from);
        drop(page);
        let visited = self.core.visited() - visited;
        let kind = Kind { event: meter::STATE, waiting: self.trainer.waiting };
        self.meter.saw(kind, Sight { ns, visited, moved: 0 });
    }
}

/// Engines whose turn it is in this millisecond of a period.
fn every(ms: u64, period: u64, engines: usize) -> impl Iterator<Item = usize> {
    ((ms % period) as usize..engines).step_by(period as usize)
}
