//! Weight versions: made current, settled, retired, attested. How they come is in `publishing`.

use anabranch_proto::{EngineId, GroupId, SessionId, Version};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::{Action, Answer, FailKind, Notice, OnEngine, VersionStatus};
use crate::event::{LoadStage, OnExceed, ReplyTo};
use crate::fleet::EngineState;
use crate::weights::versions::{Progress, VersionRecord, VersionState};

impl Core {
    /// The newest sealed version becomes current, unless that would make unfinished groups too old and the
    /// job said to wait for them.
    pub(super) fn advance_current(&mut self, now: Now) {
        let Some(next) = self.versions.pending() else { return };
        let Some(job) = &self.job else { return };
        let on_exceed = job.staleness.on_exceed;
        let too_old = self.groups_too_old_for(next, on_exceed == OnExceed::Wait);
        match on_exceed {
            // Nobody can make the tokens they wait for any more.
            OnExceed::Wait if !too_old.is_empty() && !self.current_is_within_reach() => {
                self.restart_groups(now, &too_old, next);
            }
            OnExceed::Wait if !too_old.is_empty() => {
                let steps: Vec<_> = self.steps.keys().copied().collect();
                return steps.into_iter().for_each(|step| self.flush(now, step));
            }
            OnExceed::Wait => {}
            OnExceed::Restart => self.restart_groups(now, &too_old, next),
            OnExceed::Drop => {
                for group in &too_old {
                    self.drop_group(now, *group, "its tokens became too old");
                }
            }
        }
        self.make_current(now, next);
    }

    /// Some engine serves a version that may still make tokens, or can get the current one.
    fn current_is_within_reach(&self) -> bool {
        let max_lag = self.job.as_ref().and_then(|job| job.staleness.max_lag);
        let recent = |at: Version| {
            let lag = at.lag_behind(&self.current);
            max_lag.is_none_or(|max| lag.is_some_and(|lag| lag <= max))
        };
        let held = || {
            self.versions.find(self.current).is_some_and(VersionRecord::is_offered)
                || self
                    .engines
                    .values()
                    .any(|e| e.link.is_some() && e.holds.contains(&self.current))
        };
        self.current.is_base()
            || self.engines.values().any(|engine| engine.version().is_some_and(recent))
            || held()
    }

    /// Groups not offered yet with tokens that would lag more than allowed behind `next`.
    /// `or_may_be`: a sample that runs on an engine with such weights may have made one that has not arrived.
    fn groups_too_old_for(&self, next: Version, or_may_be: bool) -> Vec<GroupId> {
        let Some(max_lag) = self.job.as_ref().and_then(|job| job.staleness.max_lag) else {
            return Vec::new();
        };
        let floor = next.number.saturating_sub(max_lag);
        let too_old = |group: &crate::rollout::group::Group| {
            let made = || group.oldest() < floor;
            let may_make = || or_may_be && group.samples.iter().any(|s| self.runs_below(s, floor));
            group.pin.is_none() && group.offered_at.is_none() && (made() || may_make())
        };
        self.groups.iter().filter(|(_, group)| too_old(group)).map(|(id, _)| *id).collect()
    }

    fn runs_below(&self, sample: &crate::rollout::sample::Sample, floor: u64) -> bool {
        let engine = sample.running_on().and_then(|(session, _)| self.engines.get(&session));
        engine.and_then(|engine| engine.version()).is_some_and(|at| at.number < floor)
    }

    fn restart_groups(&mut self, now: Now, groups: &[GroupId], next: Version) {
        let max_lag = self.job.as_ref().and_then(|job| job.staleness.max_lag).unwrap_or(u64::MAX);
        let floor = next.number.saturating_sub(max_lag);
        let samples: Vec<_> = groups.iter().flat_map(|group| self.samples_of(*group)).collect();
        for sample in samples {
            let Some(record) = self.sample(sample) else { continue };
            if !record.is_open() || record.oldest >= floor {
                continue;
            }
            self.unqueue(sample);
            self.take_off(now, sample, "too old");
            self.restart(sample);
            self.enqueue(sample);
        }
    }

