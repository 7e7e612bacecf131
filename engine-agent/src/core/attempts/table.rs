//! The table of samples on this engine, and what one of them knows of itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, SampleId, Version};

use crate::engine::AttemptId;

#[derive(Default)]
pub struct Attempts {
    pub by_id: BTreeMap<AttemptId, LiveAttempt>,
    /// The attempt that counts; discarded runs are not in it.
    pub by_sample: BTreeMap<SampleId, AttemptId>,
    pub next: u64,
}

pub struct LiveAttempt {
    pub sample: SampleId,
    pub number: Attempt,
    pub prompt: Arc<[u32]>,
    pub sampling: Arc<pb::Sampling>,
    pub stop_ids: Arc<[u32]>,
    pub adapter: String,
    pub seed: Option<u64>,
    /// Kept tokens, then those made here.
    pub tail: Vec<u32>,
    pub kept: u32,
    /// Length of `tail` when the present request was sent: its first token's offset.
    pub request_offset: u32,
    pub requests: u32,
    pub stage: AttemptState,
    /// A version boundary lies before or in the next chunk, and this engine cannot say where.
    pub boundary: bool,
    /// The engine would run past these: it ignores stop ids together with EOS.
    pub own_stops: bool,
    /// What the trainer attested, as the manager says: only where the trainer loads the engine.
    pub attested: Option<Version>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttemptState {
    /// A load is under way: not at the engine yet.
    Waiting,
    Running,
    Stopping,
    Discarding,
    Cutting,
    /// Its request ended for a load; it goes on after.
    Cut,
}

// === impl Runs ===

impl Attempts {
    /// Samples that count, wherever they stand.
    pub fn live(&self) -> usize {
        self.by_sample.len()
    }

    /// Requests at the engine, also those that are being ended.
    pub fn at_engine(&self) -> usize {
        self.by_id.values().filter(|attempt| attempt.stage.at_engine()).count()
    }

    pub fn waiting(&self) -> usize {
        self.by_id.len() - self.at_engine()
    }

    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    pub fn held(&self) -> impl Iterator<Item = pb::Held> {
        self.by_sample.values().filter_map(|attempt| self.by_id.get(attempt)).map(|attempt| {
            pb::Held {
                sample: Some(attempt.sample.into()),
                attempt: attempt.number.0,
                upto: attempt.upto(),
            }
        })
    }

    pub fn insert(&mut self, attempt: LiveAttempt) -> AttemptId {
        self.next += 1;
        let id = AttemptId(self.next);
        self.by_sample.insert(attempt.sample, id);
        self.by_id.insert(id, attempt);
        id
    }

    pub fn remove(&mut self, id: AttemptId) -> Option<LiveAttempt> {
        let attempt = self.by_id.remove(&id)?;
        if self.by_sample.get(&attempt.sample) == Some(&id) {
            self.by_sample.remove(&attempt.sample);
        }
        Some(attempt)
    }

    pub fn ids(&self, want: impl Fn(&LiveAttempt) -> bool) -> Vec<AttemptId> {
        self.by_id.iter().filter(|(_, attempt)| want(attempt)).map(|(id, _)| *id).collect()
    }
}

impl AttemptState {
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

// === impl Run ===

impl LiveAttempt {
    pub fn upto(&self) -> u32 {
        u32::try_from(self.tail.len()).expect("bounded by the context length")
    }

    pub fn made(&self) -> u32 {
        self.upto() - self.kept
    }

    pub fn rid(&self) -> String {
        let (group, index) = (self.sample.group.0, self.sample.index);
        format!("ab-{group:016x}-{index:08x}-{:08x}-{:04x}", self.number.0, self.requests)
    }

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

    /// It can go on as a new request without a trace: nothing of its state is only in the engine.
    pub fn can_be_cut(&self) -> bool {
        let sampling = &self.sampling;
        sampling.stop_strings.is_empty()
            && sampling.extra.is_empty()
            && sampling.presence_penalty == 0.0
            && sampling.frequency_penalty == 0.0
    }

    /// What its tokens already say, whatever its stream did.
    pub fn finished_by_tokens(&self) -> Option<Why> {
        let made = self.made();
        let stops = !self.stop_ids.is_empty() && made >= self.sampling.min_tokens.max(1);
        if stops && self.tail.last().is_some_and(|last| self.stop_ids.contains(last)) {
            return Some(Why::StopId);
        }
        (made >= self.sampling.max_tokens).then_some(Why::Length)
    }

    /// How many of `fresh` count: up to the first stop id, where the engine does not look for them.
    pub fn own_stop(&self, fresh: &[u32]) -> Option<usize> {
        if !self.own_stops {
            return None;
        }
        let needed = self.sampling.min_tokens.saturating_sub(self.made()).max(1) as usize;
        let at = fresh.iter().skip(needed - 1).position(|token| self.stop_ids.contains(token))?;
        Some(needed - 1 + at + 1)
    }
}
