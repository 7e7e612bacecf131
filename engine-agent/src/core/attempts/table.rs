//! The table of attempts on this engine, and what one attempt knows of itself. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, SampleId, Sampling, Version, tokens};

use crate::core::check_edge;
use crate::engine::AttemptId;

/// All attempts whose request may still be at the engine, or that wait for a load.
#[derive(Default)]
pub struct Attempts {
    /// Every attempt, discarded ones included.
    pub by_id: BTreeMap<AttemptId, LiveAttempt>,
    /// The newest attempt of each sample; discarded attempts are not in this index.
    pub by_sample: BTreeMap<SampleId, AttemptId>,
    next: u64,
}

/// One attempt at one sample on this engine: its input, its tokens, its state.
pub struct LiveAttempt {
    /// The sample that the tokens belong to.
    pub sample: SampleId,
    /// Number of the attempt within its sample, from 1, given by the manager.
    pub number: Attempt,
    /// Token ids of the prompt.
    pub prompt: Arc<[u32]>,
    /// Sampling settings of the whole sample, not of the remaining part.
    pub sampling: Arc<Sampling>,
    /// Token ids that end the sample.
    pub stop_ids: Arc<[u32]>,
    /// Seed for the engine; `None` if the engine ignores seeds.
    pub seed: Option<u64>,
    /// Tokens of the partial rollout that the manager sent, then those generated here.
    pub tail: Vec<u32>,
    /// Length of the partial rollout at the start of this attempt, in tokens.
    pub kept: u32,
    /// Length of `tail` when the present request was sent: the offset of the request's first token.
    pub request_offset: u32,
    /// Requests sent for this attempt; more than one after a load cut the attempt.
    pub requests: u32,
    state: AttemptState,
    /// A version boundary lies before or in the next chunk, and the engine has not said where.
    pub boundary: bool,
    /// The agent looks for stop ids itself: the engine ignores them together with EOS.
    pub own_stops: bool,
    /// The version that the trainer attested; set only if the trainer loads the engine.
    pub attested: Option<Version>,
}

/// State of an attempt.
///
/// ```text
///   Waiting ──► Running ──┬─────────► Stopping ──┐
///                ▲   │    │             ▲        ▼
///                │   │    └─────────────┼──► Discarding
///                │   ▼                  │        ▲
///               Cut ◄──── Cutting ──────┴────────┘
/// ```
///
/// An attempt in any state ends by its removal from [`Attempts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttemptState {
    /// Not sent to the engine yet: a load is under way.
    Waiting,
    /// A request is at the engine.
    Running,
    /// An abort was sent; the terminal chunk ends the attempt as `aborted`.
    Stopping,
    /// An abort was sent; nothing of the attempt is reported any more.
    Discarding,
    /// An abort was sent because of a load; the attempt continues after the load.
    Cutting,
    /// The request ended because of a load; a new request follows after the load.
    Cut,
}

// === impl Attempts ===

impl Attempts {
    /// Number of attempts that count: one for each sample, whatever its state.
    pub fn live(&self) -> usize {
        self.by_sample.len()
    }

    /// Number of requests at the engine, including those that are being aborted.
    pub fn at_engine(&self) -> usize {
        self.by_id.values().filter(|attempt| attempt.state.at_engine()).count()
    }

    /// Number of attempts without a request at the engine.
    pub fn waiting(&self) -> usize {
        self.by_id.len() - self.at_engine()
    }

    /// True if no attempt is left, discarded ones included.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Every attempt that counts, as the Hello of a re-attach names it.
    pub fn held(&self) -> impl Iterator<Item = pb::Held> {
        self.by_sample.values().filter_map(|attempt| self.by_id.get(attempt)).map(|attempt| {
            pb::Held {
                sample: Some(attempt.sample.into()),
                attempt: attempt.number.0,
                upto: attempt.upto(),
            }
        })
    }

    /// Adds an attempt; a sample is indexed by its newest attempt.
    pub fn insert(&mut self, attempt: LiveAttempt) -> AttemptId {
        self.next += 1;
        let id = AttemptId(self.next);
        self.by_sample.insert(attempt.sample, id);
        self.by_id.insert(id, attempt);
        id
    }

    /// Takes an attempt out of the table and, if it counted, out of the index.
    pub fn remove(&mut self, id: AttemptId) -> Option<LiveAttempt> {
        let attempt = self.by_id.remove(&id)?;
        if self.by_sample.get(&attempt.sample) == Some(&id) {
            self.by_sample.remove(&attempt.sample);
        }
        Some(attempt)
    }

