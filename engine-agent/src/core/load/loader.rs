//! The engine's weights, the load under way, and the tokens withheld until the new weights are
//! proven. Pure.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;

use anabranch_proto::{Version, pb};

use super::order::LoadOrder;
use super::state::LoadState;
use crate::core::check_edge;
use crate::core::event::{ProbeResult, RequestEnd};
use crate::engine::{AttemptId, Chunk, EngineInfo, LabelSpan};

/// State of the engine's weights.
#[derive(Default)]
pub struct Loader {
    state: LoadState,
    /// The weights that the engine has; `None` if the weights are gone or unknown.
    pub serving: Option<Serving>,
    /// The newest order that came too late to replace the order under way.
    pub next: Option<LoadOrder>,
    /// Answer to the probe under the present weights.
    pub last_probe: Option<ProbeResult>,
    /// Last outcome told to the manager, repeated after a re-attach.
    pub last_report: Option<pb::LoadState>,
    /// Labels of the last versions, to read the engine's own spans.
    pub labels: VecDeque<(String, Version)>,
    /// Tokens and ends since the engine continued, until the probe is answered; bounded by a
    /// probe's length.
    pub withheld: Vec<Withheld>,
}

/// Weights that the engine has.
#[derive(Clone, Debug)]
pub struct Serving {
    /// The version.
    pub version: Version,
    /// The name that the engine gives the weights.
    pub label: String,
    /// Checkpoint to go back to; `None` if this host cannot read it.
    pub directory: Option<PathBuf>,
}

/// A chunk or an end that may not leave yet.
pub enum Withheld {
    /// A chunk.
    Tokens { attempt: AttemptId, tokens: Vec<u32>, logprobs: Vec<f32>, spans: Vec<LabelSpan> },
    /// The end of a request.
    End { attempt: AttemptId, end: RequestEnd },
}

/// Most labels remembered.
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

    /// The version that the engine has.
    pub fn serving(&self) -> Option<Version> {
        self.serving.as_ref().map(|serving| serving.version)
    }

    /// The label that the engine must give its weights; `None` while a load is about to change it.
    pub fn settled_label(&self) -> Option<&str> {
        match self.state {
            LoadState::Active | LoadState::Fetching(_) | LoadState::Quiescing(..) => {
                self.serving.as_ref().map(|serving| serving.label.as_str())
            }
            _ => None,
        }
    }

    /// The version that an attempt started now is served by: attempts that wait start after the
    /// load.
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

    /// True while new attempts wait for the load.
    pub fn is_loading(&self) -> bool {
        !matches!(self.state, LoadState::Active | LoadState::Fetching(_))
    }

    /// True while the engine generates with weights that are not proven: nothing may leave.
    pub fn withholds(&self) -> bool {
        matches!(self.state, LoadState::Continuing(..) | LoadState::Probing(..))
    }

    /// Keeps a chunk back.
    pub fn withhold(&mut self, attempt: AttemptId, chunk: &Chunk) {
        self.withheld.push(Withheld::Tokens {
            attempt,
            tokens: chunk.tokens.clone(),
            logprobs: chunk.logprobs.clone(),
            spans: chunk.spans.clone(),
        });
    }

    /// Keeps the end of a request back.
    pub fn withhold_end(&mut self, attempt: AttemptId, end: RequestEnd) {
        self.withheld.push(Withheld::End { attempt, end });
    }

    /// Drops what was kept back: the weights that made it were refused.
    pub fn drop_withheld(&mut self) {
        self.withheld.clear();
    }

    /// The last outcome told to the manager.
    pub fn last_report(&self) -> Option<&pb::LoadState> {
        self.last_report.as_ref()
    }

    /// Begins a new life of the engine, which has its start-up weights.
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

    /// Notes that the engine has new weights.
    pub fn take(&mut self, serving: Serving) {
        self.labels.retain(|(label, _)| *label != serving.label);
        self.labels.push_back((serving.label.clone(), serving.version));
        if self.labels.len() > MAX_LABELS {
            self.labels.pop_front();
        }
        self.serving = Some(serving);
    }

    /// Splits `count` tokens, the first at `offset_in_request`, by the version that the engine says
    /// made them.
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
