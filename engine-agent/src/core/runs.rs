//! The samples on this engine: `impl Core` for starting, counting and ending them. Every token passes
//! [`Core::tokens`], where it gets its offset and its version.
//!
//! ```text
//!   Start ──► Held ──► Running ──► (terminal chunk) ──► ended
//!              ▲         │   ├──► Stopping ─────────────► ended: aborted
//!              │         │   └──► Discarding ───────────► gone, nothing is reported
//!              └── Cut ◄─┴ Cutting    (a load: ends the request, keeps the sample)
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, SampleId, Version, tokens};
use anabranch_runtime::Now;

use super::action::Action;
use super::event::RunEnd;
use super::outbox::Place;
use super::{AgentState, Core, Memory};
use crate::engine::{Chunk, Finish, Generate, LabelSpan, RunId, StreamError};

#[derive(Default)]
pub(super) struct Runs {
    by_run: BTreeMap<RunId, Run>,
    /// The attempt that counts; discarded runs are not in it.
    by_sample: BTreeMap<SampleId, RunId>,
    next: u64,
}

struct Run {
    sample: SampleId,
    attempt: Attempt,
    prompt: Arc<[u32]>,
    sampling: Arc<pb::Sampling>,
    stop_ids: Arc<[u32]>,
    adapter: String,
    seed: Option<u64>,
    /// Kept tokens, then those made here.
    tail: Vec<u32>,
    kept: u32,
    /// Length of `tail` when the present request was sent: its first token's offset.
    leg_at: u32,
    legs: u32,
    stage: Stage,
    /// A version boundary lies before or in the next chunk, and this engine cannot say where.
    boundary: bool,
    /// The engine would run past these: it ignores stop ids together with EOS.
    own_stops: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// A load is under way: not at the engine yet.
    Held,
    Running,
    Stopping,
    Discarding,
    Cutting,
    /// Its request ended for a load; it goes on after.
    Cut,
}

/// What a stream task does after it handed over a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    GoOn,
    /// Nobody waits for it any more: close the connection.
    Drop,
}

// === impl Runs ===

impl Runs {
    /// Samples that count, wherever they stand.
    pub fn live(&self) -> usize {
        self.by_sample.len()
    }

    /// Requests at the engine, also those that are being ended.
    pub fn at_engine(&self) -> usize {
        self.by_run.values().filter(|run| run.stage.at_engine()).count()
    }

    pub fn waiting(&self) -> usize {
        self.by_run.len() - self.at_engine()
    }

    pub fn is_empty(&self) -> bool {
        self.by_run.is_empty()
    }

    pub fn held(&self) -> impl Iterator<Item = pb::Held> {
        self.by_sample.values().filter_map(|run| self.by_run.get(run)).map(|run| pb::Held {
            sample: Some(run.sample.into()),
            attempt: run.attempt.0,
            upto: run.upto(),
        })
    }

    fn insert(&mut self, run: Run) -> RunId {
        self.next += 1;
        let id = RunId(self.next);
        self.by_sample.insert(run.sample, id);
        self.by_run.insert(id, run);
        id
    }

    fn remove(&mut self, id: RunId) -> Option<Run> {
        let run = self.by_run.remove(&id)?;
        if self.by_sample.get(&run.sample) == Some(&id) {
            self.by_sample.remove(&run.sample);
        }
        Some(run)
    }

    fn ids(&self, want: impl Fn(&Run) -> bool) -> Vec<RunId> {
        self.by_run.iter().filter(|(_, run)| want(run)).map(|(id, _)| *id).collect()
    }
}

impl Stage {
    fn at_engine(self) -> bool {
        match self {
            Stage::Running | Stage::Stopping | Stage::Discarding | Stage::Cutting => true,
            Stage::Held | Stage::Cut => false,
        }
    }
}

// === impl Run ===

impl Run {
    fn upto(&self) -> u32 {
        u32::try_from(self.tail.len()).expect("bounded by the context length")
    }

