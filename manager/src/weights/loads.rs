//! Loads: orders to load a version, and how far each one is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use anabranch_proto::{OrderId, SessionId, Version};
use anabranch_runtime::clock::Now;

use super::change::Change;
use super::plan::Feed;
use super::receivers::Load;
use super::versions::Progress;
use super::{Terms, Weights};
use crate::action::{Action, DialOrder, Holder, LoadOrder, Notice};
use crate::event::{LoadReport, LoadStage, Verdict};
use crate::outbox::Outbox;
use crate::timer::Timer;

/// Versions that a receiver can serve at once: it has two slots.
const HELD: usize = 2;

/// What a report means for the fleet.
#[derive(Debug, PartialEq)]
pub(crate) enum Reported {
    Nothing,
    /// The engine takes no samples until the load has ended.
    Begins(Version),
    Active(Version, Option<Verdict>),
    /// The weights before are still in.
    Failed(String),
    /// Active with another version than was ordered.
    Misreported(String),
}

/// Orders of one turn, about 5 ms.
const MOST_ORDERS: usize = 128;
const BETWEEN_ORDERS: Duration = Duration::from_millis(20);

/// Receivers that are planned and not ordered yet.
#[derive(Default)]
pub(super) struct Planned {
    version: Version,
    feeds: VecDeque<(SessionId, Feed)>,
    /// No more of them are ordered before it.
    next: Now,
}

impl Weights {
    /// True where something has changed that may let a load be ordered.
    pub fn wants_orders(&self) -> bool {
        self.unsettled
    }

    /// Orders that did not fit into a turn before are due.
    pub fn order_more(&mut self) {
        self.news(false);
    }

    /// Pinned versions that no engine has, with the engine that should get each. Loads of older versions that
    /// have not begun are cancelled first.
    pub fn missing_pins(
        &mut self,
        pins: Vec<Version>,
        out: &mut Outbox,
    ) -> Vec<(Vec<SessionId>, Version)> {
        self.unsettled = false;
        if std::mem::take(&mut self.holders_changed) {
            self.receivers.unstick();
        }
        self.cancel_outdated(&pins, out);
        let missing = self.receivers.front.missing_pins(&pins);
        self.pins = pins;
        missing
    }

    /// Receivers that still fetch something older skip to the newest.
    pub fn cancel_outdated(&mut self, pins: &[Version], out: &mut Outbox) {
        for session in self.receivers.front.outdated() {
            let Some(load) = self.load_of(session) else { continue };
            let (order, version) = (load.order, load.version);
            if pins.contains(&version) {
                continue;
            }
            self.receivers.change(session, |receiver| receiver.load = None);
            out.timers.clear(Timer::Load(session));
            out.act(Action::CancelLoad { session, order });
        }
    }

    /// True where somebody could give `pin` to this receiver.
    pub fn can_feed(&self, session: SessionId, pin: Version) -> bool {
        self.books.find(pin).is_some_and(|record| record.directory().is_some())
            || !self.feeds(pin, &[session]).is_empty()
    }

    /// Orders the current version where it is missing, as the roll-forward allows: planned at once, and ordered for at
    /// most 128 receivers a turn, the rest from 20 ms to 20 ms. Gives who was ordered.
    pub fn order_current(
        &mut self,
        now: Now,
        terms: &Terms,
        out: &mut Outbox,
    ) -> Vec<(SessionId, Version)> {
        let current = self.current();
        if self.planned.version == current && !self.planned.feeds.is_empty() {
            if now < self.planned.next {
                return Vec::new();
            }
            let wave = self.receivers.front.wave(&self.pins, terms.keep_serving);
            let wave: BTreeSet<SessionId> = wave.into_iter().collect();
            let planned = &mut self.planned.feeds;
            planned.retain(|(session, _)| wave.contains(session));
            if !planned.is_empty() {
                return self.order_planned(now, terms, out);
            }
        }
        let wave = self.receivers.front.wave(&self.pins, terms.keep_serving);
        self.order_wave(now, &wave, current, terms, out)
    }

    /// Orders a version for several receivers, planned together so that they feed each other.
    pub fn order_wave(
        &mut self,
        now: Now,
        wave: &[SessionId],
        version: Version,
        terms: &Terms,
        out: &mut Outbox,
    ) -> Vec<(SessionId, Version)> {
        let Some(record) = self.books.find(version).filter(|_| !wave.is_empty()) else {
            return Vec::new();
        };
        let in_directory = record.directory().is_some();
        let mut feeds = if in_directory { BTreeMap::new() } else { self.feeds(version, wave) };
        self.planned = Planned { version, feeds: VecDeque::new(), next: now };
        for &session in wave {
            let feed = feeds.remove(&session).or_else(|| in_directory.then(Feed::default));
            match feed {
                Some(feed) => self.planned.feeds.push_back((session, feed)),
                None => self.no_path(session, version, out),
            }
        }
        if self.planned.feeds.len() > MOST_ORDERS {
            // The plan of so many has taken its turn.
            self.planned.next = now + Duration::from_millis(1);
            out.timers.set(Timer::Orders, self.planned.next);
            return Vec::new();
        }
        self.order_planned(now, terms, out)
    }

