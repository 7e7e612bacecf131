//! Weights: the versions of one lineage, who holds them, and how they roll forward over the fleet.
//!
//! Owns versions, publications, load orders and the plan of who fetches from whom. Sees engines as receivers:
//! the coordinators say where each stands. Durable state is in `versions::Books`; senders, loads, probes and
//! rates are volatile.

mod change;
mod feeding;
mod loads;
pub mod plan;
mod publishing;
mod rates;
mod receivers;
mod rollforward;
mod tidings;
pub mod versions;

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_proto::{EngineId, SessionId, Version};
use anabranch_runtime::clock::Now;

use crate::action::Notice;
use crate::event::{EngineHello, OnRunning};
use crate::outbox::Outbox;
use rates::Rates;
use receivers::Receivers;

pub(crate) use change::Change;
pub(crate) use loads::Reported;
pub(crate) use receivers::{Load, Standing};
pub(crate) use rollforward::Stand;
pub(crate) use versions::{Books, Progress, VersionRecord, VersionState};

/// Number of a lineage: one sequence of weight versions of a job. Today every job has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LineageId(pub u32);

/// What the job says about loads.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub job: String,
    pub on_running: OnRunning,
    /// Engines that keep serving while others load; `None`: all load at once.
    pub keep_serving: Option<u32>,
    pub deadline: Duration,
}

#[derive(Default)]
pub(crate) struct Weights {
    pub lineage: LineageId,
    books: Books,
    log: Vec<Change>,
    // Volatile
    receivers: Receivers,
    rates: BTreeMap<EngineId, Rates>,
    /// True where a stand or a load of an engine has changed since orders were last considered.
    unsettled: bool,
    /// True where holders have changed, so that receivers without a path may have one.
    holders_changed: bool,
    planned: loads::Planned,
    /// Pinned versions, as last told.
    pins: Vec<Version>,
}

impl Weights {
    fn commit(&mut self, change: Change) {
        self.books.apply(&change);
        self.log.push(change);
    }

