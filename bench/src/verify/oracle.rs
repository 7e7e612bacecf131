//! One trajectory against the oracle: the chain is walked from the prompt, and each token must be the one that the
//! weights named by its span make at that place. Owns no file and no count.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_engine::synthetic::{self, Chain, Made, SyntheticParams, WeightsKey};
use anabranch_proto::{pb, seed, tokens};
use pb::trajectory::Finish;

use crate::records::{Asked, Job, Weights};

/// The first error found in a trajectory.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Wrong {
    /// Nobody asked for the sample.
    #[error("nobody asked for it")]
    Foreign,
    /// The seed is not the sample's.
    #[error("it names seed {got}, its own is {want}")]
    Seed { want: u64, got: u64 },
    /// Tokens and log-probabilities differ in number.
    #[error("{ids} bytes of tokens and {logprobs} of log-probabilities")]
    Columns { ids: usize, logprobs: usize },
    /// The spans leave a gap or overlap.
    #[error("its spans cover {covered} of {len} tokens, or overlap, at token {covered}")]
    Spans { covered: u32, len: u32 },
    /// A span names an engine that is not of the run.
    #[error("token {at}: engine {engine:?} (incarnation {incarnation}) is none of this run's")]
    Engine { at: u32, engine: String, incarnation: u64 },
    /// A span names a version that was never published.
    #[error("token {at}: version {number} of epoch {epoch} was never published")]
    UnknownVersion { at: u32, epoch: u32, number: u64 },
    /// A token was made by another version than its span says.
    #[error("token {at} says version {says}, version {really} made it")]
    Version { at: u32, says: u64, really: u64 },
    /// A token is not the oracle's.
    #[error("token {at} is {got}, the oracle says {want}: lost, doubled, swapped or foreign")]
    Token { at: u32, want: u32, got: u32 },
    /// A log-probability is not the oracle's.
    #[error("the log-probability of token {at} is {got}, the oracle says {want}")]
    Logprob { at: u32, want: f32, got: f32 },
    /// The answer continues after its EOS.
    #[error("EOS is token {at} of {len}: it ran on")]
    PastEos { at: u32, len: u32 },
    /// The finish does not fit the tokens.
    #[error("finish {finish:?} with {len} of {max} tokens, the last {}an EOS", if *.eos { "" } else { "not " })]
    Finish { finish: Finish, len: u32, max: u32, eos: bool },
}

/// The facts from which any trajectory of one run can be recomputed.
pub struct Oracle {
    seed: u64,
    model: SyntheticParams,
    engines: BTreeSet<String>,
    /// Weights by (epoch, number); number 0, the start-up weights, is `base` in every epoch.
    keys: BTreeMap<(u32, u64), WeightsKey>,
    base: WeightsKey,
}

impl Wrong {
    /// Name of the error in reports.
    pub fn kind(&self) -> &'static str {
        match self {
            Wrong::Foreign => "foreign",
            Wrong::Seed { .. } => "seed",
            Wrong::Columns { .. } => "columns",
            Wrong::Spans { .. } => "spans",
            Wrong::Engine { .. } => "engine",
            Wrong::UnknownVersion { .. } => "unknown_version",
            Wrong::Version { .. } => "version",
            Wrong::Token { .. } => "token",
            Wrong::Logprob { .. } => "logprob",
            Wrong::PastEos { .. } => "past_eos",
            Wrong::Finish { .. } => "finish",
        }
    }
}

impl Oracle {
    /// Makes the oracle of a run from its job and its published weights.
    pub fn new(job: &Job, weights: &[Weights]) -> Self {
        let key = |w: &Weights| {
            let digest: [u8; 32] = hex::decode(&w.digest).ok()?.try_into().ok()?;
            Some(((w.epoch, w.number), WeightsKey::new(&digest)))
        };
        Self {
            seed: job.seed,
            model: job.model,
            engines: job.engines.iter().cloned().collect(),
            keys: weights.iter().filter_map(key).collect(),
            base: WeightsKey::new(&synthetic::base_digest()),
        }
    }

