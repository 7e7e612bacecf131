//! Rolling out: versions are announced and sealed, become current, and go to the engines.

use std::time::Duration;

use anabranch_proto::{EngineId, SessionId, Version};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::{Answer, FailKind, Notice};
use crate::event::{Announce, LoadReport, OnExceed, PublisherId, ReplyTo, Verdict};
use crate::fleet::EngineState;
use crate::weights::{Reported, Terms};

impl Core {
    pub(super) fn announce(
        &mut self,
        now: Now,
        publisher: PublisherId,
        announce: Announce,
        reply: ReplyTo,
    ) {
        let epoch = match self.job_of(announce.session) {
            Ok(job) => job.epoch,
            Err((kind, why)) => return self.out.fail(reply, kind, why),
        };
        self.trainer_heard(now);
        let version = Version { epoch, ..announce.version };
        let key = self.config.serve_key("trainer", announce.session.0);
        match self.weights.announce(publisher, version, announce, key, &mut self.out) {
            Ok(()) => self.out.reply(reply, Answer::Done),
            Err(why) => self.out.fail(reply, FailKind::BadRequest, why),
        }
    }

    pub(super) fn seal(
        &mut self,
        now: Now,
        publisher: PublisherId,
        version: Version,
        reply: ReplyTo,
    ) {
        match self.weights.seal(now, publisher, version, &mut self.out) {
            Ok(()) => self.out.reply(reply, Answer::Done),
            Err(why) => self.out.fail(reply, FailKind::BadRequest, why),
        }
    }

    /// The newest sealed version becomes current, unless that would make unfinished groups too old and the
    /// job said to wait for them.
    pub(super) fn advance_current(&mut self, now: Now) {
        let Some(next) = self.weights.books().pending() else { return };
        let Some(job) = self.job.settings() else { return };
        let staleness = job.staleness;
        let floor = staleness.max_lag.map(|max_lag| next.number.saturating_sub(max_lag));
        match (floor, staleness.on_exceed) {
            (Some(floor), OnExceed::Wait) => {
                let made = self.rollout.has_older_than(floor);
                if made || self.rollout.may_get_older_than(floor) {
                    if self.current_is_within_reach() {
                        return self.rollout.flush_all(self.at(now), &mut self.out);
                    }
                    // Nobody can make the tokens they wait for any more.
                    self.restart_groups(now, &self.rollout.older_than(floor), floor);
                }
            }
            (Some(floor), OnExceed::Restart) => {
                self.restart_groups(now, &self.rollout.older_than(floor), floor);
            }
            (Some(floor), OnExceed::Drop) => {
                for group in self.rollout.older_than(floor) {
                    self.drop_group(now, group, "its tokens became too old");
                }
            }
            (None, _) => {}
        }
        self.weights.make_current(now, next, &mut self.out);
    }

    /// Some engine serves a version that may still make tokens, or can get the current one.
    fn current_is_within_reach(&self) -> bool {
        let current = self.weights.current();
        let max_lag = self.job.settings().and_then(|job| job.staleness.max_lag);
        let recent = |at: Version| {
            let lag = at.lag_behind(&current);
            max_lag.is_none_or(|max| lag.is_some_and(|lag| lag <= max))
        };
        current.is_base()
            || self.fleet.versions().any(recent)
            || self.weights.current_is_within_reach()
    }

    /// Orders the current version, and pinned ones, where they are missing.
    pub(super) fn order_loads(&mut self, now: Now) {
        if self.weights.current().is_base() {
            return;
        }
        let Some(job) = self.job.settings() else { return };
        let pins_changed = self.rollout.take_pins_changed();
        if !self.weights.wants_orders() && !pins_changed {
            return;
        }
        let terms = Terms {
            job: job.name.clone(),
            on_running: job.on_running,
            keep_serving: job.rolling,
            deadline: Duration::from_millis(self.config.load_deadline_ms),
        };
        for (choices, pin) in self.weights.missing_pins(self.rollout.pins(), &mut self.out) {
            self.order_pinned(now, &choices, pin, &terms);
        }
        let ordered = self.weights.order_current(now, &terms, &mut self.out);
        self.ordered(&ordered);
    }

    /// Groups are pinned to a version that no engine has: the first engine that somebody can give it to fetches it. The
    /// groups are given up where nobody has the version any more.
    fn order_pinned(&mut self, now: Now, choices: &[SessionId], pin: Version, terms: &Terms) {
        if choices.is_empty() {
            return;
        }
        if let Some(&session) = choices.iter().find(|at| self.weights.can_feed(**at, pin)) {
            let ordered = self.weights.order_wave(now, &[session], pin, terms, &mut self.out);
            return self.ordered(&ordered);
        }
        if self.weights.is_within_reach(pin) {
            return;
        }
        for group in self.rollout.pinned_to(pin) {
            let why = format!("pinned to {pin}, which no engine and no holder has any more");
            self.give_up_group(now, group, &why, false);
        }
    }

