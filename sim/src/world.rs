//! The world: virtual clock, network, and what each message does when it arrives. Jumps from one event to the
//! next; the manager's cores are the production ones.

mod act;
mod agents;
mod ending;
mod happening;
mod life;
mod training;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use anabranch_engine::synthetic::SyntheticParams;
use anabranch_manager::action::Batch;
use anabranch_manager::core::config::CoreConfig;
use anabranch_manager::core::{Core, Folded};
use anabranch_manager::event::{Event, LinkId, ReplyTo};
use anabranch_manager::ledger::{Ledger, Taken};
use anabranch_proto::pb;
use anabranch_proto::{SessionId, Version};
use anabranch_runtime::clock::Now;

pub(crate) use happening::{Happening, ToAgent, Waiting};

use crate::coverage::Coverage;
use crate::digest::Digest;
use crate::fleet::{OfTrainer, SimEngine};
use crate::rng::Rng;
use crate::scenario::Scenario;
use crate::trainer::{Phase, Trainer};

/// Time of one way through the network.
const LATENCY: Duration = Duration::from_millis(2);
/// Time between two looks for silent samples.
const SWEEP: Duration = Duration::from_millis(250);
pub(crate) const TICK: Duration = Duration::from_millis(20);
/// Events between two comparisons of the folded durable state with the live one.
const FOLD_EVERY: u64 = 16;
/// Longest prompt in tokens, as `World::prompt` makes them.
const LONGEST_PROMPT: u64 = 24;
/// Virtual time after which a world is taken to hang.
const PATIENCE: Duration = Duration::from_secs(900);

/// Figures of a world that ended well.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Outcome {
    /// Seed of the world.
    pub seed: u64,
    /// Virtual time that the world took, in milliseconds.
    pub virtual_ms: u64,
    /// Events that the core handled.
    pub events: u64,
    /// Samples that the trainer received.
    pub delivered: u64,
    /// Tokens that were recomputed with the oracle.
    pub checked_tokens: u64,
    /// Times that a sample continued on another engine.
    pub migrations: u64,
    /// Tokens that were made again after a restart from the prompt.
    pub regenerated_tokens: u64,
    /// Samples that the manager gave up.
    pub abandoned: u64,
    /// Versions that were published.
    pub versions: u64,
    /// Injected faults by kind.
    pub faults: BTreeMap<String, u64>,
    /// Hash of every action of the manager's core with its time, and of everything delivered: equal decisions have
    /// equal digests.
    pub digest: String,
}

/// A broken promise, with the last things that happened before it.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Seed of the world.
    pub seed: u64,
    /// Virtual time of the failure, in milliseconds.
    pub at_ms: u64,
    /// The broken promise.
    pub what: String,
    /// The last things that happened, in their order.
    pub story: Vec<String>,
}

pub(crate) struct World {
    pub scenario: Scenario,
    pub params: SyntheticParams,
    pub now: Now,
    pub rng: Rng,
    pub core: Core,
    /// Durable state of the core, folded from its changes alone.
    folded: Folded,
    pub ledger: Ledger,
    pub engines: Vec<SimEngine>,
    pub trainer: Trainer,
    queue: BTreeMap<(Now, u64), Happening>,
    next: u64,
    pub links: BTreeMap<LinkId, usize>,
    /// Newest link of each session, as the manager sees it.
    pub sessions: BTreeMap<SessionId, LinkId>,
    acked: BTreeMap<SessionId, u64>,
    /// New tokens of each session since its last message to the core.
    made: BTreeMap<SessionId, u64>,
    /// Events that trainers of older epochs still send, once the next one has opened the job.
    pub zombies: Vec<Event>,
    /// Answers of the ledger to the actions of this turn.
    found: Vec<Event>,
    pub waiting: BTreeMap<ReplyTo, Waiting>,
    /// Samples of each group, by the group's key, without groups that were refused.
    pub asked: BTreeMap<String, u32>,
    pub admitted: BTreeSet<String>,
    pub pins: BTreeMap<String, Version>,
    pub lose_finishes_at: Option<(usize, Now)>,
    pub garble: Option<usize>,
    /// Begin and end of the time in which the manager's process is stopped.
    pub paused: Option<(Now, Now)>,
    pub outcome: Outcome,
    digest: Digest,
    coverage: Option<Coverage>,
    story: VecDeque<String>,
    broken: Option<String>,
}

/// Runs one world to its end. The error is the first broken promise.
pub fn run(scenario: Scenario) -> Result<Outcome, Box<Failure>> {
    let mut world = World::new(scenario);
    world.go();
    world.finish()
}

