//! Fleet: the engines of every lineage, what each runs, and whether it lives.
//!
//! Owns sessions, their states, links, leases and deaths, and the index of free seats. Does not know groups,
//! queues, or how versions come. Durable state is in `books`; links, loads, reserves and seats are volatile.

mod books;
mod engine;
mod seats;
mod state;
mod tally;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{EngineId, SampleId, SessionId, Version};
use anabranch_runtime::clock::Now;

use crate::event::{EngineHello, LinkId};
use crate::ledger::Maker;
use crate::need::{Allowed, Need};
use engine::Deaths;
use seats::Seats;
use tally::Tally;

pub(crate) use books::{Books, Change};
pub(crate) use engine::{Engine, RELAY, Running};
pub use state::EngineState;

/// Sessions of engines that are over and still shown.
const KEPT_SESSIONS: usize = 64;

#[derive(Default)]
pub(crate) struct Fleet {
    books: Books,
    log: Vec<Change>,
    illegal_moves: u64,
    // Volatile
    engines: BTreeMap<SessionId, Engine>,
    by_link: BTreeMap<LinkId, SessionId>,
    deaths: BTreeMap<EngineId, Deaths>,
    seats: Seats,
    reserved: BTreeMap<SampleId, SessionId>,
    colocated: BTreeSet<SessionId>,
    gone: BTreeSet<SessionId>,
    tally: Tally,
}

impl Fleet {
    fn commit(&mut self, change: Change) {
        self.illegal_moves += u64::from(!self.books.apply(&change));
        self.log.push(change);
    }

