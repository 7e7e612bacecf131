//! Attaching: engines come, and come back.

use std::time::Duration;

use anabranch_proto::{SampleId, SessionId};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::{Action, ModeKind, Notice};
use crate::event::{EngineHello, Held, LinkId};
use crate::fleet::EngineState;
use crate::timer::Timer;

impl Core {
    pub(super) fn attach_engine(&mut self, now: Now, link: LinkId, hello: EngineHello) {
        if let Some((why, retry_after)) = self.unwelcome(now, &hello) {
            self.out.tell(Notice::EngineRefused { engine: hello.id.clone(), why: why.clone() });
            return self.out.act(Action::Refuse { link, why, retry_after });
        }
        match self.fleet.books().by_id(&hello.id) {
            Some(session) if self.continues(session, &hello) => {
                self.reattach(now, link, session, hello);
            }
            Some(session) => {
                self.part_with(now, session, "its agent was restarted", true);
                // That death may have been one too many.
                match self.unwelcome(now, &hello) {
                    Some((why, retry_after)) => {
                        self.out.act(Action::Refuse { link, why, retry_after });
                    }
                    None => self.admit_engine(now, link, hello),
                }
            }
            None => self.admit_engine(now, link, hello),
        }
    }

    /// Why an agent may not attach, and after how long it should try again (`None`: not at all).
    fn unwelcome(&mut self, now: Now, hello: &EngineHello) -> Option<(String, Option<Duration>)> {
        let books = self.fleet.books();
        if let Some(newest) = books.incarnation(&hello.id).filter(|i| hello.incarnation < *i) {
            let why = format!(
                "engine {} was already seen in a later incarnation ({} > {}): is another agent using this id? \
                 give each engine its own --id",
                hello.id, newest.0, hello.incarnation.0
            );
            return Some((why, None));
        }
        let known = books.by_id(&hello.id);
        let quarantined = known.filter(|session| {
            let engine = self.fleet.engine(*session);
            engine.is_some_and(|engine| *engine.state() == EngineState::Quarantined)
        });
        if let Some(session) = quarantined {
            let until = self.out.timers.get(Timer::Quarantine(session)).unwrap_or(now);
            let why = format!("engine {} is quarantined: it died too often", hello.id);
            return Some((why, Some(until.since(now).max(Duration::from_millis(100)))));
        }
        let unfit = self.job.adopt(&hello.model, &hello.logprobs_modes).err()?;
        let job = &self.job.settings()?.name;
        Some((format!("engine {} does not fit job {job}: {unfit}", hello.id), None))
    }

    fn continues(&self, session: SessionId, hello: &EngineHello) -> bool {
        let Some(engine) = self.fleet.engine(session) else { return false };
        hello.resume == Some(session)
            && hello.incarnation == engine.hello.incarnation
            && !matches!(engine.state(), EngineState::Gone { .. } | EngineState::Quarantined)
    }

    fn admit_engine(&mut self, now: Now, link: LinkId, hello: EngineHello) {
        let session = SessionId(self.out.fresh_id());
        let serve_key = self.config.serve_key(hello.id.as_str(), session.0);
        self.out.tell(Notice::EngineAttached {
            engine: hello.id.clone(),
            incarnation: hello.incarnation,
            kind: hello.kind.clone(),
            kv_tokens: hello.kv_tokens,
            colocated: hello.labels.get("colocated").is_some_and(|v| v == "true"),
        });
        if self.fleet.books().incarnation(&hello.id) != Some(hello.incarnation) {
            self.weights.forget_rates(&hello.id);
        }
        let drop = hello.held.clone();
        self.fleet.attach(now, session, link, hello, serve_key);
        self.tell_weights(session);
        let lease = self.config.lease();
        self.out.timers.set(Timer::Lease(session), now + lease);
        self.out.act(Action::Welcome { link, session, lease, keep: Vec::new(), drop, serve_key });
        self.join_job(now, session);
    }

    /// Weights know the engine's host and addresses as its agent last said them.
    fn tell_weights(&mut self, session: SessionId) {
        if let Some(engine) = self.fleet.engine(session) {
            self.weights.join(session, &engine.hello, engine.is_relay(), engine.serve_key);
        }
        self.follow(session);
    }

