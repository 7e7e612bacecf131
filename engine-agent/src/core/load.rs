//! From an order to serving its version, or back to the old one: `impl Core` for weights. The engine is
//! told only after everything was verified, and no token leaves before the new weights were probed.
//!
//! ```text
//!            order              verified             streams quiet         paused
//!   Active ────────► Fetching ───────────► Quiescing ─────────────► Freezing ─────► Loading
//!     ▲ ▲               │ failed               │ gave up               │ failed        │ loaded
//!     │ └───────────────┴──────────────────────┘                       │               ▼
//!     │                                          ┌─────────────────────┴── failed ── Thawing
//!     │                                          ▼                                     │ resumed
//!     ├──────────────── resumed ──────────── Restoring{why} ◄──── disagrees ──────── Probing
//!     └──────────────────────────────────────────────────────────── agrees ────────────┘
//! ```
//!
//! `Active` carries the version; in Restoring the old one is being put back. An engine that dies in
//! any of them leaves all of them.

use std::time::Duration;

use anabranch_proto::Version;
use anabranch_proto::pb::load_state::Stage;
use anabranch_proto::pb::probe::Verdict;
use anabranch_proto::pb::{self, OnRunning, from_agent};
use anabranch_runtime::Now;

use super::action::{Action, FetchOrder};
use super::event::{Call, Moved, Staged};
use super::timer::Timer;
use super::{AgentState, Core, Memory};

mod ending;
mod job;
mod loader;
mod swap;
mod traffic;

use job::Job;
use loader::LoadState;
pub(super) use loader::Loader;

/// How long streams that were told to end for a load may take.
const QUIESCE: Duration = Duration::from_secs(15);

impl Core {
    pub(super) fn load_ordered(&mut self, now: Now, load: pb::Load) {
        if load.cancel {
            self.cancel_load(now, load.order, "cancelled by the manager");
            return;
        }
        let job = match Job::parse(now, load) {
            Ok(job) => job,
            Err(report) => return self.report(*report),
        };
        if let Some(why) = self.cannot_load() {
            return self.report(job.failed(why));
        }
        match &self.loader.state {
            LoadState::Active => self.begin_fetch(now, job),
            LoadState::Fetching(old) => {
                let why = format!("superseded by order {}", job.order);
                let order = old.order;
                self.cancel_load(now, order, &why);
                self.begin_fetch(now, job);
            }
            _ => {
                let newer = format!("superseded by order {}", job.order);
                if let Some(skipped) = self.loader.next.replace(job) {
                    self.report(skipped.failed(newer));
                }
            }
        }
    }

    fn cannot_load(&self) -> Option<String> {
        if self.config.weights_by_trainer {
            return Some("the trainer loads this engine (--weights-by-trainer)".to_owned());
        }
        match self.state {
            AgentState::Serving => {}
            AgentState::Booting => return Some("the engine is down".to_owned()),
            AgentState::Draining(_) | AgentState::Stopped => return Some("draining".to_owned()),
        }
        matches!(self.memory, Memory::Releasing { .. } | Memory::Released)
            .then(|| "the engine's memory is released".to_owned())
    }

    fn begin_fetch(&mut self, now: Now, job: Job) {
        if self.loader.serving() == Some(job.to) {
            let probe = self.loader.last_probe.clone();
            return self.report(job.active(probe, Verdict::Inconclusive, None));
        }
        if let Some(deadline) = job.deadline {
            self.timers.set(Timer::LoadDeadline, deadline.max(now));
        }
        self.report(job.report(Stage::Fetching));
        self.act(Action::Fetch(Box::new(FetchOrder {
            order: job.order,
            version: job.to,
            sources: job.sources.clone(),
            stripe_count: job.stripe_count,
            streams: job.streams,
            directory: job.directory.clone(),
            bytes: job.bytes,
        })));
        self.loader.state = LoadState::Fetching(job);
    }