    /// Changes since the last call, in order.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.log)
    }

    pub fn books(&self) -> &Books {
        &self.books
    }

    /// Moves that a session's graph does not have: a defect of the manager.
    pub fn illegal_moves(&self) -> u64 {
        self.illegal_moves
    }

    // Sessions

    /// A new session, in `Joining`.
    pub fn attach(
        &mut self,
        now: Now,
        session: SessionId,
        link: LinkId,
        hello: EngineHello,
        serve_key: [u8; 32],
    ) {
        let (engine, incarnation) = (hello.id.clone(), hello.incarnation);
        let loaded = hello.loaded;
        self.commit(Change::Attached { session, engine: engine.clone(), incarnation, loaded });
        let maker = Maker {
            session,
            engine: engine.clone(),
            incarnation,
            by_trainer: hello.weights_by_trainer,
            numerics: hello.kind.clone(),
        };
        let engine = Engine {
            id: engine,
            session,
            link: Some(link),
            maker: Arc::new(maker),
            running: BTreeMap::new(),
            committed_tokens: 0,
            serve_key,
            prompts: BTreeMap::new(),
            joined: now,
            heard: now,
            tokens: 0,
            kv_used: 0.0,
            mode_order: None,
            reserved: None,
            not_before: now,
            makes_since: now,
            broken: 0,
            state: EngineState::Joining,
            seat: None,
            resting: false,
            hello,
        };
        if engine.is_colocated() {
            self.colocated.insert(session);
        }
        self.tally.enter(&engine);
        self.engines.insert(session, engine);
        self.by_link.insert(link, session);
    }

    /// The same agent is back over a new link.
    pub fn relink(&mut self, now: Now, session: SessionId, link: LinkId, hello: EngineHello) {
        let loaded = hello.loaded;
        if let Some(engine) = self.engines.get(&session) {
            self.tally.leave(engine);
        }
        let old = self.update(session, |engine| {
            engine.hello = hello;
            engine.heard = now;
            engine.link.replace(link)
        });
        if let Some(old) = old.flatten() {
            self.by_link.remove(&old);
        }
        if let Some(engine) = self.engines.get(&session) {
            self.tally.enter(engine);
        }
        self.by_link.insert(link, session);
        self.set_loaded(session, loaded);
        match self.engines.get(&session).is_some_and(Engine::is_colocated) {
            true => self.colocated.insert(session),
            false => self.colocated.remove(&session),
        };
    }

    /// Cuts a link. Gives the session that had it.
    pub fn unlink(&mut self, link: LinkId) -> Option<SessionId> {
        let session = self.by_link.remove(&link)?;
        self.update(session, |engine| engine.link = None);
        Some(session)
    }

    /// Moves a session along its graph: the one place that assigns an engine's state.
    pub fn set_state(&mut self, session: SessionId, to: EngineState) {
        let Some(engine) = self.engines.get(&session) else { return };
        if engine.state == to {
            return;
        }
        self.tally.leave(engine);
        self.commit(Change::Moved { session, to: to.clone() });
        self.update(session, |engine| engine.state = to);
        let Some(engine) = self.engines.get(&session) else { return };
        self.tally.enter(engine);
        match engine.is_gone() {
            true => self.gone.insert(session),
            false => self.gone.remove(&session),
        };
    }

    /// The session's link is closed for good.
    pub fn drop_link(&mut self, session: SessionId) {
        if let Some(Some(link)) = self.update(session, |engine| engine.link.take()) {
            self.by_link.remove(&link);
        }
    }

    /// Keeps the last sessions for `/state`; gives the older ones that are forgotten now.
    pub fn forget_old_sessions(&mut self) -> Vec<SessionId> {
        let mut forgotten = Vec::new();
        while self.gone.len() > KEPT_SESSIONS
            && let Some(session) = self.gone.pop_first()
        {
            if let Some(engine) = self.engines.remove(&session) {
                self.tally.leave(&engine);
            }
            self.colocated.remove(&session);
            self.commit(Change::Forgotten { session });
            forgotten.push(session);
        }
        forgotten
    }

    pub fn set_loaded(&mut self, session: SessionId, version: Version) {
        if self.books.session(session).is_some_and(|book| book.loaded() != version) {
            self.commit(Change::Loaded { session, version });
        }
    }

    pub fn set_attested(&mut self, session: SessionId, version: Option<Version>) {
        if self.books.session(session).is_some_and(|book| book.attested() != version) {
            self.commit(Change::Attested { session, version });
        }
    }

    pub fn set_parked(&mut self, session: SessionId, parked: bool) {
        if self.books.session(session).is_some_and(|book| book.parked() != parked) {
            self.commit(Change::Parked { session, parked });
        }
    }

    pub fn set_training(&mut self, training: bool) {
        if self.books.training() != training {
            self.commit(Change::Training { training });
        }
    }

    pub fn is_parked(&self, session: SessionId) -> bool {
        self.books.session(session).is_some_and(|book| book.parked())
    }

    // Health

    /// The engine's machine will be taken away: that may happen again.
    pub fn note_preemption(&mut self, session: SessionId) {
        let Some(engine) = self.engines.get(&session).map(|engine| engine.id.clone()) else {
            return;
        };
        if !self.books.is_noticed(&engine) {
            self.commit(Change::Noticed { engine });
        }
    }

    pub fn is_preemptible(&self, engine: &Engine) -> bool {
        self.books.is_noticed(&engine.id) || engine.is_labelled_preemptible()
    }

    /// Notes a death; true if the engine died too often within `window`.
    pub fn note_death(
        &mut self,
        now: Now,
        engine: &EngineId,
        limit: u32,
        window: Duration,
    ) -> bool {
        self.deaths.entry(engine.clone()).or_default().note(now, limit, window)
    }

    /// The session's engine gets nothing new before `until`.
    pub fn rest(&mut self, session: SessionId, until: Now) {
        self.update(session, |engine| {
            engine.not_before = until;
            engine.resting = true;
        });
    }

    pub fn rested(&mut self, session: SessionId) {
        self.update(session, |engine| engine.resting = false);
    }

    // Samples

    pub fn add(&mut self, session: SessionId, sample: SampleId, running: Running) {
        self.update(session, |engine| engine.add(sample, running));
    }

    /// Takes a sample off an engine, and lifts the reserve for the sample. Gives the digest of a prompt that
    /// the session does not need any more.
    pub fn remove(&mut self, session: SessionId, sample: SampleId) -> Option<u64> {
        let unused = self.update(session, |engine| engine.remove(sample)).flatten();
        if self.engines.get(&session).is_some_and(|engine| engine.reserved == Some(sample)) {
            self.unreserve(session);
        }
        unused
    }

    /// True where some engine may be given samples.
    pub fn any_serving(&self) -> bool {
        !self.seats.is_empty()
    }

    /// The engine a sample goes to, `None`: no engine can take the sample now; and the engines looked at.
    pub fn choose(&self, need: &Need, allowed: Allowed) -> (Option<SessionId>, usize) {
        if need.alone {
            return (self.kept_free(need, allowed), 1);
        }
        let warm = need.warm.and_then(|session| self.engines.get(&session));
        let warm = warm.and_then(|engine| Some((engine.session, engine.seat?)));
        self.seats.choose(need, allowed, warm)
    }

    /// The engine that is kept free for this sample, once it is idle.
    fn kept_free(&self, need: &Need, allowed: Allowed) -> Option<SessionId> {
        let engine = self.engines.get(self.reserved.get(&need.sample)?)?;
        let ready = engine.running.is_empty() && !engine.resting && engine.has_room(need.weight());
        (ready && self.suits(engine, need, allowed)).then_some(engine.session)
    }

    fn suits(&self, engine: &Engine, need: &Need, allowed: Allowed) -> bool {
        let context = engine.hello.model.max_context;
        engine.serving().is_some_and(|at| need.suits(allowed, at, context))
    }

    /// Keeps the emptiest engine that suits free for a sample that may be poison, one such sample at a time in the whole
    /// fleet: a canary. True where an engine was found.
    pub fn reserve_for(&mut self, need: &Need, allowed: Allowed) -> bool {
        if let Some(&session) = self.reserved.get(&need.sample) {
            let suits = |engine: &Engine| self.suits(engine, need, allowed);
            if self.engines.get(&session).is_some_and(suits) {
                return false;
            }
            self.unreserve(session);
        }
        if !self.reserved.is_empty() {
            return false;
        }
        let Some(session) = self.seats.emptiest(need, allowed) else { return false };
        self.reserved.insert(need.sample, session);
        self.update(session, |engine| engine.reserved = Some(need.sample));
        true
    }

    pub fn unreserve(&mut self, session: SessionId) {
        if let Some(Some(sample)) = self.update(session, |engine| engine.reserved.take()) {
            self.reserved.remove(&sample);
        }
    }

    /// Samples that engines are kept free for.
    pub fn reserves(&self) -> Vec<(SampleId, SessionId)> {
        self.reserved.iter().map(|(sample, session)| (*sample, *session)).collect()
    }

    /// Changes an engine and keeps the index of seats in step.
    pub fn update<R>(
        &mut self,
        session: SessionId,
        change: impl FnOnce(&mut Engine) -> R,
    ) -> Option<R> {
        let engine = self.engines.get_mut(&session)?;
        let result = change(engine);
        let seat = engine.seat_now();
        self.seats.replace(session, engine.seat, seat);
        engine.seat = seat;
        Some(result)
    }

    /// Notes that an engine said something.
    pub fn heard(&mut self, now: Now, session: SessionId) {
        if let Some(engine) = self.engines.get_mut(&session) {
            engine.heard = now;
        }
    }

    /// Notes tokens that an engine made and the ledger kept.
    pub fn note_tokens(&mut self, session: SessionId, tokens: u64) {
        if let Some(engine) = self.engines.get_mut(&session) {
            engine.tokens += tokens;
        }
    }

    // Views

    pub fn engine(&self, session: SessionId) -> Option<&Engine> {
        self.engines.get(&session)
    }

    /// Every session that is shown, in the order of attachment.
    pub fn engines(&self) -> impl DoubleEndedIterator<Item = &Engine> {
        self.engines.values()
    }

    /// Sessions that are shown, from one on.
    pub fn sessions_from(&self, from: SessionId) -> impl Iterator<Item = &Engine> {
        self.engines.range(from..).map(|(_, engine)| engine)
    }

    pub fn sessions(&self) -> Vec<SessionId> {
        self.engines.keys().copied().collect()
    }

    /// The session of an attached engine that is not gone.
    pub fn live(&self, id: &EngineId) -> Option<SessionId> {
        let session = self.books.by_id(id)?;
        self.engines.get(&session).filter(|engine| !engine.is_gone()).map(|_| session)
    }

    pub fn colocated(&self) -> impl Iterator<Item = &Engine> {
        self.colocated.iter().filter_map(|session| self.engines.get(session))
    }

    /// Versions that engines serve now, with or without a link.
    pub fn versions(&self) -> impl Iterator<Item = Version> {
        self.tally.versions()
    }

    /// Counts over all sessions that are shown.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    pub fn len(&self) -> usize {
        self.engines.len()
    }

    /// `Err` where a count does not agree with the engines.
    pub fn check_tally(&self) -> Result<(), String> {
        match Tally::of(self.engines()) == self.tally {
            true => Ok(()),
            false => Err("the fleet's counts do not agree with its engines".into()),
        }
    }

    pub fn all_gone(&self) -> bool {
        self.gone.len() == self.engines.len()
    }
}