    fn made(&self) -> u32 {
        self.upto() - self.kept
    }

    fn rid(&self) -> String {
        let (group, index) = (self.sample.group.0, self.sample.index);
        format!("ab-{group:016x}-{index:08x}-{:08x}-{:04x}", self.attempt.0, self.legs)
    }

    fn end(&self, why: Why, matched: String) -> pb::End {
        pb::End {
            sample: Some(self.sample.into()),
            attempt: self.attempt.0,
            at: self.upto(),
            why: why.into(),
            matched,
            prompt_tokens: 0,
            cached_tokens: 0,
        }
    }

    /// It can go on as a new request without a trace: nothing of its state is only in the engine.
    fn can_be_cut(&self) -> bool {
        let sampling = &self.sampling;
        sampling.stop_strings.is_empty()
            && sampling.extra.is_empty()
            && sampling.presence_penalty == 0.0
            && sampling.frequency_penalty == 0.0
    }

    /// What its tokens already say, whatever its stream did.
    fn finished_by_tokens(&self) -> Option<Why> {
        let made = self.made();
        let stops = !self.stop_ids.is_empty() && made >= self.sampling.min_tokens.max(1);
        if stops && self.tail.last().is_some_and(|last| self.stop_ids.contains(last)) {
            return Some(Why::StopId);
        }
        (made >= self.sampling.max_tokens).then_some(Why::Length)
    }

    /// How many of `fresh` count: up to the first stop id, where the engine does not look for them.
    fn own_stop(&self, fresh: &[u32]) -> Option<usize> {
        if !self.own_stops {
            return None;
        }
        let needed = self.sampling.min_tokens.saturating_sub(self.made()).max(1) as usize;
        let at = fresh.iter().skip(needed - 1).position(|token| self.stop_ids.contains(token))?;
        Some(needed - 1 + at + 1)
    }
}

// === impl Core ===

impl Core {
    /// What a stream brought. The hot path: some 100 ns beside the copy.
    pub fn tokens(&mut self, now: Now, id: RunId, chunk: &Chunk) -> Verdict {
        let Some(run) = self.runs.by_run.get(&id) else { return Verdict::Drop };
        if run.stage == Stage::Discarding {
            return Verdict::GoOn;
        }
        if self.loader.holds_back() {
            self.loader.hold_back(id, chunk);
            return Verdict::GoOn;
        }
        if self.is_foreign(&chunk.label) {
            self.foreign_weights(now, id, &chunk.label);
            return Verdict::Drop;
        }
        self.take_tokens(now, id, &chunk.tokens, &chunk.logprobs, &chunk.spans);
        self.arm_tick(now);
        Verdict::GoOn
    }

    /// Made by weights that nobody loaded through this agent: the engine was restarted under it.
    fn is_foreign(&self, label: &str) -> bool {
        !label.is_empty()
            && !self.config.weights_by_trainer
            && self.loader.settled_label().is_some_and(|known| known != label)
    }

    fn foreign_weights(&mut self, now: Now, id: RunId, label: &str) {
        let why = format!("the engine has other weights than were loaded: {label:?}");
        tracing::warn!(why, "dropped its tokens");
        let Some(run) = self.runs.remove(id) else { return };
        if run.stage != Stage::Discarding {
            self.outbox.end(now, run.end(Why::Lost, why));
        }
        self.act(Action::CheckEngine);
        self.arm_tick(now);
    }

