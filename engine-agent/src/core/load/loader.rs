//! Which weights the engine has, where a load stands, and what is held back until they are proven.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;

use anabranch_proto::{Version, pb};

use super::order::LoadOrder;
use super::state::LoadState;
use crate::core::check_edge;
use crate::core::event::{ProbeResult, RequestEnd};
use crate::engine::{AttemptId, Chunk, EngineInfo, LabelSpan};

#[derive(Default)]
pub struct Loader {
    state: LoadState,
    /// What the engine's weights are; `None`: they are gone, or nobody knows.
    pub serving: Option<Serving>,
    /// The newest order that came too late to replace the one under way.
    pub next: Option<LoadOrder>,
    pub last_probe: Option<ProbeResult>,
    pub last_report: Option<pb::LoadState>,
    /// Labels of late, for the engine's own spans.
    pub labels: VecDeque<(String, Version)>,
    /// From the moment the streams go on until the probe spoke; bounded by a probe's length.
    pub withheld: Vec<Withheld>,
}

#[derive(Clone, Debug)]
pub struct Serving {
    pub version: Version,
    pub label: String,
    pub directory: Option<PathBuf>,
}

pub enum Withheld {
    Tokens { attempt: AttemptId, tokens: Vec<u32>, logprobs: Vec<f32>, spans: Vec<LabelSpan> },
    End { attempt: AttemptId, end: RequestEnd },
}

const MAX_LABELS: usize = 8;

impl Loader {
    /// The present state; [`Loader::set_state`] changes it.
    pub fn state(&self) -> &LoadState {
        &self.state
    }

    /// Assigns the state; no other code does.
    pub fn set_state(&mut self, next: LoadState) {
        check_edge("load", self.state.may_become(&next), &self.state, &next);
        self.state = next;
    }

    /// The order whose version is being fetched.
    pub fn fetching_mut(&mut self) -> Option<&mut LoadOrder> {
        match &mut self.state {
            LoadState::Fetching(order) => Some(order),
            _ => None,
        }
    }

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
            LoadState::Quiescing(order, _)
            | LoadState::Pausing(order, _)
            | LoadState::Loading(order, _)
            | LoadState::Continuing(order, _)
            | LoadState::Probing(order, _) => Some(order.to),
        }
    }

    /// Starts are held.
    pub fn is_loading(&self) -> bool {
        !matches!(self.state, LoadState::Active | LoadState::Fetching(_))
    }

    /// Streams go on, but what they bring may not leave before the probe spoke.
    pub fn withholds(&self) -> bool {
        matches!(self.state, LoadState::Continuing(..) | LoadState::Probing(..))
    }

    pub fn withhold(&mut self, attempt: AttemptId, chunk: &Chunk) {
        self.withheld.push(Withheld::Tokens {
            attempt,
            tokens: chunk.tokens.clone(),
            logprobs: chunk.logprobs.clone(),
            spans: chunk.spans.clone(),
        });
    }

    pub fn withhold_end(&mut self, attempt: AttemptId, end: RequestEnd) {
        self.withheld.push(Withheld::End { attempt, end });
    }

    pub fn drop_withheld(&mut self) {
        self.withheld.clear();
    }

    pub fn last_report(&self) -> Option<&pb::LoadState> {
        self.last_report.as_ref()
    }

    pub fn engine_started(&mut self, info: &EngineInfo, probe: Option<ProbeResult>) {
        self.set_state(LoadState::Active);
        self.last_probe = probe;
        let version = Version::base(0);
        self.take(Serving {
            version,
            label: info.weight_label.clone(),
            directory: info.model_directory.clone(),
        });
    }

    pub fn take(&mut self, serving: Serving) {
        self.labels.retain(|(label, _)| *label != serving.label);
        self.labels.push_back((serving.label.clone(), serving.version));
        if self.labels.len() > MAX_LABELS {
            self.labels.pop_front();
        }
        self.serving = Some(serving);
    }

    /// Cuts `count` tokens from `leg_offset` of their request by what the engine says made them.
    pub fn split_by_version(
        &self,
        spans: &[LabelSpan],
        offset_in_request: u32,
        count: usize,
    ) -> Vec<(Range<usize>, Version)> {
        let fallback = self.serving().unwrap_or_else(|| Version::base(0));
        let version_of = |at: u32| {
            let span = spans.iter().find(|span| span.start <= at && at < span.end)?;
            self.labels.iter().find(|(label, _)| *label == span.label).map(|(_, version)| *version)
        };
        let mut pieces: Vec<(Range<usize>, Version)> = Vec::new();
        for (index, at) in (offset_in_request..).take(count).enumerate() {
            let version = version_of(at).unwrap_or(fallback);
            match pieces.last_mut() {
                Some((range, last)) if *last == version => range.end = index + 1,
                _ => pieces.push((index..index + 1, version)),
            }
        }
        pieces
    }
}
