//! Which engine a sample goes to: filters on what it needs first, then the cheapest by cost.
//!
//! Group affinity: the leader's engine has the prompt's KV cached, so siblings (and a resumed sample, whose
//! prompt is cached where its group ran) go there unless it is clearly fuller than the emptiest one.

use anabranch_proto::{SampleId, SessionId, Version};
use anabranch_runtime::clock::Now;

use crate::fleet::Engine;

/// What a sample needs of an engine.
#[derive(Clone, Debug)]
pub(crate) struct Need {
    pub sample: SampleId,
    /// Tokens to prefill: prompt and kept.
    pub prefill: u32,
    /// Tokens it may still make.
    pub remaining: u32,
    pub pin: Option<Version>,
    pub warm: Option<SessionId>,
    /// Only on an engine that runs nothing else.
    pub alone: bool,
}

/// Which versions may make tokens now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowed {
    pub current: Version,
    /// `None`: any.
    pub max_lag: Option<u64>,
}

/// Room kept for tokens to come; the engine itself retracts when it is wrong.
const RESERVE_TOKENS: u32 = 1024;

/// An affine engine is taken although it has so many tokens more than the emptiest: about what a
/// prefill saves, in units of decode.
const AFFINITY_SLACK_TOKENS: u64 = 4096;

impl Need {
    /// Context it holds, as counted against an engine's KV capacity.
    pub fn weight(&self) -> u64 {
        u64::from(self.prefill) + u64::from(self.remaining.min(RESERVE_TOKENS))
    }

    /// `None`: no engine can take it now.
    pub fn choose<'a>(
        &self,
        now: Now,
        allowed: Allowed,
        engines: impl Iterator<Item = &'a Engine>,
    ) -> Option<SessionId> {
        let slack = (self.prefill as u64).min(AFFINITY_SLACK_TOKENS);
        engines
            .filter(|engine| self.may_run_on(now, allowed, engine))
            .map(|engine| {
                let affine = self.warm == Some(engine.session);
                let cost = engine.pressure() + if affine { 0 } else { slack };
                (cost, engine.running.len(), engine.session)
            })
            .min()
            .map(|(_, _, session)| session)
    }

    /// It will be able to take the sample once it has room: version and context fit.
    pub fn suits(&self, allowed: Allowed, engine: &Engine) -> bool {
        let Some(at) = engine.serving() else { return false };
        let version_fits = match (self.pin, allowed.max_lag) {
            (Some(pin), _) => at == pin,
            (None, None) => true,
            (None, Some(max_lag)) => {
                at.lag_behind(&allowed.current).is_some_and(|lag| lag <= max_lag)
            }
        };
        let context = engine.hello.model.max_context;
        version_fits && (context == 0 || self.prefill + self.remaining <= context)
    }

    fn may_run_on(&self, now: Now, allowed: Allowed, engine: &Engine) -> bool {
        let free = match engine.reserved {
            Some(reserved) => reserved == self.sample && engine.running.is_empty(),
            None => !self.alone,
        };
        free && engine.not_before <= now
            && self.suits(allowed, engine)
            && engine.has_room(self.weight())
    }
}