    pub(super) fn take_tokens(
        &mut self,
        now: Now,
        id: RunId,
        fresh: &[u32],
        logprobs: &[f32],
        spans: &[LabelSpan],
    ) {
        let Some(run) = self.runs.by_run.get_mut(&id) else { return };
        let stop = run.own_stop(fresh);
        let count = stop.unwrap_or(fresh.len());
        let (fresh, logprobs) = (&fresh[..count], &logprobs[..count]);
        self.engine_tokens += fresh.len() as u64;
        let place = Place {
            sample: run.sample,
            attempt: run.attempt,
            offset: run.upto(),
            version: self.loader.serving().unwrap_or_else(|| Version::base(0)),
            inexact: run.boundary && !fresh.is_empty(),
        };
        if run.boundary && !spans.is_empty() {
            let leg_offset = place.offset - run.leg_at;
            for (range, version) in self.loader.place(spans, leg_offset, fresh.len()) {
                let offset = place.offset + range.start as u32;
                let place = Place { offset, version, inexact: false, ..place };
                self.outbox.append(now, &place, &fresh[range.clone()], &logprobs[range]);
            }
        } else {
            self.outbox.append(now, &place, fresh, logprobs);
        }
        run.boundary &= fresh.is_empty();
        run.tail.extend_from_slice(fresh);
        if stop.is_some() {
            self.close_run(now, id, Why::StopId, String::new());
        }
    }

    pub(super) fn run_ended(&mut self, now: Now, id: RunId, end: RunEnd) {
        if self.loader.holds_back() {
            self.loader.hold_back_end(id, end);
            return;
        }
        let Some(run) = self.runs.by_run.get_mut(&id) else { return };
        let aborted = matches!(end, RunEnd::Finished { finish: Finish::Aborted, .. });
        if run.stage == Stage::Cutting && aborted && run.finished_by_tokens().is_none() {
            run.stage = Stage::Cut;
            return;
        }
        if let RunEnd::Failed(StreamError::Broken { .. } | StreamError::Unreachable { .. }) = &end {
            self.act(Action::CheckEngine);
        }
        let Some(run) = self.runs.remove(id) else { return };
        if run.stage == Stage::Discarding {
            return;
        }
        let end = closing(&run, end);
        tracing::debug!(sample = %run.sample, attempt = run.attempt.0, at = end.at, why = end.why, matched = end.matched, "sample ended here");
        self.outbox.end(now, end);
    }

    pub(super) fn start(&mut self, now: Now, start: pb::Start) {
        let Some(sample) = start.sample.map(SampleId::from) else {
            tracing::warn!("a Start without a sample: ignored");
            return;
        };
        let attempt = Attempt(start.attempt);
        if !self.fence_older(sample, attempt) {
            return;
        }
        match self.admit(&start) {
            Ok(prompt) => self.begin(sample, attempt, prompt, start),
            Err((why, text)) => {
                tracing::debug!(%sample, start.attempt, text, "not started");
                self.outbox.end(now, pb::End {
                    sample: start.sample,
                    attempt: start.attempt,
                    at: start.offset,
                    why: why.into(),
                    matched: text,
                    ..Default::default()
                });
            }
        }
    }

    /// A newer attempt ends the older one without a word. False: this one is not newer.
    fn fence_older(&mut self, sample: SampleId, attempt: Attempt) -> bool {
        let Some(id) = self.runs.by_sample.get(&sample).copied() else { return true };
        let known = self.runs.by_run.get(&id).map_or(Attempt(0), |run| run.attempt);
        if known >= attempt {
            tracing::debug!(%sample, attempt = attempt.0, known = known.0, "a Start that is not newer: ignored");
            return false;
        }
        self.discard(id);
        true
    }

    /// Everything that can be said against a sample before the engine sees it.
    fn admit(&self, start: &pb::Start) -> Result<Arc<[u32]>, (Why, String)> {
        let busy = |text: &str| Err((Why::Busy, text.to_owned()));
        let Some(engine) = &self.engine else { return busy("the engine is down") };
        match self.state {
            AgentState::Serving => {}
            AgentState::Booting => return busy("the engine is starting"),
            AgentState::Draining(_) | AgentState::Stopped => return busy("the agent is draining"),
        }
        if !matches!(self.memory, Memory::Held) {
            return busy("the engine's memory is released");
        }
        if self.loader.serving().is_none() && !self.config.weights_by_trainer {
            return busy("the engine has no weights yet");
        }
        if self.outbox.bytes() > self.config.buffer_bytes {
            return busy("the agent's buffer is full");
        }
        if let Some(text) = self.outside_window(start) {
            return Err((Why::Busy, text));
        }
        let Some(prompt) = self.prompts.get(start.prompt) else {
            return Err((Why::Busy, format!("prompt {:016x} is not here", start.prompt)));
        };
        refusal(&engine.model, &prompt, start).map_or(Ok(prompt), |text| Err((Why::Refused, text)))
    }

