//! Agents, as far as they act of themselves: attach, speak, generate, load, die. Owns when an agent speaks and in what order engines
//! are lost.

use anabranch_manager::ledger::Taken;
use anabranch_proto::OrderId;

use super::super::events::{self, Event, LinkId};
use super::super::meter::{self, Sight};
use super::{Due, World};

/// Stages of a load take up to this long each.
const STAGE_MS: u64 = 400;

impl World {
    pub(super) fn load_goes_on(&mut self, engine: usize, incarnation: u64, order: OrderId) {
        let most = (STAGE_MS as f64 * self.scale.pace) as u64;
        let wait = self.rng.range(5, most.max(10));
        self.after(wait, Due::LoadStep { engine, incarnation, order });
    }

    pub(super) fn load_step(&mut self, engine: usize, incarnation: u64, order: OrderId) {
        let agent = &mut self.agents[engine];
        let Some(session) = agent.session.filter(|_| agent.incarnation == incarnation) else {
            return;
        };
        let Some(load) = agent.load_on(order) else { return };
        if agent.load.is_some() {
            self.load_goes_on(engine, incarnation, order);
        }
        self.input(events::load_reported(session, order, load.version, load.stage));
    }

    pub(super) fn drained(&mut self, engine: usize, incarnation: u64, order: OrderId) {
        let agent = &self.agents[engine];
        let Some(session) = agent.session.filter(|_| agent.incarnation == incarnation) else {
            return;
        };
        // The ends come before the answer, as an agent sends them.
        self.tick(engine);
        self.input(events::mode_reported(session, order));
    }

    /// The engine process dies, or its host does; it comes back as a new one.
    pub(super) fn lose(&mut self, round: usize) {
        self.after(1000, Due::Lose { round: round + 1 });
        let engine = self.victim(round);
        let agent = &mut self.agents[engine];
        let (Some(link), Some(session)) = (agent.link, agent.session.take()) else { return };
        if round.is_multiple_of(2) {
            self.input(Event::EngineDied { session, why: "the engine process died".into() });
            self.after(500, Due::Attach(engine));
        } else {
            self.input(Event::LinkLost { link, why: "reset" });
            self.after(200, Due::Attach(engine));
        }
    }

    /// Each engine in its turn, far from the last one; never one that the trainer owns.
    fn victim(&self, round: usize) -> usize {
        let engines = self.agents.len();
        let at = round * 7 % engines;
        if self.agents[at].colocated { (at + 1) % engines } else { at }
    }

    pub fn attach(&mut self, engine: usize) {
        self.next_link += 1;
        let link = LinkId(self.next_link);
        let seats = self.scale.seats;
        let agent = &mut self.agents[engine];
        agent.reborn(link);
        let (id, incarnation, colocated) = (&agent.id, agent.incarnation, agent.colocated);
        let event = events::attached(link, id, incarnation, colocated, seats);
        self.input(event);
    }

    pub(super) fn beat(&mut self, engine: usize) {
        let agent = &self.agents[engine];
        if let Some(session) = agent.session {
            let running = agent.running() as u32;
            self.input(events::beat(session, running));
        }
    }

    pub(super) fn hear(&mut self, engine: usize) {
        if let Some(session) = self.agents[engine].session {
            let tokens = std::mem::take(&mut self.agents[engine].made);
            self.input(Event::EngineHeard { session, tokens });
        }
    }

    /// The driver's look for silent samples.
    pub(super) fn sweep(&mut self) {
        let from = meter::cpu_ns();
        let found = self.ledger.sweep(self.now);
        let ns = self.meter.since(from);
        self.meter.swept(ns);
        for (session, silent) in found {
            self.input(Event::SilenceFound { session, silent });
        }
    }

    pub(super) fn tick(&mut self, engine: usize) {
        let agent = &mut self.agents[engine];
        let Some(session) = agent.session else { return };
        let Some(tick) = agent.tick(&self.columns) else { return };
        let from = meter::cpu_ns();
        let found = self.ledger.apply(self.now, session, &tick);
        let ns = self.meter.since(from);
        self.meter.ledger.add(Sight { ns, visited: 0, moved: 0 });
        match found {
            Ok(Taken { facts, tokens }) => {
                self.agents[engine].made += tokens;
                if !facts.is_empty() {
                    self.input(Event::FactsFound { session, facts });
                }
            }
            Err(bad) => {
                self.trouble.get_or_insert(bad.to_string());
            }
        }
    }
}
