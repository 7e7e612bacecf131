//! Engines come and go: attach, re-attach, leave, die.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{EngineId, SessionId};
use anabranch_runtime::clock::Now;

use super::Core;
use super::timer::Timer;
use crate::action::{Action, Answer, FailKind, ModeKind, Notice};
use crate::event::{EngineHello, Held, LinkId, ReplyTo};
use crate::fleet::{Engine, EngineState};
use crate::ledger::Maker;
use crate::weights::rates::Rates;

impl Core {
    pub(super) fn attach_engine(&mut self, now: Now, link: LinkId, hello: EngineHello) {
        if let Some(why) = self.unwelcome(now, &hello) {
            let (engine, retry) = (hello.id.clone(), why.1);
            self.tell(Notice::EngineRefused { engine, why: why.0.clone() });
            return self.act(Action::Refuse { link, why: why.0, retry_after: retry });
        }
        let known = self.by_id.get(&hello.id).copied();
        match known {
            Some(session) if self.continues(session, &hello) => {
                self.reattach(now, link, session, hello)
            }
            Some(session) => {
                self.part_with(now, session, "its agent was restarted", true);
                self.admit_engine(now, link, hello);
            }
            None => self.admit_engine(now, link, hello),
        }
    }

    /// Why it may not attach, and after how long it should try again (`None`: not at all).
    fn unwelcome(&mut self, now: Now, hello: &EngineHello) -> Option<(String, Option<Duration>)> {
        let record = self.records.entry(hello.id.clone()).or_default();
        if hello.incarnation.0 < record.incarnation {
            let why = format!(
                "engine {} was already seen in a later incarnation ({} > {}): is another agent using this id? \
                 give each engine its own --id",
                hello.id, record.incarnation, hello.incarnation.0
            );
            return Some((why, None));
        }
        let quarantined = self.by_id.get(&hello.id).and_then(|session| {
            let engine = self.engines.get(session)?;
            (engine.state == EngineState::Quarantined).then_some(*session)
        });
        if let Some(session) = quarantined {
            let until = self.timers.get(Timer::Quarantine(session)).unwrap_or(now);
            let why = format!("engine {} is quarantined: it died too often", hello.id);
            return Some((why, Some(until.since(now).max(Duration::from_millis(100)))));
        }
        let job = self.job.as_mut()?;
        let unfit = job.adopt(&hello.model, &hello.conventions).err()?;
        Some((format!("engine {} does not fit job {}: {unfit}", hello.id, job.name), None))
    }

    fn continues(&self, session: SessionId, hello: &EngineHello) -> bool {
        let Some(engine) = self.engines.get(&session) else { return false };
        hello.resume == Some(session)
            && hello.incarnation == engine.hello.incarnation
            && !matches!(engine.state, EngineState::Gone { .. } | EngineState::Quarantined)
    }

    fn admit_engine(&mut self, now: Now, link: LinkId, hello: EngineHello) {
        let session = SessionId(self.fresh_id());
        let id = hello.id.clone();
        let serve_key = self.config.serve_key(id.as_str(), session.0);
        let maker = Maker {
            engine: id.clone(),
            incarnation: hello.incarnation,
            by_trainer: hello.weights_by_trainer,
            numerics: hello.kind.clone(),
        };
        self.tell(Notice::EngineAttached {
            engine: id.clone(),
            incarnation: hello.incarnation,
            kind: hello.kind.clone(),
            kv_tokens: hello.kv_tokens,
            colocated: hello.labels.get("colocated").is_some_and(|v| v == "true"),
        });
        let record = self.records.entry(id.clone()).or_default();
        if record.incarnation != hello.incarnation.0 {
            record.incarnation = hello.incarnation.0;
            record.rates = Rates::default();
        }
        let drop = hello.held.clone();
        let engine = Engine {
            id: id.clone(),
            session,
            link: Some(link),
            maker: Arc::new(maker),
            state: EngineState::Joining,
            running: BTreeMap::new(),
            committed_tokens: 0,
            load: None,
            failed_loads: 0,
            load_error: String::new(),
            holds: BTreeSet::new(),
            probe: None,
            serve_key,
            prompts: BTreeMap::new(),
            joined: now,
            heard: now,
            tokens: 0,
            kv_used: 0.0,
            mode_order: None,
            parked: false,
            attested: None,
            reserved: None,
            not_before: now,
            broken: 0,
            hello,
        };
        self.engines.insert(session, engine);
        self.by_id.insert(id, session);
        self.by_link.insert(link, session);
        self.timers.set(Timer::Lease(session), now + self.config.lease());
        let lease = self.config.lease();
        self.act(Action::Welcome { link, session, lease, keep: Vec::new(), drop, serve_key });
        self.join_job(now, session);
    }