/// Runs one world like [`run`], and counts what was seen of the core. Takes about twice as long.
pub fn run_covered(scenario: Scenario) -> (Result<Outcome, Box<Failure>>, Coverage) {
    let mut world = World::new(scenario);
    world.coverage = Some(Default::default());
    world.go();
    let coverage = world.coverage.take().unwrap_or_default();
    (world.finish(), coverage)
}

impl World {
    fn new(scenario: Scenario) -> Self {
        let mut rng = Rng::new(scenario.seed ^ 0x5151);
        let now = Now::ZERO;
        let colocated = usize::from(scenario.colocated);
        let workers = scenario.engines + colocated;
        let named = |i: usize| {
            let of_trainer = match (i < colocated, scenario.fleet.colocated_loads) {
                (false, _) => OfTrainer::Nothing,
                (true, true) => OfTrainer::Colocated,
                (true, false) => OfTrainer::Loaded,
            };
            let engine = SimEngine::new(format!("e{i}"), of_trainer, now);
            if i < workers { engine } else { engine.without_an_engine() }
        };
        let config = config_of(&scenario);
        let mean_len = Some(scenario.mean_len);
        Self {
            params: SyntheticParams { vocab: 32_000, eos_id: 2, mean_len },
            engines: (0..workers + scenario.fleet.relays).map(named).collect(),
            outcome: Outcome { seed: scenario.seed, ..Outcome::default() },
            rng: Rng::new(rng.next()),
            now,
            folded: Folded::default(),
            ledger: Ledger::new(4, config.patience()),
            core: Core::new(config, now),
            trainer: Trainer::new(scenario.shards),
            queue: BTreeMap::new(),
            next: 0,
            links: BTreeMap::new(),
            sessions: BTreeMap::new(),
            acked: BTreeMap::new(),
            made: BTreeMap::new(),
            zombies: Vec::new(),
            found: Vec::new(),
            waiting: BTreeMap::new(),
            asked: BTreeMap::new(),
            admitted: BTreeSet::new(),
            pins: BTreeMap::new(),
            lose_finishes_at: None,
            garble: None,
            paused: None,
            digest: Digest::new(),
            coverage: None,
            story: VecDeque::new(),
            broken: None,
            scenario,
        }
    }

    fn go(&mut self) {
        self.begin();
        while self.trainer.phase != Phase::Done && self.broken.is_none() {
            self.step();
        }
    }

    fn begin(&mut self) {
        let opens = Duration::from_millis(self.rng.range(0, 50));
        self.after(opens + self.scenario.trainer.opens_after, Happening::OpenJob);
        self.after(Duration::from_millis(500), Happening::Beats);
        self.after(SWEEP, Happening::Sweep);
        for engine in 0..self.engines.len() {
            let joins = Duration::from_millis(self.rng.range(0, 3_000));
            self.after(joins, Happening::Redial { engine });
            self.after(TICK, Happening::Make { engine });
        }
        if !self.scenario.fault_every.is_zero() {
            self.after(self.scenario.fault_every, Happening::Strike);
        }
    }

    /// Runs the next event: a message, a model's timer, or a deadline of the core.
    fn step(&mut self) {
        let due = self.queue.first_key_value().map(|(at, _)| at.0);
        let deadline = self.core.next_timeout().filter(|_| self.paused.is_none());
        let wakes = self.paused.map(|(_, until)| until);
        let first = [due, deadline, wakes].into_iter().flatten().min();
        let Some(first) = first else { return self.fail("nothing is left to happen".into()) };
        self.now = self.now.max(first);
        if self.now.0 > PATIENCE {
            return self.fail(format!("hangs: {}", self.why_it_hangs()));
        }
        self.end_pause();
        match deadline {
            Some(at) if due.is_none_or(|due| at <= due) => {
                self.core_event(Event::TimePassed { gap: Duration::ZERO });
            }
            _ if due.is_none_or(|due| due > self.now) => {}
            _ => {
                if let Some((_, happening)) = self.queue.pop_first() {
                    self.happen(happening);
                }
            }
        }
    }

    /// A stopped manager learns how long it was away before anything is held against its peers.
    fn end_pause(&mut self) {
        if let Some((since, _)) = self.paused.filter(|(_, until)| *until <= self.now) {
            self.paused = None;
            self.ledger.resumed(self.now);
            self.core_event(Event::TimePassed { gap: self.now.since(since) });
        }
    }

