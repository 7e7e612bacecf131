//! Need: what one sample wants of an engine. Rollout says it, placement and fleet read it.

use anabranch_proto::{SampleId, SessionId, Version};

/// Room kept for tokens to come; the engine itself retracts samples when the guess is too low.
pub(crate) const RESERVE_TOKENS: u32 = 1024;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Need {
    pub sample: SampleId,
    /// Tokens to prefill: prompt and kept.
    pub prefill: u32,
    /// Tokens the sample may still make.
    pub remaining: u32,
    pub pin: Option<Version>,
    /// The session where the group's prompt is cached.
    pub warm: Option<SessionId>,
    /// True where the sample may run only on an engine that runs nothing else.
    pub alone: bool,
}

/// Versions that may make tokens now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowed {
    pub current: Version,
    /// `None`: any version.
    pub max_lag: Option<u64>,
}

impl Need {
    /// Context the sample holds, in tokens, as counted against an engine's KV capacity.
    pub fn weight(&self) -> u64 {
        u64::from(self.prefill) + u64::from(self.remaining.min(RESERVE_TOKENS))
    }

    /// True where an engine with weights `at` and room for `context` tokens (0: any) can make the sample.
    pub fn suits(&self, allowed: Allowed, at: Version, context: u32) -> bool {
        let version_fits = match (self.pin, allowed.max_lag) {
            (Some(pin), _) => at == pin,
            (None, None) => true,
            (None, Some(max_lag)) => {
                at.lag_behind(&allowed.current).is_some_and(|lag| lag <= max_lag)
            }
        };
        version_fits && (context == 0 || self.prefill + self.remaining <= context)
    }
}
