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

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use anabranch_proto::pb::load_state::Stage;
use anabranch_proto::pb::probe::Verdict;
use anabranch_proto::pb::{self, OnRunning, from_agent};
use anabranch_proto::Version;
use anabranch_runtime::Now;

use super::action::{Action, Exit, FetchOrder};
use super::event::{Call, ProbeResult, RunEnd, Staged};
use super::timer::Timer;
use super::{AgentState, Core, Memory};
use crate::engine::{Chunk, EngineInfo, LabelSpan, RunId};

#[derive(Default)]
pub(super) struct Loader {
    state: LoadState,
    /// What the engine's weights are; `None`: they are gone, or nobody knows.
    serving: Option<Serving>,
    /// The newest order that came too late to replace the one under way.
    next: Option<Job>,
    last_probe: Option<ProbeResult>,
    last_report: Option<pb::LoadState>,
    /// Labels of late, for the engine's own spans.
    labels: VecDeque<(String, Version)>,
    /// From the moment the streams go on until the probe spoke; bounded by a probe's length.
    held_back: Vec<HeldBack>,
}

#[derive(Clone, Debug)]
struct Serving {
    version: Version,
    label: String,
    directory: Option<PathBuf>,
}

#[derive(Debug, Default)]
enum LoadState {
    #[default]
    Active,
    Fetching(Job),
    Quiescing(Job, Staged),
    Freezing(Job, Staged),
    Loading(Job, Staged),
    Thawing(Job, Staged),
    Probing(Job, Staged),
    /// `reload`: the old weights are being loaded again; else only the pause is being ended.
    Restoring { job: Job, why: String, reload: bool },
}

#[derive(Clone, Debug)]
struct Job {
    order: u64,
    to: Version,
    on_running: OnRunning,
    deadline: Option<Now>,
    deadline_ms: u32,
    bytes: u64,
    sources: Vec<pb::Source>,
    directory: Option<PathBuf>,
    reference: Option<pb::Probe>,
}

enum HeldBack {
    Tokens { run: RunId, tokens: Vec<u32>, logprobs: Vec<f32>, spans: Vec<LabelSpan> },
    End { run: RunId, end: RunEnd },
}

/// How long streams that were told to end for a load may take.
const QUIESCE: Duration = Duration::from_secs(15);
/// Probes agree within this.
const TOLERANCE: f32 = 1e-4;
const MAX_LABELS: usize = 8;

// === impl Loader ===

impl Loader {
    pub fn serving(&self) -> Option<Version> {
        self.serving.as_ref().map(|serving| serving.version)
    }

    /// What the engine must call its weights; `None` while that is about to change.
    pub fn settled_label(&self) -> Option<&str> {
        match self.state {
            LoadState::Active | LoadState::Fetching(_) | LoadState::Quiescing(..) => {
                self.serving.as_ref().map(|serving| serving.label.as_str())
            }
            _ => None,
        }
    }

    /// What a sample started now will be served by: held samples start after the load.
    pub fn next_serving(&self) -> Option<Version> {
        match &self.state {
            LoadState::Active | LoadState::Fetching(_) | LoadState::Restoring { .. } => {
                self.serving()
            }
            LoadState::Quiescing(job, _)
            | LoadState::Freezing(job, _)
            | LoadState::Loading(job, _)
            | LoadState::Thawing(job, _)
            | LoadState::Probing(job, _) => Some(job.to),
        }
    }

    /// Starts are held.
    pub fn is_loading(&self) -> bool {
        !matches!(self.state, LoadState::Active | LoadState::Fetching(_))
    }

    /// Streams go on, but what they bring may not leave before the probe spoke.
    pub fn holds_back(&self) -> bool {
        matches!(self.state, LoadState::Thawing(..) | LoadState::Probing(..))
    }

    pub fn hold_back(&mut self, run: RunId, chunk: &Chunk) {
        self.held_back.push(HeldBack::Tokens {
            run,
            tokens: chunk.tokens.clone(),
            logprobs: chunk.logprobs.clone(),
            spans: chunk.spans.clone(),
        });
    }

    pub fn hold_back_end(&mut self, run: RunId, end: RunEnd) {
        self.held_back.push(HeldBack::End { run, end });
    }

    pub fn drop_held_back(&mut self) {
        self.held_back.clear();
    }

    pub fn last_report(&self) -> Option<&pb::LoadState> {
        self.last_report.as_ref()
    }

    pub fn engine_started(&mut self, info: &EngineInfo, probe: Option<ProbeResult>) {
        self.state = LoadState::Active;
        self.last_probe = probe;
        let version = Version::base(0);
        self.take(Serving {
            version,
            label: info.weight_label.clone(),
            directory: info.model_directory.clone(),
        });
    }

    fn take(&mut self, serving: Serving) {
        self.labels.retain(|(label, _)| *label != serving.label);
        self.labels.push_back((serving.label.clone(), serving.version));
        if self.labels.len() > MAX_LABELS {
            self.labels.pop_front();
        }
        self.serving = Some(serving);
    }

