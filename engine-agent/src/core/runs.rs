//! The samples on this engine: `impl Core` for starting, counting and ending them. Every token passes
//! [`Core::tokens`], where it gets its offset and its version.
//!
//! ```text
//!   Start ──► Held ──► Running ──► (terminal chunk) ──► ended
//!              ▲         │   ├──► Stopping ─────────────► ended: aborted
//!              │         │   └──► Discarding ───────────► gone, nothing is reported
//!              └── Cut ◄─┴ Cutting    (a load: ends the request, keeps the sample)
//! ```

use std::sync::Arc;

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, SampleId, Version, tokens};
use anabranch_runtime::Now;

use super::Core;
use super::action::Action;
use super::event::RunEnd;
use super::outbox::Place;
use crate::engine::{Chunk, Finish, Generate, LabelSpan, RunId, StreamError};

mod admit;
mod ending;
mod table;

pub(super) use table::Runs;
use table::{Run, Stage};

/// What a stream task does after it handed over a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    GoOn,
    /// Nobody waits for it any more: close the connection.
    Drop,
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
            version: run.attested.or(self.loader.serving()).unwrap_or_else(|| Version::base(0)),
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
                self.outbox.end(
                    now,
                    pb::End {
                        sample: start.sample,
                        attempt: start.attempt,
                        at: start.offset,
                        why: why.into(),
                        matched: text,
                        ..Default::default()
                    },
                );
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

    fn begin(&mut self, sample: SampleId, attempt: Attempt, prompt: Arc<[u32]>, start: pb::Start) {
        let seeded = self
            .engine
            .as_ref()
            .is_some_and(|engine| engine.caps.seed_keying() != pb::caps::SeedKeying::None);
        let attested = self.attested(&start);
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
            attested,
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