    fn outside_window(&self, start: &pb::Start) -> Option<String> {
        let serving = self.loader.next_serving().unwrap_or_else(|| self.serving_version());
        let bound = |version: &Option<pb::Version>| {
            version.clone().and_then(|version| Version::try_from(version).ok())
        };
        let below = bound(&start.min_version).filter(|min| serving.number < min.number);
        if let Some(min) = below {
            return Some(format!("serves {serving}, the sample needs {min} or newer"));
        }
        let above = bound(&start.max_version).filter(|max| serving.number > max.number)?;
        Some(format!("serves {serving}, the sample needs {above} or older"))
    }

    fn begin(&mut self, sample: SampleId, attempt: Attempt, prompt: Arc<[u32]>, start: pb::Start) {
        let seeded = self.engine.as_ref().is_some_and(|engine| {
            engine.caps.seed_keying() != pb::caps::SeedKeying::None
        });
        let sampling = start.sampling.unwrap_or_default();
        let tail: Vec<u32> = tokens::ids(&start.kept).collect();
        let run = Run {
            sample,
            attempt,
            prompt,
            own_stops: sampling.ignore_eos && !start.stop_ids.is_empty(),
            sampling: Arc::new(sampling),
            stop_ids: start.stop_ids.into(),
            adapter: start.adapter,
            seed: seeded.then_some(start.seed),
            kept: start.offset,
            leg_at: start.offset,
            tail,
            legs: 0,
            stage: Stage::Held,
            boundary: false,
        };
        let id = self.runs.insert(run);
        if !self.loader.is_loading() {
            self.send_to_engine(id);
        }
    }

    /// Held and cut samples go on.
    pub(super) fn release_held(&mut self, now: Now) {
        for id in self.runs.ids(|run| matches!(run.stage, Stage::Held | Stage::Cut)) {
            let finished = self.runs.by_run.get(&id).and_then(Run::finished_by_tokens);
            match finished {
                Some(why) => self.end_now(now, id, why, String::new()),
                None => self.send_to_engine(id),
            }
        }
    }

    fn send_to_engine(&mut self, id: RunId) {
        let context = self.engine.as_ref().map_or(0, |engine| engine.model.max_context);
        let Some(run) = self.runs.by_run.get_mut(&id) else { return };
        run.stage = Stage::Running;
        run.legs += 1;
        run.leg_at = run.upto();
        run.boundary = false;
        let made = run.made();
        let input = u32::try_from(run.prompt.len() + run.tail.len()).unwrap_or(u32::MAX);
        let room = match context {
            0 => u32::MAX,
            context => context.saturating_sub(input),
        };
        let generate = Generate {
            run: id,
            rid: run.rid(),
            prompt: run.prompt.clone(),
            tail: run.tail.clone(),
            sampling: run.sampling.clone(),
            max_tokens: run.sampling.max_tokens.saturating_sub(made).min(room),
            min_tokens: run.sampling.min_tokens.saturating_sub(made),
            stop_ids: run.stop_ids.clone(),
            seed: run.seed,
            adapter: run.adapter.clone(),
        };
        self.act(Action::Generate(Box::new(generate)));
    }