    /// Cuts `count` tokens from `leg_offset` of their request by what the engine says made them.
    pub fn place(
        &self,
        spans: &[LabelSpan],
        leg_offset: u32,
        count: usize,
    ) -> Vec<(Range<usize>, Version)> {
        let fallback = self.serving().unwrap_or_else(|| Version::base(0));
        let version_of = |at: u32| {
            let span = spans.iter().find(|span| span.start <= at && at < span.end)?;
            self.labels.iter().find(|(label, _)| *label == span.label).map(|(_, version)| *version)
        };
        let mut pieces: Vec<(Range<usize>, Version)> = Vec::new();
        for (index, at) in (leg_offset..).take(count).enumerate() {
            let version = version_of(at).unwrap_or(fallback);
            match pieces.last_mut() {
                Some((range, last)) if *last == version => range.end = index + 1,
                _ => pieces.push((index..index + 1, version)),
            }
        }
        pieces
    }
}

// === impl Core ===

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
        if self.loader.serving() == Some(job.to) && matches!(self.loader.state, LoadState::Active) {
            let probe = self.loader.last_probe.clone();
            return self.report(job.active(probe, Verdict::Inconclusive, None));
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
        if let Some(deadline) = job.deadline {
            self.timers.set(Timer::LoadDeadline, deadline.max(now));
        }
        self.report(job.report(Stage::Fetching));
        self.act(Action::Fetch(Box::new(FetchOrder {
            order: job.order,
            version: job.to,
            sources: job.sources.clone(),
            directory: job.directory.clone(),
            bytes: job.bytes,
        })));
        self.loader.state = LoadState::Fetching(job);
    }

    pub(super) fn fetch_progressed(&mut self, order: u64, bytes: u64) {
        let LoadState::Fetching(job) = &self.loader.state else { return };
        if job.order == order {
            self.report(pb::LoadState { bytes, ..job.report(Stage::Fetching) });
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
        let paused_ones_too = !matches!(job.on_running, OnRunning::Continue | OnRunning::Unspecified);
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
            let why = "its log-probabilities differ from a replica's at the same version".to_owned();
            let report = pb::LoadState {
                probe: Some(wire(&probe, verdict)),
                ..job.report(Stage::Probing)
            };
            self.report(report);
            return self.go_back(now, job, why);
        }
        self.activate(now, job, staged, probe, verdict);
    }

    fn activate(&mut self, now: Now, job: Job, staged: Staged, probe: ProbeResult, verdict: Verdict) {
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

// === impl Job ===

impl Job {
    fn parse(now: Now, load: pb::Load) -> Result<Job, Box<pb::LoadState>> {
        let order = load.order;
        let on_running = load.on_running();
        let to = match load.version.clone().map(Version::try_from) {
            Some(Ok(version)) => version,
            bad => {
                let error = match bad {
                    Some(Err(error)) => error.to_string(),
                    _ => "the order names no version".to_owned(),
                };
                let failed = pb::LoadState {
                    order,
                    version: load.version,
                    stage: Stage::Failed.into(),
                    error,
                    ..Default::default()
                };
                return Err(Box::new(failed));
            }
        };
        let deadline = Duration::from_millis(load.deadline_ms.into());
        Ok(Job {
            order,
            to,
            on_running,
            deadline: (load.deadline_ms > 0).then(|| now + deadline),
            deadline_ms: load.deadline_ms,
            bytes: load.bytes,
            sources: load.sources,
            directory: Some(load.directory).filter(|path| !path.is_empty()).map(PathBuf::from),
            reference: load.reference.filter(|probe| !probe.ids.is_empty()),
        })
    }

    fn report(&self, stage: Stage) -> pb::LoadState {
        pb::LoadState {
            order: self.order,
            version: Some(self.to.into()),
            stage: stage.into(),
            ..Default::default()
        }
    }

    fn failed(&self, error: String) -> pb::LoadState {
        pb::LoadState { error, ..self.report(Stage::Failed) }
    }

    fn active(
        &self,
        probe: Option<ProbeResult>,
        verdict: Verdict,
        staged: Option<&Staged>,
    ) -> pb::LoadState {
        pb::LoadState {
            probe: probe.map(|probe| wire(&probe, verdict)),
            bytes: staged.map_or(0, |staged| staged.bytes),
            holds: staged.is_some_and(|staged| staged.holds),
            fetched_from: staged
                .map(|staged| staged.from.clone().into_iter().collect())
                .unwrap_or_default(),
            ..self.report(Stage::Active)
        }
    }
}

fn wire(probe: &ProbeResult, verdict: Verdict) -> pb::Probe {
    pb::Probe {
        ids: probe.ids.clone(),
        logprobs: probe.logprobs.clone(),
        verdict: verdict.into(),
    }
}

fn verdict(
    probe: &ProbeResult,
    reference: Option<&pb::Probe>,
    before: Option<&ProbeResult>,
) -> Verdict {
    if let Some(reference) = reference {
        let agrees = same(probe, &reference.ids, &reference.logprobs);
        return if agrees { Verdict::Agrees } else { Verdict::Disagrees };
    }
    match before {
        Some(before) if *before == *probe => Verdict::Inconclusive,
        _ => Verdict::First,
    }
}

/// Compares up to the first differing id: there the two must have been a tie.
fn same(probe: &ProbeResult, ids: &[u32], logprobs: &[f32]) -> bool {
    if probe.ids.len() != ids.len() || probe.logprobs.len() != logprobs.len() {
        return false;
    }
    let rows = probe.ids.iter().zip(ids).zip(probe.logprobs.iter().zip(logprobs));
    for ((ours, theirs), (our_logprob, their_logprob)) in rows {
        // A NaN is near nothing.
        let near = (our_logprob - their_logprob).abs() <= TOLERANCE;
        if !near {
            return false;
        }
        if ours != theirs {
            return true;
        }
    }
    true
}
