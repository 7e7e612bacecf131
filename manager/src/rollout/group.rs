//! Group: `n` samples of one prompt, admitted whole. Samples migrate one by one; a finished sibling is frozen.

use std::sync::Arc;

use anabranch_proto::{GroupId, SampleId, SessionId, Step, Version};
use bytes::Bytes;

use super::sample::{Sample, SampleState};
use crate::event::Sampling;

/// What the trainer asked for, fixed at admission.
#[derive(Debug, PartialEq)]
pub(crate) struct GroupSpec {
    pub key: Arc<str>,
    pub step: Step,
    /// u32 LE column.
    pub prompt: Bytes,
    pub prompt_tokens: u32,
    pub digest: u64,
    pub n: u32,
    pub sampling: Arc<Sampling>,
    /// Seed that the samples' own seeds derive from.
    pub seed: u64,
    /// The one version that may make this group's tokens.
    pub pin: Option<Version>,
    pub priority: i32,
    pub meta: Bytes,
    /// The trainer's name of a conversation, passed on to engines.
    pub conversation: String,
    /// True where a resume would not be token-exact: a lost sample restarts from its prompt.
    pub restarts: bool,
}

pub(crate) struct Group {
    pub spec: Arc<GroupSpec>,
    /// Assigned by `Books::apply` only.
    pub(super) samples: Vec<Sample>,
    /// The version that was current when the group's first sample was ready for a batch.
    pub(super) offered_at: Option<Version>,
    /// Why the group is short or dropped, where it is.
    pub(super) why_short: Option<Arc<str>>,
    pub(super) open: u32,
    pub live: GroupLive,
}

/// Volatile part of a group.
#[derive(Default)]
pub(crate) struct GroupLive {
    /// EOS and stop ids together; filled at the first placement, when the model is known.
    pub stop_ids: Option<Arc<[u32]>>,
    /// The session where the group's prompt is cached: the leader's.
    pub warm: Option<SessionId>,
    /// True once the siblings have left the waiting room behind their leader.
    pub released: bool,
    /// The group's place in `Ages`, kept here so that it can be taken out again; `u64::MAX`: none.
    pub age: u64,
    /// True once a sample of the group has tokens.
    pub has_tokens: bool,
}

impl GroupSpec {
    /// Tokens this group may come to, as admission counts them.
    pub fn budget(&self) -> u64 {
        u64::from(self.n) * (u64::from(self.prompt_tokens) + u64::from(self.sampling.max_tokens))
    }
}

impl Group {
    /// Tokens that admission counts for the group now: what was made of samples that have ended, and what may be made of
    /// the others.
    pub fn booked(&self) -> u64 {
        let (prompt, most) = (self.spec.prompt_tokens, self.spec.sampling.max_tokens);
        let of = |sample: &Sample| u64::from(prompt) + u64::from(sample.made.unwrap_or(most));
        self.samples.iter().map(of).sum()
    }

    pub fn n(&self) -> u32 {
        self.samples.len() as u32
    }

    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    pub fn ids(&self, id: GroupId) -> impl Iterator<Item = SampleId> + use<> {
        (0..self.n()).map(move |index| SampleId { group: id, index })
    }

    pub fn offered_at(&self) -> Option<Version> {
        self.offered_at
    }

    pub fn open_samples(&self) -> u32 {
        self.open
    }

    pub fn is_over(&self) -> bool {
        self.open == 0
    }

    /// True while a new version may make the group too old: tokens of it count, and none was offered yet.
    pub fn ages(&self) -> bool {
        self.spec.pin.is_none() && self.offered_at.is_none()
    }

    /// Lowest version number in any of the group's tokens; `u64::MAX` while it has none.
    pub fn oldest(&self) -> u64 {
        self.samples.iter().map(|sample| sample.live.oldest).min().unwrap_or(u64::MAX)
    }

    pub fn lengths(&self) -> Vec<u32> {
        self.samples.iter().map(|sample| sample.live.kept).collect()
    }

    pub fn count(&self, state: fn(&SampleState) -> bool) -> u32 {
        self.samples.iter().filter(|sample| state(&sample.state)).count() as u32
    }

    pub fn delivered(&self) -> u32 {
        self.count(|state| matches!(state, SampleState::Delivered { .. }))
    }

    pub fn abandoned(&self) -> u32 {
        self.count(|state| matches!(state, SampleState::Abandoned { .. }))
    }

    /// True where the durable parts are equal.
    pub fn same_books(&self, other: &Self) -> bool {
        let samples = self.samples.iter().zip(&other.samples);
        self.spec == other.spec
            && self.offered_at == other.offered_at
            && self.why_short == other.why_short
            && self.open == other.open
            && self.samples.len() == other.samples.len()
            && samples.into_iter().all(|(one, other)| one.same_books(other))
    }
}