    pub(super) fn stop(&mut self, now: Now, stop: pb::Stop) {
        let Some(sample) = stop.sample.map(SampleId::from) else { return };
        let Some(id) = self.runs.by_sample.get(&sample).copied() else { return };
        if self.runs.by_run.get(&id).is_some_and(|run| run.attempt.0 == stop.attempt) {
            self.abort(now, id, &stop.why);
        }
    }

    /// Ends as `aborted`: at once if the engine has no request of it, else with its terminal chunk.
    fn abort(&mut self, now: Now, id: RunId, why: &str) {
        let Some(run) = self.runs.by_run.get_mut(&id) else { return };
        match run.stage {
            Stage::Held | Stage::Cut => self.end_now(now, id, Why::Aborted, why.to_owned()),
            Stage::Cutting => run.stage = Stage::Stopping,
            Stage::Running => {
                run.stage = Stage::Stopping;
                let rid = run.rid();
                self.act(Action::Abort { run: id, rid });
            }
            Stage::Stopping | Stage::Discarding => {}
        }
    }

    pub(super) fn abort_all(&mut self, now: Now, why: &str) {
        for id in self.runs.ids(|_| true) {
            self.abort(now, id, why);
        }
    }

    /// For a load: every request that can go on as a new one is ended. The rest stay, to be paused.
    pub(super) fn cut_runs(&mut self) {
        for id in self.runs.ids(|run| run.stage == Stage::Running && run.can_be_cut()) {
            let Some(run) = self.runs.by_run.get_mut(&id) else { continue };
            run.stage = Stage::Cutting;
            let rid = run.rid();
            self.act(Action::Abort { run: id, rid });
        }
    }

    /// Requests that a load still waits for; with `all`, also those that would be paused.
    pub(super) fn unquiet(&self, all: bool) -> usize {
        let counts = |run: &&Run| match run.stage {
            Stage::Held | Stage::Cut => false,
            Stage::Running => all,
            Stage::Stopping | Stage::Discarding | Stage::Cutting => true,
        };
        self.runs.by_run.values().filter(counts).count()
    }

    /// New weights lie under streams that were only paused: where exactly, the engine says at their end.
    pub(super) fn mark_boundaries(&mut self) {
        for run in self.runs.by_run.values_mut() {
            run.boundary |= run.stage.at_engine();
        }
    }

    /// Reported now; what its stream still brings is dropped.
    fn close_run(&mut self, now: Now, id: RunId, why: Why, matched: String) {
        let Some(run) = self.runs.by_run.get(&id) else { return };
        let end = run.end(why, matched);
        self.outbox.end(now, end);
        self.discard(id);
    }

    fn end_now(&mut self, now: Now, id: RunId, why: Why, matched: String) {
        let Some(run) = self.runs.remove(id) else { return };
        self.outbox.end(now, run.end(why, matched));
    }

    /// No report; its request ends at the engine, and until then it counts as running there.
    fn discard(&mut self, id: RunId) {
        let Some(run) = self.runs.by_run.get_mut(&id) else { return };
        self.runs.by_sample.remove(&run.sample);
        match run.stage {
            Stage::Held | Stage::Cut => {
                self.runs.by_run.remove(&id);
            }
            Stage::Running => {
                run.stage = Stage::Discarding;
                let rid = run.rid();
                self.act(Action::Abort { run: id, rid });
            }
            Stage::Stopping | Stage::Cutting => run.stage = Stage::Discarding,
            Stage::Discarding => {}
        }
    }

    pub(super) fn discard_runs(&mut self, want: impl Fn(SampleId, Attempt) -> bool) -> usize {
        let ids: Vec<RunId> = self.runs.by_sample.values().copied().collect();
        let wanted = |id: &RunId| {
            self.runs.by_run.get(id).is_some_and(|run| want(run.sample, run.attempt))
        };
        let ids: Vec<RunId> = ids.into_iter().filter(wanted).collect();
        ids.iter().for_each(|id| self.discard(*id));
        ids.len()
    }