    /// Orders what one turn may of the planned feeds.
    fn order_planned(
        &mut self,
        now: Now,
        terms: &Terms,
        out: &mut Outbox,
    ) -> Vec<(SessionId, Version)> {
        let version = self.planned.version;
        let turn = self.planned.feeds.len().min(MOST_ORDERS);
        // The plan looked at each once as well.
        out.visit(turn);
        let mut ordered = Vec::with_capacity(turn);
        for (session, feed) in self.planned.feeds.drain(..turn).collect::<Vec<_>>() {
            self.order(now, session, version, feed, terms, out);
            ordered.push((session, version));
        }
        if !self.planned.feeds.is_empty() {
            self.planned.next = now + BETWEEN_ORDERS;
            out.timers.set(Timer::Orders, self.planned.next);
        }
        ordered
    }

    /// Notes, and tells once, that nobody can give the version to this receiver. Considered again when holders change.
    fn no_path(&mut self, session: SessionId, version: Version, out: &mut Outbox) {
        let Some(record) = self.books.find(version) else { return };
        let serving = record.live().senders.values().filter(|sender| sender.serves()).count();
        let why = match record.is_served() {
            true if !record.at_trainer() => format!(
                "of its {} senders {serving} serve it, each a part, and no attached engine has all of it",
                record.of()
            ),
            true if record.dials() => {
                "the trainer can only dial, and neither this engine nor one that has the version has a listener \
                 (start an agent with --listen, or `anabranch relay`)"
                    .to_owned()
            }
            _ => "the trainer does not serve it any more, and no attached engine has it".to_owned(),
        };
        let error = format!("no path to any holder of {version}: {why}");
        let told = self.receivers.change(session, |receiver| {
            receiver.stuck = true;
            let known = receiver.load_error == error;
            receiver.load_error.clone_from(&error);
            (!known).then(|| receiver.id.clone())
        });
        if let Some(Some(engine)) = told {
            out.tell(Notice::LoadStage {
                engine,
                version,
                stage: LoadStage::Failed,
                bytes: 0,
                ms: 0,
                error,
                fetched_from: BTreeMap::new(),
            });
        }
    }

    fn order(
        &mut self,
        now: Now,
        session: SessionId,
        version: Version,
        feed: Feed,
        terms: &Terms,
        out: &mut Outbox,
    ) {
        let Some(record) = self.books.find(version) else { return };
        let (bytes, directory) = (record.bytes(), record.directory().cloned());
        let sources = self.holders(session, &feed, version);
        let names =
            sources.iter().map(|source| source.name.clone()).chain(directory.clone()).collect();
        let (stripe_count, streams) = (feed.parents.len() as u32, feed.streams);
        let parents = self.parent_names(&feed.parents);
        let order = out.fresh_order();
        let reference = self.receivers.reference(session, version);
        for dialling in sources.iter().filter(|source| source.dials) {
            self.order_dial(session, order, version, dialling, streams, terms, out);
        }
        let load = Load {
            order,
            version,
            stage: LoadStage::Ordered,
            bytes: 0,
            total: bytes,
            ordered: now,
            error: String::new(),
            fetched_from: BTreeMap::new(),
            feed,
            ingress: 0,
            served: 0,
        };
        let receiver = self.receivers.change(session, |receiver| {
            receiver.load = Some(load);
            receiver.id.clone()
        });
        let Some(receiver) = receiver else { return };
        self.news(true);
        out.timers.set(Timer::Load(session), now + terms.deadline);
        let ordered = Progress { parents, ..Progress::at(LoadStage::Ordered) };
        self.note_progress(now, &receiver, version, ordered, out);
        out.tell(Notice::LoadOrdered { engine: receiver.clone(), version, sources: names });
        out.act(Action::OrderLoad(Box::new(LoadOrder {
            session,
            order,
            version,
            sources,
            stripe_count,
            streams,
            directory,
            bytes,
            on_running: terms.on_running,
            deadline: terms.deadline,
            reference,
            receiver,
            job: terms.job.clone(),
        })));
    }

    /// The trainer offers its streams to this receiver, which asks on them.
    #[expect(clippy::too_many_arguments, reason = "each is one field of the order")]
    fn order_dial(
        &self,
        session: SessionId,
        nonce: OrderId,
        version: Version,
        source: &Holder,
        streams: u32,
        terms: &Terms,
        out: &mut Outbox,
    ) {
        let Some(receiver) = self.receivers.get(session) else { return };
        let Some(publisher) = source.publisher else { return };
        out.act(Action::DialReceiver(Box::new(DialOrder {
            publisher,
            source: source.name.clone(),
            receiver: receiver.id.clone(),
            addresses: receiver.addresses.clone(),
            serve_key: receiver.serve_key,
            job: terms.job.clone(),
            version,
            nonce,
            // One more tells what the trainer has.
            streams: streams.max(1) + 1,
        })));
    }