    /// Ids of the attempts that `want` selects, oldest first.
    pub fn ids(&self, want: impl Fn(&LiveAttempt) -> bool) -> Vec<AttemptId> {
        self.by_id.iter().filter(|(_, attempt)| want(attempt)).map(|(id, _)| *id).collect()
    }
}

// === impl AttemptState ===

impl AttemptState {
    /// True if the graph has an edge from this state to `next`.
    pub fn may_become(self, next: AttemptState) -> bool {
        use AttemptState::{Cut, Cutting, Discarding, Running, Stopping, Waiting};
        matches!(
            (self, next),
            (Waiting | Cut, Running)
                | (Running, Stopping | Discarding | Cutting)
                | (Cutting, Stopping | Discarding | Cut)
                | (Stopping, Discarding)
        )
    }

    /// True while a request of the attempt is at the engine.
    pub fn at_engine(self) -> bool {
        match self {
            AttemptState::Running
            | AttemptState::Stopping
            | AttemptState::Discarding
            | AttemptState::Cutting => true,
            AttemptState::Waiting | AttemptState::Cut => false,
        }
    }
}

// === impl LiveAttempt ===

impl LiveAttempt {
    /// An attempt in state [`AttemptState::Waiting`], as the manager ordered it.
    pub fn new(
        sample: SampleId,
        (prompt, sampling): (Arc<[u32]>, Sampling),
        seed: Option<u64>,
        attested: Option<Version>,
        start: pb::Start,
    ) -> LiveAttempt {
        LiveAttempt {
            sample,
            number: Attempt(start.attempt),
            prompt,
            own_stops: sampling.ignore_eos && !start.stop_ids.is_empty(),
            sampling: Arc::new(sampling),
            stop_ids: start.stop_ids.into(),
            seed,
            tail: tokens::ids(&start.kept).collect(),
            kept: start.offset,
            request_offset: start.offset,
            requests: 0,
            state: AttemptState::Waiting,
            boundary: false,
            attested,
        }
    }

    /// The present state; [`LiveAttempt::set_state`] changes it.
    pub fn state(&self) -> AttemptState {
        self.state
    }

    /// Assigns the state; no other code does.
    pub fn set_state(&mut self, next: AttemptState) {
        check_edge("attempt", self.state.may_become(next), &self.state, &next);
        self.state = next;
    }

    /// Tokens of the sample so far: partial rollout and tokens generated here.
    pub fn upto(&self) -> u32 {
        u32::try_from(self.tail.len()).expect("bounded by the context length")
    }

    /// Tokens generated by this attempt.
    pub fn made(&self) -> u32 {
        self.upto() - self.kept
    }

    /// Request id at the engine. Fixed width, so that no id is a prefix of another.
    pub fn rid(&self) -> String {
        let (group, index) = (self.sample.group.0, self.sample.index);
        format!("ab-{group:016x}-{index:08x}-{:08x}-{:04x}", self.number.0, self.requests)
    }

    /// The end of the attempt as reported to the manager, at its present length.
    pub fn end(&self, why: Why, matched: String) -> pb::End {
        pb::End {
            sample: Some(self.sample.into()),
            attempt: self.number.0,
            at: self.upto(),
            why: why.into(),
            matched,
            prompt_tokens: 0,
            cached_tokens: 0,
        }
    }

    /// True if the attempt can continue as a new request: no state of it exists only in the engine.
    pub fn can_be_cut(&self) -> bool {
        let sampling = &self.sampling;
        sampling.stop_strings.is_empty()
            && sampling.extra.is_empty()
            && sampling.presence_penalty == 0.0
            && sampling.frequency_penalty == 0.0
    }

    /// The end that the tokens themselves prove, whatever became of the stream.
    pub fn finished_by_tokens(&self) -> Option<Why> {
        let made = self.made();
        let stops = !self.stop_ids.is_empty() && made >= self.sampling.min_tokens.max(1);
        if stops && self.tail.last().is_some_and(|last| self.stop_ids.contains(last)) {
            return Some(Why::StopId);
        }
        (made >= self.sampling.max_tokens).then_some(Why::Length)
    }

    /// Number of tokens of `fresh` up to and including the first stop id, if the agent looks for
    /// stop ids.
    pub fn own_stop(&self, fresh: &[u32]) -> Option<usize> {
        if !self.own_stops {
            return None;
        }
        let needed = self.sampling.min_tokens.saturating_sub(self.made()).max(1) as usize;
        let at = fresh.iter().skip(needed - 1).position(|token| self.stop_ids.contains(token))?;
        Some(needed - 1 + at + 1)
    }
}
