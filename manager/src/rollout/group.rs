//! A prompt group: `n` samples of one prompt, admitted whole. Samples migrate one by one; a finished
//! sibling is frozen.

use std::sync::Arc;

use anabranch_proto::{SessionId, Step, Version};
use bytes::Bytes;

use crate::event::Sampling;
use crate::rollout::sample::{Sample, SampleState};

pub(crate) struct Group {
    pub key: Arc<str>,
    pub step: Step,
    pub prompt: Bytes,
    pub prompt_tokens: u32,
    pub digest: u64,
    pub sampling: Arc<Sampling>,
    /// EOS and stop ids together; filled when the model is known, at the first placement.
    pub stop_ids: Option<Arc<[u32]>>,
    pub pin: Option<Version>,
    pub priority: i32,
    pub meta: Bytes,
    pub conversation: String,
    /// A resume would not be token-exact: a lost sample restarts from its prompt.
    pub restarts: bool,
    pub samples: Vec<Sample>,
    /// Where the leader's prefill ran: the prefix is cached there.
    pub warm: Option<SessionId>,
    /// Siblings have left the waiting room.
    pub released: bool,
    /// The version that was current when its first sample was ready for a batch.
    pub offered_at: Option<Version>,
    /// Why it is short or dropped, where it is.
    pub why_short: Option<String>,
}

impl Group {
    pub fn n(&self) -> u32 {
        self.samples.len() as u32
    }

    /// Tokens this group may come to, as admission counts them.
    pub fn budget(&self) -> u64 {
        u64::from(self.n()) * u64::from(self.prompt_tokens + self.sampling.max_tokens)
    }

    pub fn open_samples(&self) -> u32 {
        self.samples.iter().filter(|sample| sample.is_open()).count() as u32
    }

    pub fn is_over(&self) -> bool {
        !self.samples.iter().any(Sample::is_open)
    }

    /// The lowest version number in any of its tokens; `u64::MAX` while it has none.
    pub fn oldest(&self) -> u64 {
        self.samples.iter().map(|sample| sample.oldest).min().unwrap_or(u64::MAX)
    }

    pub fn lengths(&self) -> Vec<u32> {
        self.samples.iter().map(|sample| sample.kept).collect()
    }

    pub fn delivered(&self) -> u32 {
        let delivered = |s: &&Sample| matches!(s.state, SampleState::Delivered { .. });
        self.samples.iter().filter(delivered).count() as u32
    }

    /// Abandoned samples are forgotten at once; the group itself when all others are committed.
    pub fn has_abandoned(&self) -> bool {
        self.samples.iter().any(|s| matches!(s.state, SampleState::Abandoned { .. }))
    }
}