    /// The link broke and the same agent is back: what it still holds goes on.
    fn reattach(&mut self, now: Now, link: LinkId, session: SessionId, hello: EngineHello) {
        let engine = self.engines.get_mut(&session).expect("continues() found it");
        if let Some(old) = engine.link.replace(link) {
            self.by_link.remove(&old);
        }
        self.by_link.insert(link, session);
        engine.heard = now;
        let (keep, drop): (Vec<Held>, Vec<Held>) = hello.held.iter().partition(|held| {
            engine.running.get(&held.sample).is_some_and(|running| running.attempt == held.attempt)
        });
        // What we thought it runs and it does not know of was lost on the way there or back.
        let lost: Vec<_> = engine
            .running
            .keys()
            .filter(|sample| !keep.iter().any(|held| held.sample == **sample))
            .copied()
            .collect();
        let serve_key = engine.serve_key;
        let id = engine.id.clone();
        engine.hello = hello;
        engine.load = None;
        self.timers.clear(Timer::Reattach(session));
        self.timers.clear(Timer::Load(session));
        self.timers.set(Timer::Lease(session), now + self.config.lease());
        let (kept, dropped) = (keep.len() as u32, drop.len() as u32);
        self.tell(Notice::EngineReattached { engine: id, kept, dropped });
        let lease = self.config.lease();
        self.act(Action::Welcome { link, session, lease, keep, drop, serve_key });
        for sample in lost {
            self.detach_from_engine(sample, session);
            self.requeue(now, sample);
        }
        self.take_up_again(now, session);
    }

    /// It is heard again: it goes on with what it was told, which may not have arrived.
    pub(super) fn take_up_again(&mut self, now: Now, session: SessionId) {
        let left =
            self.timers.get(Timer::Drain(session)).map_or(Duration::ZERO, |at| now.until(at));
        let training = self.training;
        let Some(engine) = self.engines.get_mut(&session) else { return };
        match &engine.state {
            EngineState::Draining { .. } => {
                self.order_mode(
                    session,
                    ModeKind::Drain,
                    left,
                    "drain, again after the link broke",
                );
            }
            _ if engine.parked && training => {
                engine.state = EngineState::Releasing;
                self.order_mode(
                    session,
                    ModeKind::ReleaseMemory,
                    self.config.lease(),
                    "the trainer trains",
                );
            }
            _ if engine.parked => {
                engine.state = EngineState::Released;
                self.order_mode(
                    session,
                    ModeKind::ResumeMemory,
                    self.config.lease(),
                    "the trainer generates",
                );
            }
            EngineState::Suspect { .. }
            | EngineState::Serving { .. }
            | EngineState::Updating { .. } => self.join_job(now, session),
            _ => {}
        }
    }

