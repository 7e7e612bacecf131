//! The hot path: every token passes [`Core::tokens`], where it gets its offset and its version.

use anabranch_proto::Version;
use anabranch_proto::pb::end::Why;
use anabranch_runtime::Now;

use super::table::AttemptState;
use crate::core::Core;
use crate::core::action::Action;
use crate::core::outbox::Segment;
use crate::engine::{AttemptId, Chunk, LabelSpan};

/// Order to a stream task after it handed over a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterChunk {
    /// Read on.
    Read,
    /// Close the connection: nobody waits for the stream any more.
    Close,
}

impl Core {
    /// Takes a chunk that a stream brought: a hot path of some 100 ns beside the copy.
    pub fn tokens(&mut self, now: Now, id: AttemptId, chunk: &Chunk) -> AfterChunk {
        let Some(attempt) = self.attempts.by_id.get(&id) else { return AfterChunk::Close };
        if attempt.state() == AttemptState::Discarding {
            return AfterChunk::Read;
        }
        if self.loader.withholds() {
            self.loader.withhold(id, chunk);
            return AfterChunk::Read;
        }
        if self.is_foreign(&chunk.label) {
            self.foreign_weights(now, id, &chunk.label);
            return AfterChunk::Close;
        }
        self.take_tokens(now, id, &chunk.tokens, &chunk.logprobs, &chunk.spans);
        self.arm_tick(now);
        AfterChunk::Read
    }

    /// True if a chunk was made by weights that nobody loaded through this agent: the engine was
    /// restarted under it.
    fn is_foreign(&self, label: &str) -> bool {
        !label.is_empty()
            && !self.config.weights_by_trainer
            && self.loader.settled_label().is_some_and(|known| known != label)
    }

    /// Ends an attempt whose tokens have no known version.
    fn foreign_weights(&mut self, now: Now, id: AttemptId, label: &str) {
        let why = format!("the engine has other weights than were loaded: {label:?}");
        tracing::warn!(why, "dropped its tokens");
        let Some(attempt) = self.attempts.remove(id) else { return };
        if attempt.state() != AttemptState::Discarding {
            self.outbox.end(now, attempt.end(Why::Lost, why));
        }
        self.act(Action::CheckEngine);
        self.arm_tick(now);
    }

    /// Gives tokens their offset and version and adds them to the outbox.
    pub(in crate::core) fn take_tokens(
        &mut self,
        now: Now,
        id: AttemptId,
        fresh: &[u32],
        logprobs: &[f32],
        spans: &[LabelSpan],
    ) {
        let Some(attempt) = self.attempts.by_id.get_mut(&id) else { return };
        let stop = attempt.own_stop(fresh);
        let count = stop.unwrap_or(fresh.len());
        let (fresh, logprobs) = (&fresh[..count], &logprobs[..count]);
        self.engine_tokens += fresh.len() as u64;
        let segment = Segment {
            sample: attempt.sample,
            attempt: attempt.number,
            offset: attempt.upto(),
            version: attempt.attested.or(self.loader.serving()).unwrap_or_else(|| Version::base(0)),
            inexact: attempt.boundary && !fresh.is_empty(),
        };
        if attempt.boundary && !spans.is_empty() {
            let offset_in_request = segment.offset - attempt.request_offset;
            for (range, version) in
                self.loader.split_by_version(spans, offset_in_request, fresh.len())
            {
                let offset = segment.offset + range.start as u32;
                let segment = Segment { offset, version, inexact: false, ..segment };
                self.outbox.append(now, &segment, &fresh[range.clone()], &logprobs[range]);
            }
        } else {
            self.outbox.append(now, &segment, fresh, logprobs);
        }
        attempt.boundary &= fresh.is_empty();
        attempt.tail.extend_from_slice(fresh);
        if stop.is_some() {
            self.close_attempt(now, id, Why::StopId, String::new());
        }
    }
}