    /// The link broke and the same agent is back: what it still holds goes on.
    fn reattach(&mut self, now: Now, link: LinkId, session: SessionId, hello: EngineHello) {
        let Some(engine) = self.fleet.engine(session) else { return };
        let (keep, drop): (Vec<Held>, Vec<Held>) = hello.held.iter().partition(|held| {
            engine.running.get(&held.sample).is_some_and(|running| running.attempt == held.attempt)
        });
        // What we thought it runs and it does not know of was lost on the way there or back.
        let held: std::collections::BTreeSet<SampleId> = keep.iter().map(|h| h.sample).collect();
        let lost: Vec<SampleId> =
            engine.running.keys().filter(|sample| !held.contains(*sample)).copied().collect();
        let (serve_key, id) = (engine.serve_key, engine.id.clone());
        self.out.visit(keep.len() + lost.len());
        self.fleet.relink(now, session, link, hello);
        self.tell_weights(session);
        self.weights.drop_load(session);
        self.out.timers.clear(Timer::Reattach(session));
        self.out.timers.clear(Timer::Load(session));
        let lease = self.config.lease();
        self.out.timers.set(Timer::Lease(session), now + lease);
        let (kept, dropped) = (keep.len() as u32, drop.len() as u32);
        self.out.tell(Notice::EngineReattached { engine: id, kept, dropped });
        self.out.act(Action::Welcome { link, session, lease, keep, drop, serve_key });
        for sample in lost {
            self.take_off(sample, "not held after a re-attach");
            self.rollout.requeue(sample, &mut self.out);
        }
        self.take_up_again(now, session);
    }

    /// The engine is heard again: it goes on with what it was told, which may not have arrived.
    pub(super) fn take_up_again(&mut self, now: Now, session: SessionId) {
        let left =
            self.out.timers.get(Timer::Drain(session)).map_or(Duration::ZERO, |at| now.until(at));
        let training = self.fleet.books().training();
        let parked = self.fleet.is_parked(session);
        let lease = self.config.lease();
        let Some(engine) = self.fleet.engine(session) else { return };
        match engine.state() {
            EngineState::Draining { .. } => {
                let why = "drain, again after the link broke";
                self.order_mode(session, ModeKind::Drain, left, why);
            }
            _ if parked && training => {
                self.set_engine(session, EngineState::Releasing);
                self.order_mode(session, ModeKind::ReleaseMemory, lease, "the trainer trains");
            }
            _ if parked => {
                self.set_engine(session, EngineState::Released);
                self.order_mode(session, ModeKind::ResumeMemory, lease, "the trainer generates");
            }
            EngineState::Suspect { .. }
            | EngineState::Serving { .. }
            | EngineState::Updating { .. } => self.join_job(now, session),
            _ => {}
        }
    }

    /// Decides where an engine stands towards the job, by what it has loaded.
    pub(super) fn join_job(&mut self, now: Now, session: SessionId) {
        self.out.wake_placement();
        if self.job.settings().is_none() {
            return;
        }
        let Some(engine) = self.fleet.engine(session) else { return };
        let Some(link) = engine.link.filter(|_| engine.state().is_live()) else { return };
        if let Err(unfit) = self.job.adopt(&engine.hello.model, &engine.hello.logprobs_modes) {
            let (why, engine) = (unfit.to_string(), engine.id.clone());
            self.out.tell(Notice::EngineRefused { engine, why: why.clone() });
            self.out.act(Action::Refuse { link, why, retry_after: None });
            return self.part_with(now, session, "it does not fit the job", false);
        }
        let by_trainer = engine.hello.weights_by_trainer;
        let current = self.weights.current();
        let Some(book) = self.fleet.books().session(session) else { return };
        let loaded = book.loaded();
        let proven = match by_trainer {
            // Only the trainer can say what such an engine has, unless nobody loaded anything yet.
            true => loaded.is_base() && current.is_base() || book.attested() == Some(loaded),
            false if loaded.is_base() => current.is_base(),
            false => self.weights.books().find(loaded).is_some(),
        };
        if proven {
            let at = if current.is_base() && loaded.is_base() { current } else { loaded };
            self.serve(now, session, at, None);
        } else {
            self.set_engine(session, EngineState::Syncing { to: current });
        }
    }

    pub(super) fn order_mode(
        &mut self,
        session: SessionId,
        mode: ModeKind,
        deadline: Duration,
        why: &str,
    ) {
        let order = self.out.fresh_order();
        self.fleet.update(session, |engine| engine.mode_order = Some(order));
        self.out.act(Action::OrderMode { session, order, mode, deadline, why: why.to_owned() });
    }
}