    /// Checks one trajectory; the error is the first that is found.
    pub fn check(&self, asked: &Asked, t: &pb::Trajectory) -> Result<(), Wrong> {
        let seed = seed::of_sample(self.seed, &t.key, t.index);
        if t.seed != seed {
            return Err(Wrong::Seed { want: seed, got: t.seed });
        }
        if !tokens::is_column(&t.tokens) || t.tokens.len() != t.logprobs.len() {
            return Err(Wrong::Columns { ids: t.tokens.len(), logprobs: t.logprobs.len() });
        }
        let ids: Vec<u32> = tokens::ids(&t.tokens).collect();
        let logprobs: Vec<f32> = tokens::logprobs(&t.logprobs).collect();
        check_tiling(&t.spans, ids.len() as u32)?;
        let mut chain = Chain::new(seed).extend(&asked.prompt);
        for span in &t.spans {
            let key = self.maker(span)?;
            let range = span.start as usize..(span.start + span.len) as usize;
            for at in range {
                let no_end = asked.ignore_eos || (at as u32) < asked.min_tokens;
                let want = synthetic::next(chain, key, self.model, no_end);
                let got = (ids[at], logprobs[at]);
                if (want.token, want.logprob.to_bits()) != (got.0, got.1.to_bits()) {
                    return Err(self.diagnose(span, chain, no_end, at as u32, want, got));
                }
                chain = chain.push(got.0);
            }
        }
        self.check_end(asked, t.finish(), &ids)
    }

    fn maker(&self, span: &pb::Span) -> Result<WeightsKey, Wrong> {
        let at = span.start;
        let engine = span.engine.clone().unwrap_or_default();
        if !self.engines.contains(&engine.id) {
            return Err(Wrong::Engine { at, engine: engine.id, incarnation: engine.incarnation });
        }
        let version = span.version.clone().unwrap_or_default();
        match version.number {
            0 => Ok(self.base),
            number => self
                .keys
                .get(&(version.epoch, number))
                .copied()
                .ok_or(Wrong::UnknownVersion { at, epoch: version.epoch, number }),
        }
    }

    /// Names the error of a token that is not as expected: another version, another token, or another log-probability.
    fn diagnose(
        &self,
        span: &pb::Span,
        chain: Chain,
        no_end: bool,
        at: u32,
        want: Made,
        (id, logprob): (u32, f32),
    ) -> Wrong {
        let base = std::iter::once((0, self.base));
        let mut all = base.chain(self.keys.iter().map(|((_, number), key)| (*number, *key)));
        let really = all.find(|(_, key)| {
            let made = synthetic::next(chain, *key, self.model, no_end);
            (made.token, made.logprob.to_bits()) == (id, logprob.to_bits())
        });
        if let Some((really, _)) = really {
            let says = span.version.as_ref().map_or(0, |v| v.number);
            return Wrong::Version { at, says, really };
        }
        match want.token == id {
            true => Wrong::Logprob { at, want: want.logprob, got: logprob },
            false => Wrong::Token { at, want: want.token, got: id },
        }
    }

    fn check_end(&self, asked: &Asked, finish: Finish, ids: &[u32]) -> Result<(), Wrong> {
        let (len, max) = (ids.len() as u32, asked.max_tokens);
        let is_end = |at: usize| {
            ids[at] == self.model.eos_id && !asked.ignore_eos && at as u32 >= asked.min_tokens
        };
        let first = (0..ids.len()).find(|&at| is_end(at));
        if let Some(at) = first.filter(|at| at + 1 < ids.len()) {
            return Err(Wrong::PastEos { at: at as u32, len });
        }
        let eos = first.is_some();
        let ok = match finish {
            Finish::Stop => eos && len <= max,
            Finish::Length => !eos && len == max,
            Finish::Cancelled => !eos && len < max,
            Finish::Abandoned | Finish::Unspecified => false,
        };
        if ok { Ok(()) } else { Err(Wrong::Finish { finish, len, max, eos }) }
    }
}

fn check_tiling(spans: &[pb::Span], len: u32) -> Result<(), Wrong> {
    let mut covered = 0u32;
    for span in spans {
        if span.start != covered || span.len == 0 || span.len > len - covered {
            return Err(Wrong::Spans { covered, len });
        }
        covered += span.len;
    }
    if covered == len { Ok(()) } else { Err(Wrong::Spans { covered, len }) }
}