    /// The buffer is full: the newest samples have the least to lose. Never stops reading the engine.
    pub(super) fn shed(&mut self, now: Now) {
        let live: Vec<RunId> = self.runs.by_sample.values().copied().collect();
        let mut ids = live;
        ids.sort_unstable();
        let shed = ids.len().div_ceil(8);
        for id in ids.into_iter().rev().take(shed) {
            self.close_run(now, id, Why::Busy, "the agent's buffer is full".to_owned());
        }
        tracing::warn!(shed, bytes = self.outbox.bytes(), "unacknowledged ticks fill the buffer; gave back the newest samples");
    }

    pub(super) fn lose_all_runs(&mut self, now: Now, why: &str) {
        self.loader.drop_held_back();
        for id in self.runs.ids(|_| true) {
            let Some(run) = self.runs.remove(id) else { continue };
            match run.stage {
                Stage::Discarding => {}
                Stage::Held => self.outbox.end(now, run.end(Why::Busy, why.to_owned())),
                _ => self.outbox.end(now, run.end(Why::Lost, why.to_owned())),
            }
            self.act(Action::DropStream { run: id });
        }
    }

    /// A load went wrong after the streams went on: what they made since was not sent, and must not be.
    pub(super) fn abort_unverified(&mut self, now: Now, why: &str) {
        self.loader.drop_held_back();
        for id in self.runs.ids(|run| run.stage.at_engine() && run.stage != Stage::Discarding) {
            self.close_run(now, id, Why::Aborted, why.to_owned());
        }
    }
}

/// Why the engine must not see it: the same would be refused elsewhere.
fn refusal(model: &pb::Model, prompt: &[u32], start: &pb::Start) -> Option<String> {
    if !tokens::is_column(&start.kept) || start.kept.len() / tokens::WIDTH != start.offset as usize {
        let bytes = start.kept.len();
        return Some(format!("{bytes} bytes of kept tokens do not make {} tokens", start.offset));
    }
    if start.sampling.as_ref().is_none_or(|sampling| sampling.max_tokens == 0) {
        return Some("max_tokens is 0: nothing is left to generate".to_owned());
    }
    let all = prompt.iter().copied().chain(tokens::ids(&start.kept));
    let length = prompt.len() + start.offset as usize;
    if length == 0 {
        return Some("the prompt is empty".to_owned());
    }
    let vocab = if model.vocab == 0 { u32::MAX } else { model.vocab };
    if let Some((at, id)) = all.enumerate().find(|(_, id)| *id >= vocab) {
        return Some(format!("token {id} at position {at} is outside the vocabulary of {vocab}"));
    }
    if model.max_context > 0 && length >= model.max_context as usize {
        let context = model.max_context;
        return Some(format!("{length} tokens leave no room in the context of {context}"));
    }
    None
}

fn closing(run: &Run, end: RunEnd) -> pb::End {
    let (why, matched) = match end {
        RunEnd::Finished { finish, prompt_tokens, cached_tokens } => {
            let (why, matched) = finished(run, finish);
            return pb::End { prompt_tokens, cached_tokens, ..run.end(why, matched) };
        }
        RunEnd::Failed(error @ StreamError::Refused { .. }) => (Why::Refused, error.to_string()),
        RunEnd::Failed(error @ StreamError::Unreachable { .. }) => (Why::Busy, error.to_string()),
        RunEnd::Failed(error) => (Why::Lost, error.to_string()),
    };
    run.end(why, matched)
}

fn finished(run: &Run, finish: Finish) -> (Why, String) {
    match finish {
        Finish::StopId => (Why::StopId, String::new()),
        Finish::StopString(text) => (Why::StopString, text),
        Finish::Length => (Why::Length, String::new()),
        Finish::Aborted => match (run.finished_by_tokens(), run.stage) {
            (Some(why), _) => (why, String::new()),
            (None, Stage::Stopping) => (Why::Aborted, String::new()),
            (None, _) => (Why::Lost, "the engine aborted it unasked".to_owned()),
        },
    }
}
