//! The one loop that owns the core: it takes in what happened, hands it over, carries out what the core
//! asks for, and keeps the clock. Every arm of its `select!` returns one value; nothing changes inside one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anabranch_runtime::{Clock, Now};
use anabranch_views::{StatePage, StateView};
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::core::Core;
use crate::event::Event;
use crate::wire::effects::Effects;
use crate::wire::gate::Pulse;
use crate::wire::inbox::Input;

/// Taken in before the core's actions are carried out.
const BATCH: usize = 256;
const HEARTBEAT: Duration = Duration::from_millis(250);
/// A loop that turned so much too late was stopped (SIGSTOP, a paused machine), not busy.
const STOPPED: Duration = Duration::from_millis(500);
/// A page of the state younger than this is shown again.
const STATE_AGE: Duration = Duration::from_millis(100);
/// Pages kept at most, to be shown again.
const PAGES: usize = 16;
/// Heartbeats between two looks at the state, for the metrics.
const BEATS_PER_LOOK: u32 = 4;

pub(crate) struct Driver {
    pub core: Core,
    pub effects: Effects,
    pub inbox: mpsc::Receiver<Input>,
    pub clock: Clock,
    pub pulse: Arc<Pulse>,
    pub stop: CancellationToken,
}

enum Turn {
    Inputs,
    Timeout,
    Heartbeat,
    Stop,
}

/// What the loop itself remembers.
struct Memory {
    buffer: Vec<Input>,
    heartbeat: Interval,
    beats: u32,
    /// When the loop last turned.
    turned: Now,
    pages: BTreeMap<StatePage, (Now, Arc<StateView>)>,
    /// Session that the metrics look at next, while they have not seen all engines.
    look: Option<u64>,
}

impl Driver {
    pub async fn run(mut self) {
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let turned = self.clock.now();
        let buffer = Vec::with_capacity(BATCH);
        let pages = BTreeMap::new();
        let mut memory = Memory { buffer, heartbeat, beats: 0, turned, pages, look: None };
        loop {
            let turn = self.select(&mut memory).await;
            self.forgive_gap(&mut memory);
            match turn {
                Turn::Stop => break,
                Turn::Inputs => self.take_in(&mut memory),
                Turn::Timeout => {
                    self.core.handle(self.clock.now(), Event::TimePassed { gap: Duration::ZERO })
                }
                Turn::Heartbeat => {
                    self.look_for_silence();
                    self.beat(&mut memory);
                }
            }
            self.carry_out();
        }
        self.pulse.stop();
        self.effects.close_all();
    }

    async fn select(&mut self, memory: &mut Memory) -> Turn {
        let next = self.core.next_timeout().map(|at| Instant::now() + self.clock.until(at));
        let timeout = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Turn::Stop,
            _ = memory.heartbeat.tick() => Turn::Heartbeat,
            () = timeout => Turn::Timeout,
            taken = self.inbox.recv_many(&mut memory.buffer, BATCH) => {
                if taken == 0 { Turn::Stop } else { Turn::Inputs }
            }
        }
    }

    /// After this process itself was stopped, a peer that was silent meanwhile must not lose its lease: the core
    /// hears of it before anything else, since any event lets deadlines that are due fire.
    fn forgive_gap(&mut self, memory: &mut Memory) {
        let now = self.clock.now();
        let gap = now.since(memory.turned).saturating_sub(HEARTBEAT);
        memory.turned = now;
        self.pulse.beat(&self.clock);
        if gap >= STOPPED {
            warn!(
                "the manager itself was stopped for {} ms; leases are extended by it",
                gap.as_millis()
            );
            self.effects.metrics.stopped(gap);
            self.effects.ledger.resumed(now);
            self.core.handle(now, Event::TimePassed { gap });
        }
    }

    /// Attempts that the ledger finds silent.
    fn look_for_silence(&mut self) {
        let now = self.clock.now();
        for (session, silent) in self.effects.ledger.sweep(now) {
            self.core.handle(now, Event::SilenceFound { session, silent });
        }
    }

    fn take_in(&mut self, memory: &mut Memory) {
        let now = self.clock.now();
        let mut inputs = std::mem::take(&mut memory.buffer);
        for input in inputs.drain(..) {
            if let Some(event) = self.translate(memory, input) {
                self.core.handle(now, event);
            }
        }
        memory.buffer = inputs;
    }

    /// What an input means for the core; bookkeeping of streams stays here.
    fn translate(&mut self, memory: &mut Memory, input: Input) -> Option<Event> {
        match input {
            Input::Event(event) => {
                if let Event::FactsFound { facts, .. } = &event {
                    self.effects.consumers.note(facts);
                }
                return Some(event);
            }
            Input::Ask { to, event, answer } => {
                self.effects.expect_reply(to, answer);
                return Some(event);
            }
            Input::Attach(attach) => return Some(self.effects.attach(*attach)),
            Input::LinkLost { link, why } => return self.effects.link_lost(link, why),
            Input::Bind { session, out, answer } => {
                // What was asked for before goes out before what the bound stream causes.
                self.carry_out();
                self.effects.bind(session, out, answer);
            }
            Input::ConsumerOpened(new) => return Some(self.effects.open_consumer(*new)),
            Input::ConsumerLost(consumer) => {
                self.effects.consumers.lost(consumer);
                return Some(Event::ConsumerLost { consumer });
            }
            Input::PublisherOpened { publisher, out } => {
                self.effects.open_publisher(publisher, out)
            }
            Input::PublisherLost(publisher) => return Some(self.effects.publisher_lost(publisher)),
            Input::State { page, answer } => {
                // Who asked may have gone.
                let _ = answer.send(self.state(memory, page));
            }
        }
        None
    }

    /// In the order the core gave them. What breaks on the way is told to the core, which may ask for more.
    fn carry_out(&mut self) {
        loop {
            while let Some(action) = self.core.poll_action() {
                self.effects.apply(action);
            }
            // Durable changes of the turn: nobody keeps them until there is a journal.
            self.core.take_changes();
            let found = self.effects.take_found();
            if found.is_empty() {
                return;
            }
            for event in found {
                self.core.handle(self.clock.now(), event);
            }
        }
    }

    /// The metrics look at the counts once a second, and at one page of engines a beat.
    fn beat(&mut self, memory: &mut Memory) {
        memory.beats = memory.beats.wrapping_add(1);
        let is_due = memory.beats.is_multiple_of(BEATS_PER_LOOK);
        if !is_due && memory.look.is_none() {
            return;
        }
        let page = memory.look.map_or_else(StatePage::default, StatePage::starting);
        let state = self.state(memory, page);
        memory.look = state.next;
        let now = self.clock.now();
        self.effects.metrics.look_at_engines(now, &state.engines);
        if is_due {
            self.effects.drop_stale_replies();
            self.effects.send_statuses();
            let ledger = self.effects.ledger.stats();
            self.effects.metrics.look(now, &state, &ledger, self.inbox.len());
        }
    }

    fn state(&mut self, memory: &mut Memory, page: StatePage) -> Arc<StateView> {
        let now = self.clock.now();
        memory.pages.retain(|_, (at, _)| now.since(*at) < STATE_AGE);
        if let Some((_, state)) = memory.pages.get(&page) {
            return state.clone();
        }
        let state = Arc::new(self.core.state_page(now, page));
        if memory.pages.len() < PAGES {
            memory.pages.insert(page, (now, state.clone()));
        }
        state
    }
}