    /// Where an engine stands towards the job, by what it has loaded.
    pub(super) fn join_job(&mut self, now: Now, session: SessionId) {
        self.placeable = true;
        let Some(job) = self.job.as_mut() else { return };
        let Some(engine) = self.engines.get_mut(&session) else { return };
        if !matches!(
            engine.state,
            EngineState::Joining
                | EngineState::Syncing { .. }
                | EngineState::Suspect { .. }
                | EngineState::Serving { .. }
                | EngineState::Updating { .. }
        ) || engine.link.is_none()
        {
            return;
        }
        if let Err(unfit) = job.adopt(&engine.hello.model, &engine.hello.conventions) {
            let why = unfit.to_string();
            let (link, id) = (engine.link, engine.id.clone());
            self.tell(Notice::EngineRefused { engine: id, why: why.clone() });
            if let Some(link) = link {
                self.act(Action::Refuse { link, why: why.clone(), retry_after: None });
            }
            return self.part_with(now, session, "it does not fit the job", false);
        }
        let loaded = engine.hello.loaded;
        let proven = match engine.hello.weights_by_trainer {
            // Only the trainer can say what such an engine has, unless nobody loaded anything yet.
            true => loaded.is_base() && self.current.is_base() || engine.attested == Some(loaded),
            false if loaded.is_base() => self.current.is_base(),
            false => {
                self.versions.get(loaded.number).is_some_and(|record| record.version == loaded)
            }
        };
        if proven {
            self.set_serving(
                now,
                session,
                if self.current.is_base() && loaded.is_base() { self.current } else { loaded },
            );
        } else {
            engine.state = EngineState::Syncing { to: self.current };
        }
    }

    pub(super) fn order_mode(
        &mut self,
        session: SessionId,
        mode: ModeKind,
        deadline: Duration,
        why: &str,
    ) {
        let order = self.fresh_order();
        if let Some(engine) = self.engines.get_mut(&session) {
            engine.mode_order = Some(order);
        }
        self.act(Action::OrderMode { session, order, mode, deadline, why: why.to_owned() });
    }

    pub(super) fn engine_died(&mut self, now: Now, session: SessionId, why: String) {
        self.part_with(now, session, &why, true);
    }

    /// The end of a session: its samples move, the engine is gone. `died`: not by anybody's wish.
    pub(super) fn part_with(&mut self, now: Now, session: SessionId, why: &str, died: bool) {
        let Some(engine) = self.engines.get_mut(&session) else { return };
        if engine.is_gone() {
            return;
        }
        engine.state = EngineState::Gone { why: why.to_owned() };
        let id = engine.id.clone();
        if let Some(link) = engine.link.take() {
            self.by_link.remove(&link);
        }
        self.clear_timers(session);
        self.move_all(now, session, "engine lost", died);
        self.tell(Notice::EngineGone { engine: id.clone(), why: why.to_owned() });
        self.act(Action::EndSession { session, why: why.to_owned() });
        self.mode_switch_lost(now, session);
        self.forget_holder(session);
        if died {
            self.counters.engine_deaths += 1;
            let window = Duration::from_millis(self.config.quarantine_window_ms);
            let record = self.records.entry(id).or_default();
            if record.died(now, self.config.quarantine_deaths, window) {
                record.deaths.clear();
                self.hold_back(now, session, "it died too often");
            }
        }
        self.forget_old_sessions();
    }

    fn clear_timers(&mut self, session: SessionId) {
        for timer in [
            Timer::Lease(session),
            Timer::Reattach(session),
            Timer::Progress(session),
            Timer::Rested(session),
            Timer::Drain(session),
            Timer::Load(session),
            Timer::LoadRetry(session),
        ] {
            self.timers.clear(timer);
        }
    }

    pub(super) fn quarantine(&mut self, now: Now, session: SessionId, why: String) {
        self.part_with(now, session, &why, false);
        self.hold_back(now, session, &why);
    }

    fn hold_back(&mut self, now: Now, session: SessionId, why: &str) {
        let Some(engine) = self.engines.get_mut(&session) else { return };
        engine.state = EngineState::Quarantined;
        let (id, for_ms) = (engine.id.clone(), self.config.quarantine_ms);
        self.timers.set(Timer::Quarantine(session), now + Duration::from_millis(for_ms));
        self.tell(Notice::EngineQuarantined { engine: id, for_ms, why: why.to_owned() });
    }

