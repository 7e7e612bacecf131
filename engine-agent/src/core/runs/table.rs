//! The table of samples on this engine, and what one of them knows of itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, SampleId, Version};

use crate::engine::RunId;

#[derive(Default)]
pub struct Runs {
    pub by_run: BTreeMap<RunId, Run>,
    /// The attempt that counts; discarded runs are not in it.
    pub by_sample: BTreeMap<SampleId, RunId>,
    pub next: u64,
}

pub struct Run {
    pub sample: SampleId,
    pub attempt: Attempt,
    pub prompt: Arc<[u32]>,
    pub sampling: Arc<pb::Sampling>,
    pub stop_ids: Arc<[u32]>,
    pub adapter: String,
    pub seed: Option<u64>,
    /// Kept tokens, then those made here.
    pub tail: Vec<u32>,
    pub kept: u32,
    /// Length of `tail` when the present request was sent: its first token's offset.
    pub leg_at: u32,
    pub legs: u32,
    pub stage: Stage,
    /// A version boundary lies before or in the next chunk, and this engine cannot say where.
    pub boundary: bool,
    /// The engine would run past these: it ignores stop ids together with EOS.
    pub own_stops: bool,
    /// What the trainer attested, as the manager says: only where the trainer loads the engine.
    pub attested: Option<Version>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A load is under way: not at the engine yet.
    Held,
    Running,
    Stopping,
    Discarding,
    Cutting,
    /// Its request ended for a load; it goes on after.
    Cut,
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

    pub fn insert(&mut self, run: Run) -> RunId {
        self.next += 1;
        let id = RunId(self.next);
        self.by_sample.insert(run.sample, id);
        self.by_run.insert(id, run);
        id
    }

    pub fn remove(&mut self, id: RunId) -> Option<Run> {
        let run = self.by_run.remove(&id)?;
        if self.by_sample.get(&run.sample) == Some(&id) {
            self.by_sample.remove(&run.sample);
        }
        Some(run)
    }

    pub fn ids(&self, want: impl Fn(&Run) -> bool) -> Vec<RunId> {
        self.by_run.iter().filter(|(_, run)| want(run)).map(|(id, _)| *id).collect()
    }
}

impl Stage {
    pub fn at_engine(self) -> bool {
        match self {
            Stage::Running | Stage::Stopping | Stage::Discarding | Stage::Cutting => true,
            Stage::Held | Stage::Cut => false,
        }
    }
}

// === impl Run ===

impl Run {
    pub fn upto(&self) -> u32 {
        u32::try_from(self.tail.len()).expect("bounded by the context length")
    }

    pub fn made(&self) -> u32 {
        self.upto() - self.kept
    }

    pub fn rid(&self) -> String {
        let (group, index) = (self.sample.group.0, self.sample.index);
        format!("ab-{group:016x}-{index:08x}-{:08x}-{:04x}", self.attempt.0, self.legs)
    }

    pub fn end(&self, why: Why, matched: String) -> pb::End {
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