    /// Takes in how far a load is. Reports of other orders than the newest say nothing.
    pub fn reported(
        &mut self,
        now: Now,
        session: SessionId,
        report: &LoadReport,
        out: &mut Outbox,
    ) -> Reported {
        let Some(before) = self.load_of(session).filter(|load| load.order == report.order) else {
            return Reported::Nothing;
        };
        let changed = before.stage != report.stage;
        let after = self.receivers.change(session, |receiver| {
            let load = receiver.load.as_mut()?;
            load.take_in(report);
            Some((receiver.id.clone(), load.clone()))
        });
        let Some(Some((id, load))) = after else { return Reported::Nothing };
        let version = load.version;
        if report.holds {
            self.note_holds(session, version);
        }
        self.note_progress(now, &id, version, load.progress(), out);
        if changed && matches!(report.stage, LoadStage::Staged | LoadStage::Failed) {
            self.note_rates(session, &load, report);
        }
        if changed {
            self.news(true);
            out.tell(Notice::LoadStage {
                engine: id,
                version,
                stage: report.stage,
                bytes: load.bytes,
                ms: now.since(load.ordered).as_millis() as u64,
                error: report.error.clone(),
                fetched_from: report.fetched_from.clone(),
            });
        }
        match report.stage {
            LoadStage::Quiescing => Reported::Begins(version),
            LoadStage::Active if report.version != version => Reported::Misreported(format!(
                "was ordered {version}, reports {} active",
                report.version
            )),
            LoadStage::Active => {
                Reported::Active(version, report.probe.as_ref().map(|probe| probe.verdict))
            }
            LoadStage::Failed => Reported::Failed(report.error.clone()),
            _ => Reported::Nothing,
        }
    }

    fn note_holds(&mut self, session: SessionId, version: Version) {
        let news = self.receivers.change(session, |receiver| {
            let new = receiver.holds.insert(version);
            let over = (receiver.holds.len() > HELD).then(|| receiver.holds.pop_first()).flatten();
            (new, over)
        });
        let Some((new, over)) = news else { return };
        if new {
            self.commit(Change::Holds { session, version });
            self.news(true);
        }
        if let Some(version) = over {
            self.commit(Change::LetGo { session, version });
        }
    }

    /// The ordered version is active.
    pub fn done(&mut self, session: SessionId, report: LoadReport, out: &mut Outbox) {
        out.timers.clear(Timer::Load(session));
        self.receivers.change(session, |receiver| {
            let version = receiver.load.take().map(|load| load.version);
            receiver.failed_loads = 0;
            receiver.load_error.clear();
            receiver.probe = version.zip(report.probe);
        });
        self.news(true);
    }

    /// The version before keeps serving, and the load is ordered again after a while: `base`, doubled each
    /// time up to 32 times.
    pub fn failed(
        &mut self,
        now: Now,
        session: SessionId,
        why: &str,
        base: Duration,
        out: &mut Outbox,
    ) {
        let failed = self.receivers.change(session, |receiver| {
            receiver.load = None;
            receiver.failed_loads += 1;
            why.clone_into(&mut receiver.load_error);
            receiver.retry_waits = true;
            receiver.failed_loads
        });
        let Some(failed) = failed else { return };
        let wait = base * (1 << failed.saturating_sub(1).min(5));
        out.timers.clear(Timer::Load(session));
        out.timers.set(Timer::LoadRetry(session), now + wait);
        self.news(true);
        out.wake_placement();
    }

    /// A failed load may be ordered again.
    pub fn retry(&mut self, session: SessionId) {
        self.receivers.change(session, |receiver| receiver.retry_waits = false);
        self.news(false);
    }

    /// A load took too long: it is cancelled. Gives the reason.
    pub fn overdue(
        &mut self,
        now: Now,
        session: SessionId,
        deadline: Duration,
        out: &mut Outbox,
    ) -> Option<String> {
        let receiver = self.receivers.get(session)?;
        let (id, load) = (receiver.id.clone(), receiver.load.clone()?);
        out.act(Action::CancelLoad { session, order: load.order });
        let error = format!("not done within {} ms", deadline.as_millis());
        let failed = Load { stage: LoadStage::Failed, error: error.clone(), ..load };
        self.note_progress(now, &id, failed.version, failed.progress(), out);
        Some(error)
    }
}

impl Load {
    fn take_in(&mut self, report: &LoadReport) {
        self.stage = report.stage;
        self.bytes = report.bytes.max(self.bytes);
        self.error.clone_from(&report.error);
        self.fetched_from.extend(report.fetched_from.clone());
        self.ingress = self.ingress.max(report.ingress);
        self.served = self.served.max(report.served);
    }

    /// Progress without what the order alone knows.
    fn progress(&self) -> Progress {
        Progress {
            bytes: self.bytes,
            error: self.error.clone(),
            fetched_from: self.fetched_from.clone(),
            served: self.served,
            ..Progress::at(self.stage)
        }
    }
}
