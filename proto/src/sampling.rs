//! Sampling: how the tokens of a group are drawn. Owns the defaults and the bounds; engines do the drawing.

use std::collections::BTreeMap;

use crate::invalid::{Fault, Invalid};
use crate::limits::{
    MAX_STOP_IDS, MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS, MAX_TOP_K, MIN_P, PENALTY,
    REPETITION_PENALTY, TEMPERATURE, TOP_P, check_count, check_len,
};
use crate::pb;
use crate::wire_enum::{wire, words};

/// Sampling settings of a group, shared by its samples.
///
/// The fields are public, so that a literal can name the ones it changes; the methods of the same names
/// do so in a chain. [`Sampling::check`] refuses what no engine could do.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Most tokens of a sample, at least 1. Default 16, as in vLLM.
    pub max_tokens: u32,
    /// Tokens before which no stop is taken, at most `max_tokens`. Default 0.
    pub min_tokens: u32,
    /// Divisor of the logits, in [`TEMPERATURE`]. Default 1; 0 takes the likeliest token.
    pub temperature: f32,
    /// Share of probability that the likeliest tokens are kept up to, in [`TOP_P`]. Default 1: off.
    pub top_p: f32,
    /// Number of likeliest tokens that are kept, at most [`MAX_TOP_K`]. Default 0: off.
    pub top_k: u32,
    /// Share of the likeliest token's probability below which tokens are dropped, in [`MIN_P`].
    /// Default 0: off.
    pub min_p: f32,
    /// Token ids that end a sample, beside the model's EOS ids; at most [`MAX_STOP_IDS`]. Default none.
    pub stop_ids: Vec<u32>,
    /// Texts that end a sample, at most [`MAX_STOP_STRINGS`], each of 1 to [`MAX_STOP_STRING_BYTES`]
    /// bytes. Default none. Not replayable: see [`Replay`].
    pub stop_strings: Vec<String>,
    /// Generation continues after an EOS id. Default false.
    pub ignore_eos: bool,
    /// Penalty on tokens that were generated before, in [`PENALTY`]. Default 0: off. Not replayable.
    pub presence_penalty: f32,
    /// Penalty per occurrence of a token that was generated before, in [`PENALTY`]. Default 0: off.
    /// Not replayable.
    pub frequency_penalty: f32,
    /// Factor on tokens that occurred before, in [`REPETITION_PENALTY`]. Default 1: off.
    /// Not replayable.
    pub repetition_penalty: f32,
    /// Seed of the group; each sample derives its own. Default `None`: from the job's seed and the key.
    pub seed: Option<u64>,
    /// Fate of samples whose engine is lost, where a setting cannot be replayed. Default strict.
    pub replay: Replay,
    /// Settings that are handed to the engine as they are (a grammar, a thinking budget).
    /// Not replayable.
    pub extra: BTreeMap<String, String>,
}

/// Fate of a sample whose engine is lost, if its sampling settings cannot be replayed token-exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replay {
    /// Groups with such settings are refused at submit. The default.
    #[default]
    Strict,
    /// Such a sample restarts from its prompt; its tokens are counted as discarded.
    RestartOk,
}

words!(Replay, "replay", { Strict => "strict", RestartOk => "restart_ok" });
wire!(Replay, pb::Replay, "replay", { Strict => Strict, RestartOk => RestartOk });

// === impl Sampling ===

impl Default for Sampling {
    fn default() -> Self {
        Self {
            max_tokens: 16,
            min_tokens: 0,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            stop_ids: Vec::new(),
            stop_strings: Vec::new(),
            ignore_eos: false,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: None,
            replay: Replay::Strict,
            extra: BTreeMap::new(),
        }
    }
}

impl Sampling {
    /// Draws from the model's own distribution until EOS, for at most `max_tokens` (at least 1).
    pub fn new(max_tokens: u32) -> Self {
        Self { max_tokens, ..Self::default() }
    }

    /// Takes the likeliest token each time, for at most `max_tokens`.
    pub fn greedy(max_tokens: u32) -> Self {
        Self::new(max_tokens).temperature(0.0)
    }

    /// True if samples may restart from their prompt: [`Replay::RestartOk`].
    pub fn restart_ok(&self) -> bool {
        self.replay == Replay::RestartOk
    }

    /// Refuses settings that no engine could follow, with the field and its bound. The SDK calls it before
    /// it sends, the manager when it receives.
    pub fn check(&self) -> Result<(), Invalid> {
        if self.max_tokens == 0 {
            return Err(Invalid::rule("max_tokens", "must be at least 1, not 0"));
        }
        if self.min_tokens > self.max_tokens {
            let (min, max) = (self.min_tokens, self.max_tokens);
            let what = format!("{min} is above max_tokens, {max}; lower one or raise the other");
            return Err(Invalid::rule("min_tokens", what));
        }
        self.check_stops()?;
        TEMPERATURE.check("temperature", self.temperature, "0 takes the likeliest token")?;
        TOP_P.check("top_p", self.top_p, "1 is off")?;
        check_count("top_k", self.top_k.into(), 0, MAX_TOP_K.into(), "0 is off")?;
        MIN_P.check("min_p", self.min_p, "0 is off")?;
        PENALTY.check("presence_penalty", self.presence_penalty, "0 is off")?;
        PENALTY.check("frequency_penalty", self.frequency_penalty, "0 is off")?;
        REPETITION_PENALTY.check("repetition_penalty", self.repetition_penalty, "1 is off")
    }

