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

use anabranch_proto::pb::load_state::Stage;
use anabranch_proto::pb::probe::Verdict;
use anabranch_proto::pb::{self, OnRunning, from_agent};
use anabranch_runtime::Now;

use super::action::{Action, Exit, FetchOrder};
use super::event::{Call, Moved, ProbeResult, Staged};
use super::timer::Timer;
use super::{AgentState, Core, Memory};

mod job;
mod loader;
mod traffic;

use job::{Job, verdict, wire};
pub(super) use loader::Loader;
use loader::{HeldBack, LoadState, Serving};

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

    pub(super) fn called(&mut self, now: Now, call: Call, result: Result<(), String>) {
        match (call, result) {
            (Call::Freeze, Ok(())) => self.frozen(),
            (Call::Load, Ok(())) => self.loaded(),
            (Call::Thaw, Ok(())) => self.thawed(now),
            (Call::Freeze | Call::Load, Err(why)) => self.load_failed(why),
            (Call::Thaw, Err(why)) => self.thaw_failed(why),
            (call, result) => self.mode_called(call, result),
        }
    }

    fn frozen(&mut self) {
        match std::mem::take(&mut self.loader.state) {
            LoadState::Freezing(job, staged) => {
                self.report(job.report(Stage::Loading));
                let directory = staged.directory.clone();
                self.act(Action::LoadWeights { directory, label: job.to.to_string() });
                self.loader.state = LoadState::Loading(job, staged);
            }
            other => self.loader.state = other,
        }
    }

    /// The engine has new weights; from here on its tokens are theirs.
    fn loaded(&mut self) {
        match std::mem::take(&mut self.loader.state) {
            LoadState::Loading(job, staged) => {
                self.mark_boundaries();
                self.report(job.report(Stage::Probing));
                self.loader.state = LoadState::Thawing(job, staged);
                self.act(Action::Call(Call::Thaw));
            }
            // The old ones are back.
            LoadState::Restoring { job, why, .. } => {
                self.loader.state = LoadState::Restoring { job, why, reload: false };
                self.act(Action::Call(Call::Thaw));
            }
            other => self.loader.state = other,
        }
    }

    fn thawed(&mut self, now: Now) {
        match std::mem::take(&mut self.loader.state) {
            LoadState::Thawing(job, staged) => {
                self.loader.state = LoadState::Probing(job, staged);
                self.act(Action::Probe);
            }
            LoadState::Restoring { job, why, reload: false } => self.fail_load(now, job, why),
            other => self.loader.state = other,
        }
    }

    pub(super) fn probed(&mut self, now: Now, result: Result<ProbeResult, String>) {
        let (job, staged) = match std::mem::take(&mut self.loader.state) {
            LoadState::Probing(job, staged) => (job, staged),
            other => {
                self.loader.state = other;
                return;
            }
        };
        let probe = match result {
            Ok(probe) => probe,
            Err(why) => return self.go_back(now, job, format!("the probe failed: {why}")),
        };
        let verdict = verdict(&probe, job.reference.as_ref(), self.loader.last_probe.as_ref());
        if verdict == Verdict::Disagrees {
            let why =
                "its log-probabilities differ from a replica's at the same version".to_owned();
            let report =
                pb::LoadState { probe: Some(wire(&probe, verdict)), ..job.report(Stage::Probing) };
            self.report(report);
            return self.go_back(now, job, why);
        }
        self.activate(now, job, staged, probe, verdict);
    }

    fn activate(
        &mut self,
        now: Now,
        job: Job,
        staged: Staged,
        probe: ProbeResult,
        verdict: Verdict,
    ) {
        tracing::info!(version = %job.to, probe = verdict.as_str_name(), "version active");
        self.timers.clear(Timer::LoadDeadline);
        self.loader.take(Serving {
            version: job.to,
            label: job.to.to_string(),
            directory: Some(staged.directory.clone()),
        });
        self.loader.last_probe = Some(probe.clone());
        self.act(Action::KeepStaged { version: job.to, directory: staged.directory.clone() });
        self.report(job.active(Some(probe), verdict, Some(&staged)));
        for item in std::mem::take(&mut self.loader.held_back) {
            match item {
                HeldBack::Tokens { run, tokens, logprobs, spans } => {
                    self.take_tokens(now, run, &tokens, &logprobs, &spans);
                }
                HeldBack::End { run, end } => self.run_ended(now, run, end),
            }
        }
        self.finish_load(now);
    }

    /// The engine refused, or could not be paused: its weights are still the old ones.
    fn load_failed(&mut self, why: String) {
        match std::mem::take(&mut self.loader.state) {
            LoadState::Freezing(job, _) | LoadState::Loading(job, _) => {
                self.loader.state = LoadState::Restoring { job, why, reload: false };
                self.act(Action::Call(Call::Thaw));
            }
            LoadState::Restoring { job, why: first, .. } => {
                self.unverified(&job, &format!("{first}; and going back failed: {why}"));
            }
            other => self.loader.state = other,
        }
    }

    fn thaw_failed(&mut self, why: String) {
        match std::mem::take(&mut self.loader.state) {
            LoadState::Thawing(job, _) | LoadState::Restoring { job, .. } => {
                self.unverified(&job, &format!("the engine does not go on: {why}"));
            }
            other => self.loader.state = other,
        }
    }

    /// The new weights are in, and are not to be trusted: put the old ones back.
    fn go_back(&mut self, now: Now, job: Job, why: String) {
        tracing::warn!(version = %job.to, why, "load refused; going back");
        self.abort_unverified(now, "the new weights were refused");
        let old = self.loader.serving.clone();
        let Some((directory, label)) = old.and_then(|old| Some((old.directory?, old.label))) else {
            self.unverified(&job, &format!("{why}; no copy of the old weights can be read here"));
            return;
        };
        self.loader.state = LoadState::Restoring { job, why, reload: true };
        self.act(Action::LoadWeights { directory, label });
    }

    /// Nobody vouches for what the engine would generate.
    fn unverified(&mut self, job: &Job, why: &str) {
        self.report(job.failed(why.to_owned()));
        self.loader.serving = None;
        self.exit(Exit::Unverified { why: why.to_owned() });
    }

    /// The old version keeps serving.
    fn fail_load(&mut self, now: Now, job: Job, why: String) {
        tracing::warn!(version = %job.to, order = job.order, why, "load failed; the old version keeps serving");
        self.timers.clear(Timer::LoadDeadline);
        self.timers.clear(Timer::Quiesce);
        self.report(job.failed(why));
        self.finish_load(now);
    }

    fn finish_load(&mut self, now: Now) {
        self.loader.state = LoadState::Active;
        self.release_held(now);
        if let Some(next) = self.loader.next.take() {
            match self.cannot_load() {
                Some(why) => self.report(next.failed(why)),
                None => self.begin_fetch(now, next),
            }
        }
    }

    pub(super) fn cancel_load(&mut self, now: Now, order: u64, why: &str) {
        if let Some(next) = self.loader.next.take_if(|next| next.order == order) {
            return self.report(next.failed(why.to_owned()));
        }
        match &self.loader.state {
            LoadState::Fetching(job) if job.order == order => {
                let job = job.clone();
                self.act(Action::CancelFetch { order });
                self.fail_load(now, job, why.to_owned());
            }
            LoadState::Quiescing(job, _) if job.order == order => {
                let job = job.clone();
                self.fail_load(now, job, why.to_owned());
            }
            _ => {}
        }
    }

    /// Orders of a session that is no more; what the engine is already at is finished.
    pub(super) fn forget_orders(&mut self, now: Now) {
        self.loader.next = None;
        self.loader.last_report = None;
        self.cancel_unstarted(now, "the manager began a new session");
    }

    /// Leaving, or giving memory back: loads that have not reached the engine end here.
    pub(super) fn cancel_unstarted(&mut self, now: Now, why: &str) {
        if let LoadState::Fetching(job) | LoadState::Quiescing(job, _) = &self.loader.state {
            let order = job.order;
            self.cancel_load(now, order, why);
        }
    }

    pub(super) fn engine_lost_in_load(&mut self, why: &str) {
        let state = std::mem::take(&mut self.loader.state);
        self.loader.serving = None;
        self.loader.last_probe = None;
        self.timers.clear(Timer::LoadDeadline);
        self.timers.clear(Timer::Quiesce);
        let job = match state {
            LoadState::Active => None,
            LoadState::Fetching(job) => {
                self.act(Action::CancelFetch { order: job.order });
                Some(job)
            }
            LoadState::Quiescing(job, _)
            | LoadState::Freezing(job, _)
            | LoadState::Loading(job, _)
            | LoadState::Thawing(job, _)
            | LoadState::Probing(job, _)
            | LoadState::Restoring { job, .. } => Some(job),
        };
        for job in job.into_iter().chain(self.loader.next.take()) {
            self.report(job.failed(format!("the engine died: {why}")));
        }
    }

    /// After a release the engine's weights are gone.
    pub(super) fn weights_gone(&mut self) {
        self.loader.serving = None;
        self.loader.last_probe = None;
    }

    fn report(&mut self, report: pb::LoadState) {
        if matches!(report.stage(), Stage::Active | Stage::Failed) {
            self.loader.last_report = Some(report.clone());
        }
        self.tell(from_agent::Kind::LoadState(report));
    }
}
