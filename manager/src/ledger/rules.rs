//! When a sample is finished, by its kept tokens alone: a finish lost after EOS must not run on.

/// Shared by the samples of a group.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct StopRules {
    pub max_tokens: u32,
    pub min_tokens: u32,
    /// EOS ids (unless ignored) and stop ids together, sorted.
    pub stop_ids: Vec<u32>,
    /// Ids at or above it are foreign; 0: not known.
    pub vocab: u32,
    /// Only this version may make tokens.
    pub pin: Option<anabranch_proto::Version>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    GoOn,
    StopId(u32),
    Length,
    Foreign(u32),
}

impl StopRules {
    /// What the token that becomes number `count` (from 1) means.
    pub(super) fn judge(&self, token: u32, count: u32) -> Verdict {
        if self.vocab != 0 && token >= self.vocab {
            Verdict::Foreign(token)
        } else if count >= self.min_tokens.max(1) && self.stop_ids.contains(&token) {
            Verdict::StopId(token)
        } else if count >= self.max_tokens {
            Verdict::Length
        } else {
            Verdict::GoOn
        }
    }
}