    /// Changes since the last call, in order.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.log)
    }

    pub fn books(&self) -> &Books {
        &self.books
    }

    pub fn current(&self) -> Version {
        self.books.current()
    }

    /// A new epoch, or another job: its versions begin at the weights that engines start with.
    pub fn begin(&mut self, epoch: u32, out: &mut Outbox) {
        self.commit(Change::Begun { epoch });
        self.receivers.retarget(self.books.current());
        // What is on its way is of no version of this epoch.
        self.cancel_outdated(&[], out);
        self.news(true);
    }

    /// Something changed that may let a load be ordered; `holders`: also for those that had no path.
    fn news(&mut self, holders: bool) {
        self.unsettled = true;
        self.holders_changed |= holders;
    }

    // Receivers

    /// An engine's agent attached, or is back with news of itself.
    pub fn join(&mut self, session: SessionId, hello: &EngineHello, is_relay: bool, key: [u8; 32]) {
        self.receivers.join(session, hello, is_relay, key);
        self.news(true);
    }

    /// A restarted agent may be on another machine: its rates are not known yet.
    pub fn forget_rates(&mut self, engine: &EngineId) {
        self.rates.insert(engine.clone(), Rates::default());
    }

    /// Says where an engine stands now.
    pub fn stand(&mut self, session: SessionId, standing: Standing) {
        let changed = self.receivers.change(session, |receiver| {
            let Standing { linked, stand, preemptible } = standing;
            let before = (receiver.linked, receiver.stand, receiver.preemptible);
            (receiver.linked, receiver.stand, receiver.preemptible) = (linked, stand, preemptible);
            before != (linked, stand, preemptible)
        });
        if changed == Some(true) {
            self.news(true);
        }
    }

    /// The session's engine is not shown any more.
    pub fn forget(&mut self, session: SessionId) {
        self.receivers.forget(session);
    }

    pub fn load_of(&self, session: SessionId) -> Option<&Load> {
        self.receivers.get(session)?.load.as_ref()
    }

    pub fn load_error(&self, session: SessionId) -> &str {
        self.receivers.get(session).map_or("", |receiver| &receiver.load_error)
    }

    pub fn holds(&self, session: SessionId) -> Vec<Version> {
        let receiver = self.receivers.get(session);
        receiver.map(|receiver| receiver.holds.iter().copied().collect()).unwrap_or_default()
    }

    /// Highest rates of an engine's host in and out, bytes/s, as its fetches showed.
    pub fn rates(&self, engine: &EngineId) -> (Option<u64>, Option<u64>) {
        let rates = self.rates.get(engine).copied().unwrap_or_default();
        (rates.ingress(), rates.egress())
    }

    /// The load in progress is over for the manager; its timer must be cleared by the caller.
    pub fn drop_load(&mut self, session: SessionId) {
        self.receivers.change(session, |receiver| receiver.load = None);
        self.news(true);
    }

    /// The probe of an engine that gave its memory back says nothing any more.
    pub fn drop_probe(&mut self, session: SessionId) {
        self.receivers.change(session, |receiver| receiver.probe = None);
    }

    /// An engine holds nothing any more; a version that nobody has is retired if `retire`.
    pub fn drop_holds(&mut self, session: SessionId, retire: bool) {
        for version in self.holds(session) {
            self.commit(Change::LetGo { session, version });
        }
        self.receivers.change(session, |receiver| receiver.holds.clear());
        self.news(true);
        if !retire {
            return;
        }
        let orphan = |record: &&VersionRecord| {
            record.state() == VersionState::Superseded
                && !record.is_offered()
                && !self.books.is_held(record.version())
        };
        let orphans: Vec<u64> =
            self.books.iter().filter(orphan).map(|record| record.version().number).collect();
        for number in orphans {
            self.commit(Change::Moved { number, to: VersionState::Retired });
        }
    }

    // Versions

    /// True where the current version can be had: offered, or held by a linked engine.
    pub fn current_is_within_reach(&self) -> bool {
        self.is_within_reach(self.current())
    }

    /// True where somebody may give the version: offered, or held by a linked engine.
    pub fn is_within_reach(&self, version: Version) -> bool {
        let linked = |session| self.receivers.get(session).is_some_and(|r| r.linked);
        self.books.find(version).is_some_and(VersionRecord::is_offered)
            || self.books.holders(version).any(linked)
    }

    /// `next` is current from now on.
    pub fn make_current(&mut self, now: Now, next: Version, out: &mut Outbox) {
        let older = |record: &&VersionRecord| {
            record.version().number < next.number
                && matches!(record.state(), VersionState::Current | VersionState::Available)
        };
        let older: Vec<u64> =
            self.books.iter().filter(older).map(|record| record.version().number).collect();
        for number in older {
            self.commit(Change::Moved { number, to: VersionState::Superseded });
            if let Some(version) = self.books.get(number).map(VersionRecord::version) {
                self.has_news(now, version, out);
            }
        }
        self.commit(Change::Current { version: next });
        self.receivers.retarget(next);
        self.news(true);
        out.wake_placement();
        out.tell(Notice::VersionCurrent { version: next, waited_for_groups: 0 });
    }

    /// Tells once that every attached engine serves the current version, one at least.
    pub fn check_settled(&mut self, now: Now, out: &mut Outbox) {
        let version = self.current();
        let Some(record) = self.books.find(version) else { return };
        let serves = self.receivers.front.is_served();
        if !self.receivers.front.is_settled() || !serves || record.settled() {
            return;
        }
        let ms = record.live().sealed.map_or(0, |sealed| now.since(sealed).as_millis() as u64);
        let active = |p: &&Progress| p.stage == crate::event::LoadStage::Active;
        let engines = record.live().engines.values().filter(active).count() as u32;
        self.commit(Change::Settled { number: version.number });
        out.tell(Notice::VersionSettled { version, engines, ms });
        self.has_news(now, version, out);
    }
}