    fn ordered(&mut self, ordered: &[(SessionId, Version)]) {
        for (session, to) in ordered {
            let state = self.fleet.engine(*session).map(|engine| engine.state().clone());
            if matches!(state, Some(EngineState::Joining | EngineState::Syncing { .. })) {
                self.set_engine(*session, EngineState::Syncing { to: *to });
            }
        }
    }

    pub(super) fn load_reported(&mut self, now: Now, session: SessionId, report: LoadReport) {
        self.engine_heard(now, session);
        match self.weights.reported(now, session, &report, &mut self.out) {
            Reported::Nothing => {}
            Reported::Begins(version) => self.begin_update(session, version),
            Reported::Active(version, verdict) => {
                self.weights.done(session, report, &mut self.out);
                self.fleet.set_loaded(session, version);
                match self.weights.books().find(version) {
                    Some(_) => self.serve(now, session, version, verdict),
                    // A load of an older epoch has ended: its weights are no version of this one.
                    None => self
                        .set_engine(session, EngineState::Syncing { to: self.weights.current() }),
                }
            }
            Reported::Failed(why) => self.load_failed(now, session, &why),
            Reported::Misreported(what) => {
                if let Some(engine) = self.fleet.engine(session).map(|engine| engine.id.clone()) {
                    self.out.tell(Notice::PeerMisbehaved { engine, what: what.clone() });
                }
                self.load_failed(now, session, &what);
            }
        }
    }

    fn begin_update(&mut self, session: SessionId, to: Version) {
        self.move_pinned(session, to);
        let state = self.fleet.engine(session).map(|engine| engine.state().clone());
        if let Some(EngineState::Serving { at }) = state {
            self.set_engine(session, EngineState::Updating { from: at, to });
        }
    }

    /// The engine may be given samples: it has this version, proven or attested.
    pub(super) fn serve(
        &mut self,
        now: Now,
        session: SessionId,
        version: Version,
        probe: Option<Verdict>,
    ) {
        let Some(engine) = self.fleet.engine(session) else { return };
        if !engine.state().is_live() {
            return;
        }
        let engine = engine.id.clone();
        self.set_engine(session, EngineState::Serving { at: version });
        self.fleet.update(session, |engine| engine.makes_since = now);
        self.out.wake_placement();
        self.out.tell(Notice::EngineServing { engine, version, probe });
    }

    /// The old version keeps serving, and the load is ordered again after a while.
    fn load_failed(&mut self, now: Now, session: SessionId, why: &str) {
        let base = Duration::from_millis(self.config.load_retry_ms);
        self.weights.failed(now, session, why, base, &mut self.out);
        let state = self.fleet.engine(session).map(|engine| engine.state().clone());
        if let Some(EngineState::Updating { from, .. }) = state {
            self.set_engine(session, EngineState::Serving { at: from });
            self.fleet.update(session, |engine| engine.makes_since = now);
        }
    }

    pub(super) fn load_overdue(&mut self, now: Now, session: SessionId) {
        let deadline = Duration::from_millis(self.config.load_deadline_ms);
        if let Some(why) = self.weights.overdue(now, session, deadline, &mut self.out) {
            self.load_failed(now, session, &why);
        }
    }

    /// The trainer loaded this engine itself and says so.
    pub(super) fn attest(
        &mut self,
        now: Now,
        session: SessionId,
        engine: EngineId,
        version: Version,
        reply: ReplyTo,
    ) {
        if let Err((kind, why)) = self.job_of(session) {
            return self.out.fail(reply, kind, why);
        }
        let target = self.fleet.books().by_id(&engine);
        let Some(record) = target.and_then(|target| self.fleet.engine(target)) else {
            let why = format!("no engine {engine} is attached");
            return self.out.fail(reply, FailKind::NotFound, why);
        };
        if !record.hello.weights_by_trainer {
            let why = format!(
                "engine {engine} gets its weights from the manager; attach it with --weights-by-trainer to attest it"
            );
            return self.out.fail(reply, FailKind::BadRequest, why);
        }
        let published = self.weights.books().get(version.number).map(|record| record.version());
        if !version.is_base() && published.is_none() {
            let why = format!("version {version} was never published");
            return self.out.fail(reply, FailKind::BadRequest, why);
        }
        let ready = matches!(
            record.state(),
            EngineState::Joining | EngineState::Syncing { .. } | EngineState::Serving { .. }
        );
        if !ready {
            let why = format!("engine {engine} cannot serve now (it is {:?})", record.state());
            return self.out.fail(reply, FailKind::Unavailable, why);
        }
        let (target, version) = (record.session, published.unwrap_or(version));
        self.fleet.set_loaded(target, version);
        self.fleet.set_attested(target, Some(version));
        self.serve(now, target, version, None);
        self.out.reply(reply, Answer::Done);
    }
}
