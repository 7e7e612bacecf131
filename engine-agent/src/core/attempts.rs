//! Attempts on this engine: `impl Core` for starting, counting and ending them. The graph is at
//! `AttemptState`; the tokens are counted in `tokens`.

use std::sync::Arc;

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, SampleId, Sampling, SeedKeying};
use anabranch_runtime::Now;

use super::Core;
use super::action::Action;
use super::event::RequestEnd;
use crate::engine::{AttemptId, Finish, Generate, StreamError};

mod admit;
mod ending;
mod table;
mod tokens;

pub(super) use table::AttemptState;
pub(super) use table::Attempts;
use table::LiveAttempt;
pub use tokens::AfterChunk;

// === impl Core ===

impl Core {
    /// Takes the end of a request: cut for a load, or the end of the attempt.
    pub(super) fn request_ended(&mut self, now: Now, id: AttemptId, end: RequestEnd) {
        if self.loader.withholds() {
            self.loader.withhold_end(id, end);
            return;
        }
        let Some(attempt) = self.attempts.by_id.get_mut(&id) else { return };
        let aborted = matches!(end, RequestEnd::Finished { finish: Finish::Aborted, .. });
        if attempt.state() == AttemptState::Cutting
            && aborted
            && attempt.finished_by_tokens().is_none()
        {
            attempt.set_state(AttemptState::Cut);
            return;
        }
        if let RequestEnd::Failed(StreamError::Broken { .. } | StreamError::Unreachable { .. }) =
            &end
        {
            self.act(Action::CheckEngine);
        }
        let Some(attempt) = self.attempts.remove(id) else { return };
        if attempt.state() == AttemptState::Discarding {
            return;
        }
        let end = closing(&attempt, end);
        tracing::debug!(sample = %attempt.sample, attempt = attempt.number.0, at = end.at, why = end.why, matched = end.matched, "sample ended here");
        self.outbox.end(now, end);
    }

    /// Starts an attempt, or answers why not.
    pub(super) fn start(&mut self, now: Now, start: pb::Start) {
        let Some(sample) = start.sample.map(SampleId::from) else {
            tracing::warn!("a Start without a sample: ignored");
            return;
        };
        let number = Attempt(start.attempt);
        if !self.fence_older(sample, number) {
            return;
        }
        match self.admit(&start) {
            Ok((prompt, sampling)) => self.begin(sample, prompt, sampling, start),
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

    /// Discards an older attempt at the same sample. False if the attempt `number` is not newer.
    fn fence_older(&mut self, sample: SampleId, number: Attempt) -> bool {
        let Some(id) = self.attempts.by_sample.get(&sample).copied() else { return true };
        let known = self.attempts.by_id.get(&id).map_or(Attempt(0), |attempt| attempt.number);
        if known >= number {
            tracing::debug!(%sample, attempt = number.0, known = known.0, "a Start that is not newer: ignored");
            return false;
        }
        self.discard(id);
        true
    }

    /// Adds an admitted attempt and sends its request, unless a load is under way.
    fn begin(
        &mut self,
        sample: SampleId,
        prompt: Arc<[u32]>,
        sampling: Sampling,
        start: pb::Start,
    ) {
        let seeded = self
            .engine
            .as_ref()
            .is_some_and(|engine| engine.caps.seed_keying != SeedKeying::Unkeyed);
        let attested = self.attested(&start);
        let seed = seeded.then_some(start.seed);
        let attempt = LiveAttempt::new(sample, (prompt, sampling), seed, attested, start);
        let id = self.attempts.insert(attempt);
        if !self.loader.is_loading() {
            self.send_to_engine(id);
        }
    }

    /// Sends a request for every attempt that waited for a load, with all its tokens.
    pub(super) fn send_waiting(&mut self, now: Now) {
        for id in self
            .attempts
            .ids(|attempt| matches!(attempt.state(), AttemptState::Waiting | AttemptState::Cut))
        {
            let finished = self.attempts.by_id.get(&id).and_then(LiveAttempt::finished_by_tokens);
            match finished {
                Some(why) => self.end_now(now, id, why, String::new()),
                None => self.send_to_engine(id),
            }
        }
    }

    /// Sends a request with prompt, partial rollout and the remaining budget.
    fn send_to_engine(&mut self, id: AttemptId) {
        let context = self.engine.as_ref().map_or(0, |engine| engine.model.max_context);
        let Some(attempt) = self.attempts.by_id.get_mut(&id) else { return };
        attempt.set_state(AttemptState::Running);
        attempt.requests += 1;
        attempt.request_offset = attempt.upto();
        attempt.boundary = false;
        let made = attempt.made();
        let input = u32::try_from(attempt.prompt.len() + attempt.tail.len()).unwrap_or(u32::MAX);
        let room = match context {
            0 => u32::MAX,
            context => context.saturating_sub(input),
        };
        let generate = Generate {
            attempt: id,
            rid: attempt.rid(),
            prompt: attempt.prompt.clone(),
            tail: attempt.tail.clone(),
            sampling: attempt.sampling.clone(),
            max_tokens: attempt.sampling.max_tokens.saturating_sub(made).min(room),
            min_tokens: attempt.sampling.min_tokens.saturating_sub(made),
            stop_ids: attempt.stop_ids.clone(),
            seed: attempt.seed,
        };
        self.act(Action::Generate(Box::new(generate)));
    }
}

/// The report on an attempt whose request ended.
fn closing(attempt: &LiveAttempt, end: RequestEnd) -> pb::End {
    let (why, matched) = match end {
        RequestEnd::Finished { finish, prompt_tokens, cached_tokens } => {
            let (why, matched) = finished(attempt, finish);
            return pb::End { prompt_tokens, cached_tokens, ..attempt.end(why, matched) };
        }
        RequestEnd::Failed(error @ StreamError::Refused { .. }) => {
            (Why::Refused, error.to_string())
        }
        RequestEnd::Failed(error @ StreamError::Unreachable { .. }) => {
            (Why::Busy, error.to_string())
        }
        RequestEnd::Failed(error) => (Why::Lost, error.to_string()),
    };
    attempt.end(why, matched)
}

/// Reason of an end by a terminal chunk.
fn finished(attempt: &LiveAttempt, finish: Finish) -> (Why, String) {
    match finish {
        Finish::StopId => (Why::StopId, String::new()),
        Finish::StopString(text) => (Why::StopString, text),
        Finish::Length => (Why::Length, String::new()),
        Finish::Aborted => match (attempt.finished_by_tokens(), attempt.state()) {
            (Some(why), _) => (why, String::new()),
            (None, AttemptState::Stopping) => (Why::Aborted, String::new()),
            (None, _) => (Why::Lost, "the engine aborted it unasked".to_owned()),
        },
    }
}
