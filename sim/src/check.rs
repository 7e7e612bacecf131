//! Checks each delivered trajectory by recomputing it: shares nothing with the ledger but the oracle function.

use anabranch_engine::synthetic::{self, Chain, SyntheticParams};
use anabranch_manager::action::{BatchSample, Finish};
use anabranch_manager::ledger::PageView;
use anabranch_proto::tokens;

use crate::fleet::weights;

/// The trainer's request.
pub(crate) struct Asked<'a> {
    pub prompt: &'a [u32],
    pub max_tokens: u32,
    pub ignore_eos: bool,
    pub pin: Option<anabranch_proto::Version>,
}

/// Checks every token, log-probability, span and the finish of one trajectory.
pub(crate) fn trajectory(
    params: SyntheticParams,
    asked: &Asked<'_>,
    sample: &BatchSample,
    view: &PageView,
) -> Result<(), String> {
    let id = sample.sample;
    let ids: Vec<u32> = tokens::ids(&view.tokens).collect();
    let logprobs: Vec<f32> = tokens::logprobs(&view.logprobs).collect();
    if ids.len() != logprobs.len() || ids.len() != sample.tokens as usize {
        let (a, b, c) = (ids.len(), logprobs.len(), sample.tokens);
        return Err(format!("{id}: {a} tokens, {b} log-probabilities, {c} announced"));
    }
    let mut chain = Chain::new(sample.seed).extend(asked.prompt);
    let mut at = 0;
    for span in &view.spans {
        if span.start != at || span.len == 0 {
            return Err(format!("I2: {id}: span at {} after {at} tokens", span.start));
        }
        if asked.pin.is_some_and(|pin| pin != span.version) {
            return Err(format!("{id}: pinned, but has tokens of {}", span.version));
        }
        let key = weights(&span.version);
        for position in at..at + span.len {
            let (token, logprob) = (ids[position as usize], logprobs[position as usize]);
            let made = synthetic::next(chain, key, params, asked.ignore_eos);
            if (made.token, made.logprob.to_bits()) != (token, logprob.to_bits()) {
                return Err(format!(
                    "I3: {id}: token {position} of {} is {token} ({logprob}), should be {} ({}), span {:?}",
                    ids.len(),
                    made.token,
                    made.logprob,
                    span
                ));
            }
            chain = chain.push(token);
        }
        at += span.len;
    }
    if at as usize != ids.len() {
        return Err(format!("I2: {id}: spans end at {at} of {}", ids.len()));
    }
    finish(params, asked, sample, &ids)
}

fn finish(
    params: SyntheticParams,
    asked: &Asked<'_>,
    sample: &BatchSample,
    ids: &[u32],
) -> Result<(), String> {
    let id = sample.sample;
    let eos = |token: &u32| *token == params.eos_id && !asked.ignore_eos;
    if let Some(at) = ids.iter().position(eos)
        && at + 1 < ids.len()
    {
        return Err(format!("{id}: {} tokens past EOS at {at}", ids.len() - at - 1));
    }
    let ends_right = match &sample.finish {
        Finish::Stop(_) => ids.last().is_some_and(eos),
        Finish::Length => ids.len() == asked.max_tokens as usize,
        Finish::Cancelled => true,
        Finish::Abandoned(_) => false,
    };
    match ends_right {
        true => Ok(()),
        false => Err(format!("{id}: finished {:?} after {} tokens", sample.finish, ids.len())),
    }
}