    fn make_current(&mut self, _now: Now, next: Version) {
        for record in self.versions.iter_mut() {
            let older = record.version.number < next.number;
            if older && matches!(record.state, VersionState::Current | VersionState::Available) {
                record.state = VersionState::Superseded;
            }
            if record.version == next {
                record.state = VersionState::Current;
            }
        }
        self.current = next;
        self.placeable = true;
        self.tell(Notice::VersionCurrent { version: next, waited_for_groups: 0 });
    }

    pub(super) fn check_settled(&mut self, now: Now, version: Version) {
        let everywhere = self.engines.values().all(|engine| {
            engine.link.is_none()
                || engine.hello.weights_by_trainer
                || !matches!(
                    engine.state,
                    EngineState::Syncing { .. }
                        | EngineState::Serving { .. }
                        | EngineState::Updating { .. }
                )
                || engine.state == EngineState::Serving { at: version }
        });
        let current = self.current == version;
        let Some(record) = self.versions.get_mut(version.number) else { return };
        if !everywhere || !current || std::mem::replace(&mut record.settled, true) {
            return;
        }
        let ms = record.sealed.map_or(0, |sealed| now.since(sealed).as_millis() as u64);
        let active = |p: &&Progress| p.stage == LoadStage::Active;
        let engines = record.engines.values().filter(active).count() as u32;
        self.tell(Notice::VersionSettled { version, engines, ms });
        self.tell_publisher(version);
    }

    pub(super) fn tell_publisher(&mut self, version: Version) {
        let Some(record) = self.versions.get(version.number) else { return };
        let publishers: Vec<_> = record.publishers().collect();
        let status = status_of(record);
        for publisher in publishers {
            self.act(Action::TellPublisher { publisher, status: status.clone() });
        }
    }

    /// A holder is gone; a version that nobody has any more is retired.
    pub(super) fn forget_holder(&mut self, session: SessionId) {
        if let Some(engine) = self.engines.get_mut(&session) {
            engine.holds.clear();
        }
        let held = |version: &Version| self.engines.values().any(|e| e.holds.contains(version));
        let orphans: Vec<u64> = self
            .versions
            .iter()
            .filter(|r| r.state == VersionState::Superseded && !r.is_offered() && !held(&r.version))
            .map(|r| r.version.number)
            .collect();
        for number in orphans {
            if let Some(record) = self.versions.get_mut(number) {
                record.state = VersionState::Retired;
            }
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
            return self.fail(reply, kind, why);
        }
        let Some(&target) = self.by_id.get(&engine) else {
            return self.fail(reply, FailKind::NotFound, format!("no engine {engine} is attached"));
        };
        let record = self.engines.get_mut(&target).expect("by_id names live sessions");
        if !record.hello.weights_by_trainer {
            let why = format!(
                "engine {engine} gets its weights from the manager; attach it with --weights-by-trainer to attest it"
            );
            return self.fail(reply, FailKind::BadRequest, why);
        }
        let known = version.is_base()
            || self
                .versions
                .get(version.number)
                .is_some_and(|r| r.version.number == version.number);
        if !known {
            let why = format!("version {version} was never published");
            return self.fail(reply, FailKind::BadRequest, why);
        }
        let version = self.versions.get(version.number).map_or(version, |record| record.version);
        let ready = matches!(
            record.state,
            EngineState::Joining | EngineState::Syncing { .. } | EngineState::Serving { .. }
        );
        if !ready {
            let why = format!("engine {engine} cannot serve now (it is {:?})", record.state);
            return self.fail(reply, FailKind::Unavailable, why);
        }
        record.hello.loaded = version;
        record.attested = Some(version);
        self.set_serving(now, target, version);
        self.reply(reply, Answer::Done);
    }
}

pub(crate) fn status_of(record: &VersionRecord) -> VersionStatus {
    let on_engine = |(engine, p): (&EngineId, &Progress)| OnEngine {
        engine: engine.clone(),
        stage: p.stage,
        bytes: p.bytes,
        since_sealed: p.since_sealed,
        error: p.error.clone(),
    };
    VersionStatus {
        version: record.version,
        state: record.state.name(),
        bytes: record.bytes,
        engines: record.engines.iter().map(on_engine).collect(),
        settled: record.settled,
    }
}