    fn happen(&mut self, happening: Happening) {
        if let (Some((_, until)), true) = (self.paused, happening.is_for_manager()) {
            return self.at(until + Duration::from_millis(1), happening);
        }
        match happening {
            Happening::Core(event) => self.core_event(event),
            Happening::Tick { link, session, tick } => self.tick_arrived(link, session, &tick),
            Happening::ToAgent { engine, link, message } => self.agent_got(engine, link, message),
            Happening::Strike => self.strike_and_rearm(),
            other => self.happen_outside(other),
        }
    }

    fn strike_and_rearm(&mut self) {
        if self.now.0 > self.scenario.faults_until {
            return;
        }
        self.strike();
        let mean = self.scenario.fault_every.as_millis() as u64;
        let next = Duration::from_millis(self.rng.range(mean / 4 + 1, mean * 2));
        self.after(next, Happening::Strike);
    }

    fn tick_arrived(&mut self, link: LinkId, session: SessionId, tick: &pb::Tick) {
        if !self.links.contains_key(&link) {
            return;
        }
        match self.ledger.apply(self.now, session, tick) {
            Err(bad) => self.core_event(Event::LinkLost { link, why: leak(bad.to_string()) }),
            Ok(Taken { facts, tokens }) => {
                *self.made.entry(session).or_default() += tokens;
                let acked = self.acked.entry(session).or_default();
                *acked = (*acked).max(tick.seq);
                if !facts.is_empty() {
                    self.core_event(Event::FactsFound { session, facts });
                }
                self.send_agent(link, ToAgent::Ack(tick.seq));
            }
        }
    }

    pub(crate) fn core_event(&mut self, event: Event) {
        self.outcome.events += 1;
        if let Some(coverage) = &mut self.coverage {
            coverage.event(&event);
        }
        self.core.handle(self.now, event);
        while let Some(action) = self.core.poll_action() {
            if let Some(coverage) = &mut self.coverage {
                coverage.action(&action);
            }
            self.digest.action(self.now, &action);
            self.act(action);
        }
        let coverage = &mut self.coverage;
        self.folded.apply_telling(&self.core.take_changes(), &mut |step| {
            if let Some(coverage) = coverage {
                coverage.moved(step);
            }
        });
        if let Err(what) = self.core.check() {
            self.fail(what);
        }
        if self.outcome.events.is_multiple_of(FOLD_EVERY)
            && let Err(what) = self.core.check_fold(&self.folded)
        {
            self.fail(what);
        }
        for event in std::mem::take(&mut self.found) {
            self.core_event(event);
        }
    }

    /// Looks for silent samples in the ledger, as the driver does.
    pub(crate) fn sweep(&mut self) {
        for (session, silent) in self.ledger.sweep(self.now) {
            self.core_event(Event::SilenceFound { session, silent });
        }
        self.after(SWEEP, Happening::Sweep);
    }

    pub(crate) fn post(&mut self, event: Event) {
        self.after(LATENCY, Happening::Core(event));
    }

    pub(crate) fn send_agent(&mut self, link: LinkId, message: ToAgent) {
        if let Some(&engine) = self.links.get(&link) {
            self.after(LATENCY, Happening::ToAgent { engine, link, message });
        }
    }

    pub(crate) fn after(&mut self, wait: Duration, happening: Happening) {
        self.at(self.now + wait, happening);
    }

    fn at(&mut self, at: Now, happening: Happening) {
        self.next += 1;
        self.queue.insert((at, self.next), happening);
    }

    pub(crate) fn ask(&mut self, what: Waiting) -> ReplyTo {
        self.next += 1;
        let reply = ReplyTo(self.next);
        self.waiting.insert(reply, what);
        reply
    }

    pub(crate) fn no_reply(&mut self) -> ReplyTo {
        self.ask(Waiting::Nothing)
    }

    pub(crate) fn note(&mut self, line: String) {
        if self.story.len() >= 400 {
            self.story.pop_front();
        }
        self.story.push_back(format!("{:>8} ms  {line}", self.now.as_millis()));
    }

    pub(crate) fn fail(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }
}

fn config_of(scenario: &Scenario) -> CoreConfig {
    let sample = u64::from(scenario.max_tokens) + LONGEST_PROMPT;
    let step = sample * u64::from(scenario.n) * scenario.groups_per_step;
    let mut config = CoreConfig {
        quarantine_deaths: scenario.fleet.quarantine_deaths,
        quarantine_ms: 3_000,
        load_deadline_ms: scenario.fleet.load_deadline.as_millis() as u64,
        ..CoreConfig::default()
    };
    if scenario.trainer.tight_admission {
        config.admission_tokens = step * 5 / 4;
    }
    config
}

/// Makes a reason static, as the core's link events need it; a world makes at most a handful of its own.
fn leak(reason: String) -> &'static str {
    Box::leak(reason.into_boxed_str())
}