    pub(super) fn fetch_progressed(&mut self, now: Now, order: u64, so_far: Moved) {
        let LoadState::Fetching(job) = &mut self.loader.state else { return };
        if job.order == order {
            job.traffic.moved(now, so_far);
            let report = pb::LoadState { bytes: so_far.bytes, ..job.report(Stage::Fetching) };
            self.report(report);
        }
    }

    pub(super) fn fetched(&mut self, now: Now, order: u64, result: Result<Staged, String>) {
        let LoadState::Fetching(job) = &self.loader.state else { return };
        if job.order != order {
            return;
        }
        let job = job.clone();
        match result {
            Err(why) => self.fail_load(now, job, why),
            Ok(staged) => {
                let bytes = staged.bytes;
                tracing::info!(version = %job.to, bytes, holds = staged.holds, "weights verified");
                self.report(pb::LoadState {
                    bytes,
                    holds: staged.holds,
                    fetched_from: staged.from.clone().into_iter().collect(),
                    ..job.report(Stage::Staged)
                });
                self.quiesce(now, job, staged);
            }
        }
    }

    fn quiesce(&mut self, now: Now, job: Job, staged: Staged) {
        if let Some(why) = self.cannot_load() {
            return self.fail_load(now, job, why);
        }
        self.report(job.report(Stage::Quiescing));
        match job.on_running {
            OnRunning::Finish => {}
            OnRunning::Abort => {
                self.abort_all(now, "new weights");
                self.timers.set(Timer::Quiesce, now + QUIESCE);
            }
            OnRunning::Continue | OnRunning::Unspecified => {
                self.cut_runs();
                self.timers.set(Timer::Quiesce, now + QUIESCE);
            }
        }
        self.loader.state = LoadState::Quiescing(job, staged);
    }

    /// Goes on once the streams are quiet.
    pub(super) fn settle_load(&mut self) {
        let LoadState::Quiescing(job, _) = &self.loader.state else { return };
        let paused_ones_too =
            !matches!(job.on_running, OnRunning::Continue | OnRunning::Unspecified);
        if self.unquiet(paused_ones_too) > 0 {
            return;
        }
        let LoadState::Quiescing(job, staged) = std::mem::take(&mut self.loader.state) else {
            return;
        };
        self.timers.clear(Timer::Quiesce);
        self.loader.state = LoadState::Freezing(job, staged);
        self.act(Action::Call(Call::Freeze));
    }

    pub(super) fn load_deadline(&mut self, now: Now) {
        let late = |job: &Job| format!("not done within the deadline of {} ms", job.deadline_ms);
        match &self.loader.state {
            LoadState::Fetching(job) => {
                let (order, why) = (job.order, late(job));
                self.cancel_load(now, order, &why);
            }
            LoadState::Quiescing(job, _) if job.on_running == OnRunning::Finish => {
                tracing::warn!(version = %job.to, "samples still run at the load's deadline: they go on elsewhere");
                self.abort_all(now, "new weights");
                self.timers.set(Timer::Quiesce, now + QUIESCE);
            }
            _ => {}
        }
    }

    pub(super) fn quiesce_gave_up(&mut self, now: Now) {
        let LoadState::Quiescing(job, _) = &self.loader.state else { return };
        let (job, open) = (job.clone(), self.unquiet(true));
        let why = format!("{open} streams did not end within {} s", QUIESCE.as_secs());
        self.fail_load(now, job, why);
    }

    fn report(&mut self, report: pb::LoadState) {
        if matches!(report.stage(), Stage::Active | Stage::Failed) {
            self.loader.last_report = Some(report.clone());
        }
        self.tell(from_agent::Kind::LoadState(report));
    }

    /// The start-up weights belong to every epoch.
    pub(super) fn serving_version(&self) -> Version {
        self.loader.serving().unwrap_or_else(|| Version::base(0))
    }
}
