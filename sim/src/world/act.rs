//! Carries out the core's actions, as the driver does in production.

use std::sync::Arc;
use std::time::Duration;

use anabranch_manager::action::{Action, Batch};
use anabranch_manager::event::{ConsumerId, Event};
use anabranch_manager::ledger::Begun;

use super::{Happening, LATENCY, ToAgent, World};
use crate::check::{self, Asked};

impl World {
    pub(super) fn act(&mut self, action: Action) {
        match action {
            // Whoever dials is a matter of the data plane.
            Action::DialReceiver(_) => {}
            Action::OpenPage { sample, rules } => self.ledger.open(sample, rules),
            Action::ClearPage { sample } => {
                if let Some(tokens) = self.ledger.clear(sample) {
                    self.found.push(Event::PageCleared { sample, tokens });
                }
            }
            Action::FreezePage { sample } => {
                if let Some((kept, oldest)) = self.ledger.freeze(sample) {
                    self.found.push(Event::PageFrozen { sample, kept, oldest });
                }
            }
            Action::Forget { samples } => self.ledger.forget(&samples),
            Action::Start(order) => self.start(order),
            Action::Welcome { link, session, keep, .. } => {
                if self.links.contains_key(&link) {
                    self.sessions.insert(session, link);
                    let acked = self.acked.get(&session).copied().unwrap_or(0);
                    self.send_agent(link, ToAgent::Welcome { session, acked, keep });
                }
            }
            Action::Refuse { link, why, retry_after } => {
                self.note(format!("refused: {why}"));
                self.send_agent(link, ToAgent::Closed { retry: retry_after });
                self.links.remove(&link);
            }
            Action::EndSession { session, why } => {
                self.note(format!("session {} ended: {why}", session.0));
                if let Some(link) = self.link_of(session) {
                    self.send_agent(link, ToAgent::Closed { retry: None });
                    self.links.remove(&link);
                }
            }
            Action::Stop { session, sample, attempt, .. } => {
                self.ledger.end(sample, attempt);
                self.tell_agent(session, ToAgent::Stop { sample, attempt });
            }
            Action::ForgetPrompt { .. } | Action::TellPublisher { .. } => {}
            Action::OrderLoad(order) => self.tell_agent(order.session, ToAgent::Load(order)),
            Action::CancelLoad { session, order } => {
                self.tell_agent(session, ToAgent::CancelLoad(order));
            }
            Action::OrderMode { session, order, mode, deadline, .. } => {
                self.tell_agent(session, ToAgent::Mode { order, mode, deadline });
            }
            Action::Reply { to, answer } => self.after(LATENCY, Happening::Answer { to, answer }),
            Action::Deliver { consumer, batch, samples } => self.deliver(consumer, batch, samples),
            Action::StepDone { consumer, report } => {
                self.after(LATENCY, Happening::Done { consumer, report });
            }
            Action::CloseConsumer { consumer, why } => {
                self.note(format!("consumer {} closed: {why}", consumer.0));
                if let Some(shard) = self.trainer.consumers.remove(&consumer)
                    && !self.trainer.consumers.values().any(|other| *other == shard)
                {
                    self.after(Duration::from_millis(300), Happening::Consume { shard });
                }
            }
            Action::Emit(notice) => self.note(format!("{notice:?}")),
        }
    }

    fn link_of(
        &self,
        session: anabranch_proto::SessionId,
    ) -> Option<anabranch_manager::event::LinkId> {
        self.sessions.get(&session).filter(|link| self.links.contains_key(link)).copied()
    }

    fn tell_agent(&mut self, session: anabranch_proto::SessionId, message: ToAgent) {
        if let Some(link) = self.link_of(session) {
            self.send_agent(link, message);
        }
    }

    fn start(&mut self, order: Box<anabranch_manager::action::StartOrder>) {
        match self.ledger.begin(self.now, order.sample, order.attempt, order.maker.clone()) {
            Begun::Kept(kept) if !kept.is_empty() && cannot_resume(&order) => {
                self.fail(format!("{} is continued, and cannot be replayed", order.sample));
            }
            Begun::Kept(kept) => self.tell_agent(order.session, ToAgent::Start(order, kept)),
            Begun::AlreadyFinished => {}
            Begun::Unknown => self.fail(format!("{} has no page", order.sample)),
        }
    }

    /// Delivers a batch after checking it against the oracle, as it would go on the wire.
    fn deliver(&mut self, consumer: ConsumerId, batch: Arc<Batch>, samples: Vec<usize>) {
        for index in &samples {
            let sample = &batch.samples[*index];
            let key = sample.key.to_string();
            let prompt = self.prompt(&key);
            let asked = Asked {
                prompt: &prompt,
                max_tokens: self.scenario.max_tokens,
                ignore_eos: false,
                pin: self.pins.get(&key).copied(),
            };
            let Some(view) = self.ledger.view(sample.sample) else {
                return self.fail(format!("{} is delivered without a page", sample.sample));
            };
            if let Err(what) = check::trajectory(self.params, &asked, sample, &view) {
                return self.fail(what);
            }
            self.digest.delivered(&view);
            self.trainer.checked_tokens += u64::from(sample.tokens);
        }
        self.after(LATENCY, Happening::Take { consumer, batch, samples });
    }

    /// The prompt of a group, a function of its key.
    pub(crate) fn prompt(&self, key: &str) -> Vec<u32> {
        let hash = blake3::hash(key.as_bytes());
        let byte = |b: &u8| u32::from(*b) + 3;
        hash.as_bytes()[..8 + usize::from(hash.as_bytes()[9] % 16)].iter().map(byte).collect()
    }
}

/// True if the engine has state of the sample that is not in the tokens.
fn cannot_resume(order: &anabranch_manager::action::StartOrder) -> bool {
    order.sampling.presence_penalty != 0.0 || !order.sampling.stop_strings.is_empty()
}
