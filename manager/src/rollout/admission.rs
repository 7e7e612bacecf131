//! What may come in: whole groups, checked against the job's model, bounded in tokens. A rejection says
//! what was wrong and, where waiting helps, for how long.

use std::time::Duration;

use anabranch_proto::tokens;

use crate::event::{Model, NewGroup};
use crate::rollout::replay;

#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum Reject {
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    #[error("n is 0; ask for at least one sample")]
    NoSamples,
    #[error("token {token} at position {at} is outside the model's vocabulary of {vocab}")]
    Foreign { token: u32, at: usize, vocab: u32 },
    #[error(
        "prompt of {prompt} tokens + max_tokens {max_tokens} is more than the model's context of {context}; \
         shorten one of them"
    )]
    TooLong { prompt: u32, max_tokens: u32, context: u32 },
    #[error("min_tokens {min} is above max_tokens {max}")]
    MinAboveMax { min: u32, max: u32 },
    #[error(
        "{what} cannot be continued token-exact on another engine ({why}); submit with replay = restart_ok to \
         let such a sample restart from its prompt (docs/replay.md)"
    )]
    Unreplayable { what: &'static str, why: &'static str },
    #[error("one group of {tokens} tokens is above the admission limit of {limit}")]
    Oversized { tokens: u64, limit: u64 },
    #[error("pinned to {pin}, which no engine can get any more")]
    UnknownPin { pin: anabranch_proto::Version },
    #[error("full: {admitted} of {limit} tokens are admitted; finish or commit some first")]
    Full { admitted: u64, limit: u64 },
}

impl Reject {
    pub fn retry_after(&self) -> Option<Duration> {
        matches!(self, Self::Full { .. }).then_some(Duration::from_millis(200))
    }
}

/// Checks one group; gives the number of tokens it is admitted with.
pub(crate) fn check(
    group: &NewGroup,
    model: &Model,
    admitted: u64,
    limit: u64,
) -> Result<u64, Reject> {
    let sampling = &group.sampling;
    let prompt = (group.prompt.len() / tokens::WIDTH) as u32;
    if prompt == 0 {
        return Err(Reject::EmptyPrompt);
    }
    if group.n == 0 {
        return Err(Reject::NoSamples);
    }
    check_model(group, prompt, model)?;
    if sampling.min_tokens > sampling.max_tokens {
        let (min, max) = (sampling.min_tokens, sampling.max_tokens);
        return Err(Reject::MinAboveMax { min, max });
    }
    if let (false, Some(row)) = (sampling.restart_ok(), replay::unreplayable(sampling).first()) {
        return Err(Reject::Unreplayable { what: row.what, why: row.why });
    }
    let tokens = u64::from(group.n) * (u64::from(prompt) + u64::from(sampling.max_tokens));
    if tokens > limit {
        return Err(Reject::Oversized { tokens, limit });
    }
    if admitted + tokens > limit {
        return Err(Reject::Full { admitted, limit });
    }
    Ok(tokens)
}

/// What can be checked once the model is known (again at the first placement, where it was not).
pub(crate) fn check_model(group: &NewGroup, prompt: u32, model: &Model) -> Result<(), Reject> {
    check_prompt(&group.prompt, prompt, group.sampling.max_tokens, model)
}

pub(crate) fn check_prompt(
    column: &[u8],
    prompt: u32,
    max_tokens: u32,
    model: &Model,
) -> Result<(), Reject> {
    let vocab = model.vocab;
    if vocab != 0
        && let Some((at, token)) = tokens::ids(column).enumerate().find(|(_, id)| *id >= vocab)
    {
        return Err(Reject::Foreign { token, at, vocab });
    }
    let context = model.max_context;
    if context != 0 && prompt.saturating_add(max_tokens) > context {
        return Err(Reject::TooLong { prompt, max_tokens, context });
    }
    Ok(())
}
