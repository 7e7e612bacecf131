//! Carries out the core's actions, as the driver does in production. Owns no state.

use anabranch_manager::ledger::Begun;
use anabranch_proto::tokens::WIDTH;
use anabranch_proto::{OrderId, SessionId};

use super::super::actions::{self, Action, Answer, LoadOrder, ModeKind, Notice, StartOrder};
use super::super::events::{self, Event};
use super::super::fleet::Agent;
use super::{Due, World};

/// Time between a batch and its acknowledgement.
const ACK_MS: u64 = 2;

impl World {
    pub(super) fn carry_out(&mut self, action: Action) {
        if let Some(trouble) = actions::trouble(&action) {
            self.trouble.get_or_insert(trouble);
        }
        match action {
            Action::OpenPage { sample, rules } => self.ledger.open(sample, rules),
            Action::ClearPage { sample } => {
                if let Some(tokens) = self.ledger.clear(sample) {
                    self.after(1, Due::Say(Event::PageCleared { sample, tokens }));
                }
            }
            Action::FreezePage { sample } => {
                if let Some((kept, oldest)) = self.ledger.freeze(sample) {
                    self.after(1, Due::Say(Event::PageFrozen { sample, kept, oldest }));
                }
            }
            Action::Forget { samples } => {
                let kept = samples.iter().filter_map(|sample| self.ledger.kept(*sample));
                self.forgotten_tokens += kept.map(u64::from).sum::<u64>();
                self.ledger.forget(&samples);
            }
            Action::Start(order) => self.start(&order),
            Action::Deliver { consumer, batch, samples } => {
                let tokens: u64 =
                    samples.iter().map(|at| u64::from(batch.samples[*at].tokens)).sum();
                let (bytes, samples) = (tokens * 8, samples.len() as u64);
                let seq = batch.seq;
                self.trainer.acked = seq;
                self.after(ACK_MS, Due::Say(Event::CreditGranted { consumer, bytes, samples }));
                self.after(ACK_MS, Due::Say(Event::BatchAcked { consumer, seq }));
            }
            Action::Reply { answer: Answer::Opened { session, .. }, .. } => {
                self.trainer.session = session;
            }
            Action::Reply { answer: Answer::ModeSet(_), .. } if !self.trainer.training => {
                self.attest();
            }
            Action::Emit(Notice::VersionAvailable { .. }) => self.trainer.waiting = true,
            Action::Emit(Notice::VersionCurrent { .. }) => {
                self.trainer.waiting = false;
                self.trainer.current = self.trainer.version;
                self.attest();
            }
            other => self.carry_out_at_agent(other),
        }
    }

    fn carry_out_at_agent(&mut self, action: Action) {
        match action {
            Action::Welcome { link, session, .. } => {
                let found = self.agents.iter().position(|agent| agent.link == Some(link));
                if let Some(engine) = found {
                    self.agents[engine].session = Some(session);
                    self.sessions.insert(session, engine);
                }
            }
            Action::EndSession { session, .. } => {
                if let Some(engine) = self.sessions.remove(&session)
                    && self.agents[engine].session == Some(session)
                {
                    self.agents[engine].session = None;
                }
            }
            Action::Stop { session, sample, attempt, .. } => {
                self.ledger.end(sample, attempt);
                if let Some(agent) = self.agent_of(session) {
                    agent.stop(sample, attempt);
                }
            }
            Action::OrderLoad(order) => self.order_load(&order),
            Action::CancelLoad { session, order } => {
                if let Some(agent) = self.agent_of(session) {
                    agent.load.take_if(|load| load.order == order);
                }
            }
            Action::OrderMode { session, order, mode, .. } => self.order_mode(session, order, mode),
            _ => {}
        }
    }

    fn agent_of(&mut self, session: SessionId) -> Option<&mut Agent> {
        self.sessions.get(&session).map(|engine| &mut self.agents[*engine])
    }

    fn start(&mut self, order: &StartOrder) {
        let sample = order.sample;
        self.trainer.placed(sample.index, order.attempt.0);
        self.newest_group = self.newest_group.max(sample.group.0);
        match self.ledger.begin(self.now, sample, order.attempt, order.maker.clone()) {
            Begun::Kept(kept) => {
                let (lives, kept) = (self.lives, (kept.len() / WIDTH) as u32);
                if let Some(agent) = self.agent_of(order.session) {
                    agent.start(order, kept, &lives);
                }
            }
            Begun::AlreadyFinished => {}
            Begun::Unknown => {
                self.trouble.get_or_insert(format!("{sample} has no page"));
            }
        }
    }

    fn order_load(&mut self, order: &LoadOrder) {
        let Some(&engine) = self.sessions.get(&order.session) else { return };
        let agent = &mut self.agents[engine];
        agent.order_load(order);
        let incarnation = agent.incarnation;
        self.load_goes_on(engine, incarnation, order.order);
    }

    fn order_mode(&mut self, session: SessionId, order: OrderId, mode: ModeKind) {
        let Some(&engine) = self.sessions.get(&session) else { return };
        let agent = &mut self.agents[engine];
        let incarnation = agent.incarnation;
        match mode {
            ModeKind::ReleaseMemory => {
                agent.released = true;
                agent.end_all();
                self.after(5, Due::Drained { engine, incarnation, order });
            }
            ModeKind::ResumeMemory => {
                agent.released = false;
                self.after(5, Due::Say(events::mode_reported(session, order)));
            }
            ModeKind::Drain | ModeKind::Leave => {}
        }
    }

    /// The trainer loads its own engines where it does not train on them.
    fn attest(&mut self) {
        let (trainer, version) = (self.trainer.session, events::version(self.trainer.current));
        for engine in 0..self.agents.len() {
            let agent = &mut self.agents[engine];
            if agent.colocated && !agent.released && agent.session.is_some() {
                agent.loaded = version;
                let event = events::attested(trainer, agent.id.clone(), version);
                self.after(5, Due::Say(event));
            }
        }
    }
}