    pub(super) fn quarantine_over(&mut self, _now: Now, session: SessionId) {
        if let Some(engine) = self.engines.get_mut(&session) {
            engine.state = EngineState::Gone { why: "quarantine over; may attach again".into() };
        }
    }

    /// Keeps the last sessions for `/state`; older gone ones are dropped.
    fn forget_old_sessions(&mut self) {
        const KEPT: usize = 64;
        let gone: Vec<SessionId> =
            self.engines.iter().filter(|(_, e)| e.is_gone()).map(|(id, _)| *id).collect();
        for session in gone.iter().take(gone.len().saturating_sub(KEPT)) {
            if let Some(engine) = self.engines.remove(session)
                && self.by_id.get(&engine.id) == Some(session)
            {
                self.by_id.remove(&engine.id);
            }
        }
    }

    fn live(&self, id: &EngineId) -> Option<SessionId> {
        let session = *self.by_id.get(id)?;
        self.engines.get(&session).filter(|engine| !engine.is_gone()).map(|_| session)
    }

    pub(super) fn drain_requested(
        &mut self,
        now: Now,
        id: EngineId,
        deadline: Duration,
        reply: ReplyTo,
    ) {
        let Some(session) = self.live(&id) else { return self.no_such_engine(&id, reply) };
        self.drain(now, session, deadline, "asked for by a person");
        let running = self.engines[&session].running.len();
        let said = format!(
            "engine {id} drains: {running} samples have {} ms to finish, then they continue elsewhere",
            deadline.as_millis()
        );
        self.reply(reply, Answer::Said(said));
    }

    pub(super) fn remove_requested(&mut self, now: Now, id: EngineId, reply: ReplyTo) {
        let Some(session) = self.live(&id) else { return self.no_such_engine(&id, reply) };
        let running = self.engines[&session].running.len();
        self.order_mode(session, ModeKind::Leave, Duration::ZERO, "removed by a person");
        self.part_with(now, session, "removed by a person", false);
        let said = format!("engine {id} is removed; {running} samples continue elsewhere");
        self.reply(reply, Answer::Said(said));
    }

    fn no_such_engine(&mut self, id: &EngineId, reply: ReplyTo) {
        let live = |e: &&Engine| !e.is_gone();
        let known: Vec<String> =
            self.engines.values().filter(live).map(|engine| engine.id.to_string()).collect();
        let why = format!("no engine {id} is attached; attached are: {}", known.join(", "));
        self.fail(reply, FailKind::NotFound, why);
    }

    pub(super) fn drain(&mut self, now: Now, session: SessionId, deadline: Duration, why: &str) {
        let Some(engine) = self.engines.get_mut(&session) else { return };
        if matches!(engine.state, EngineState::Draining { .. }) {
            return;
        }
        engine.state = EngineState::Draining { why: why.to_owned() };
        engine.load = None;
        let id = engine.id.clone();
        // The agent aborts at the deadline and reports each end; past it by a lease, it is not waited for.
        self.timers.set(Timer::Drain(session), now + deadline + self.config.lease());
        let deadline_ms = deadline.as_millis() as u64;
        self.tell(Notice::EngineDraining { engine: id, deadline_ms, why: why.to_owned() });
        self.order_mode(session, ModeKind::Drain, deadline, why);
    }

    pub(super) fn drain_over(&mut self, now: Now, session: SessionId) {
        self.part_with(now, session, "drain deadline over", false);
    }

    pub(super) fn preempted(
        &mut self,
        now: Now,
        session: SessionId,
        within: Duration,
        why: String,
    ) {
        if let Some(engine) = self.engines.get(&session) {
            self.records.entry(engine.id.clone()).or_default().noticed = true;
        }
        // Leave a fifth of the notice for the last ticks to arrive.
        self.drain(now, session, within * 4 / 5, &why);
    }
}