    fn check_stops(&self) -> Result<(), Invalid> {
        check_len("stop_ids", self.stop_ids.len(), MAX_STOP_IDS, "ids", "")?;
        check_len("stop_strings", self.stop_strings.len(), MAX_STOP_STRINGS, "strings", "")?;
        let odd = |text: &&String| !(1..=MAX_STOP_STRING_BYTES).contains(&text.len());
        match self.stop_strings.iter().find(odd) {
            None => Ok(()),
            Some(text) if text.is_empty() => {
                let remedy = "it would end every sample at once; leave it out".into();
                Err(Invalid::new("stop_strings", Fault::Empty { remedy }))
            }
            Some(text) => {
                check_len("stop_strings", text.len(), MAX_STOP_STRING_BYTES, "bytes in one", "")
            }
        }
    }
}

/// Setters, to be chained after [`Sampling::new`]; each field's doc has its bounds.
impl Sampling {
    /// Sets [`Sampling::min_tokens`].
    pub fn min_tokens(mut self, tokens: u32) -> Self {
        self.min_tokens = tokens;
        self
    }

    /// Sets [`Sampling::temperature`].
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets [`Sampling::top_p`].
    pub fn top_p(mut self, share: f32) -> Self {
        self.top_p = share;
        self
    }

    /// Sets [`Sampling::top_k`].
    pub fn top_k(mut self, k: u32) -> Self {
        self.top_k = k;
        self
    }

    /// Sets [`Sampling::min_p`].
    pub fn min_p(mut self, share: f32) -> Self {
        self.min_p = share;
        self
    }

    /// Sets [`Sampling::stop_ids`].
    pub fn stop_ids(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.stop_ids = ids.into_iter().collect();
        self
    }

    /// Sets [`Sampling::stop_strings`].
    pub fn stop_strings<S: Into<String>>(mut self, texts: impl IntoIterator<Item = S>) -> Self {
        self.stop_strings = texts.into_iter().map(Into::into).collect();
        self
    }

    /// Sets [`Sampling::ignore_eos`].
    pub fn ignore_eos(mut self, ignore: bool) -> Self {
        self.ignore_eos = ignore;
        self
    }

    /// Sets [`Sampling::presence_penalty`].
    pub fn presence_penalty(mut self, penalty: f32) -> Self {
        self.presence_penalty = penalty;
        self
    }

    /// Sets [`Sampling::frequency_penalty`].
    pub fn frequency_penalty(mut self, penalty: f32) -> Self {
        self.frequency_penalty = penalty;
        self
    }

    /// Sets [`Sampling::repetition_penalty`].
    pub fn repetition_penalty(mut self, penalty: f32) -> Self {
        self.repetition_penalty = penalty;
        self
    }

    /// Sets [`Sampling::seed`].
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Sets [`Sampling::replay`].
    pub fn replay(mut self, replay: Replay) -> Self {
        self.replay = replay;
        self
    }

    /// Adds one entry to [`Sampling::extra`].
    pub fn extra(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.extra.insert(key.into(), value.into());
        self
    }
}

impl TryFrom<pb::Sampling> for Sampling {
    type Error = Invalid;

    /// Takes the defaults for what is left out, then [`Sampling::check`]s the result.
    fn try_from(wire: pb::Sampling) -> Result<Self, Invalid> {
        let sampling = Self {
            max_tokens: wire.max_tokens,
            min_tokens: wire.min_tokens,
            temperature: wire.temperature.unwrap_or(1.0),
            top_p: wire.top_p.unwrap_or(1.0),
            top_k: wire.top_k,
            min_p: wire.min_p,
            stop_ids: wire.stop_ids,
            stop_strings: wire.stop_strings,
            ignore_eos: wire.ignore_eos,
            presence_penalty: wire.presence_penalty,
            frequency_penalty: wire.frequency_penalty,
            repetition_penalty: wire.repetition_penalty.unwrap_or(1.0),
            seed: wire.seed,
            replay: Replay::from_wire("replay", wire.replay)?.unwrap_or_default(),
            extra: wire.extra.into_iter().collect(),
        };
        sampling.check()?;
        Ok(sampling)
    }
}

impl From<Sampling> for pb::Sampling {
    /// Names every setting but a repetition penalty of 1, which stays unset.
    fn from(sampling: Sampling) -> Self {
        let penalty = sampling.repetition_penalty;
        Self {
            max_tokens: sampling.max_tokens,
            min_tokens: sampling.min_tokens,
            temperature: Some(sampling.temperature),
            top_p: Some(sampling.top_p),
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            stop_ids: sampling.stop_ids,
            stop_strings: sampling.stop_strings,
            ignore_eos: sampling.ignore_eos,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            repetition_penalty: (penalty != 1.0).then_some(penalty),
            seed: sampling.seed,
            replay: pb::Replay::from(sampling.replay).into(),
            extra: sampling.extra.into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests;
