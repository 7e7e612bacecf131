//! How a group's tokens are drawn. Owns the defaults and the checks; the engine does the drawing.

use std::collections::BTreeMap;

use anabranch_proto::pb;

use crate::error::Error;

/// Built from `new(max_tokens)`; every other setting has the default that its method names.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    max_tokens: u32,
    min_tokens: u32,
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    stop_ids: Vec<u32>,
    stop_strings: Vec<String>,
    ignore_eos: bool,
    presence_penalty: f32,
    frequency_penalty: f32,
    repetition_penalty: f32,
    seed: Option<u64>,
    replay: Replay,
    extra: BTreeMap<String, String>,
}

/// What happens to a sample whose engine is lost, where the settings cannot be replayed token-exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replay {
    /// Such settings are refused at submit.
    #[default]
    Strict,
    /// Such a sample starts again from its prompt; the lost tokens are counted as discarded.
    RestartOk,
}

// === impl Sampling ===

impl Sampling {
    /// Draws from the model's own distribution until EOS, `max_tokens` (at least 1) at most.
    pub fn new(max_tokens: u32) -> Self {
        Self {
            max_tokens,
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

    /// Always the likeliest token.
    pub fn greedy(max_tokens: u32) -> Self {
        Self::new(max_tokens).temperature(0.0)
    }

    /// No stop before so many tokens. Default 0.
    pub fn min_tokens(mut self, tokens: u32) -> Self {
        self.min_tokens = tokens;
        self
    }

    /// Default 1.0; 0 takes the likeliest token.
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.temperature = temperature;
        self
    }

    /// Keeps the likeliest tokens up to this share. In (0, 1]; default 1.0 = off.
    pub fn top_p(mut self, share: f32) -> Self {
        self.top_p = share;
        self
    }

    /// Keeps the k likeliest tokens. Default 0 = off.
    pub fn top_k(mut self, k: u32) -> Self {
        self.top_k = k;
        self
    }

    /// Drops tokens below this share of the likeliest one's probability. In [0, 1]; default 0 = off.
    pub fn min_p(mut self, share: f32) -> Self {
        self.min_p = share;
        self
    }

    /// Ends a sample beside the model's own EOS ids. Default none.
    pub fn stop_ids(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.stop_ids = ids.into_iter().collect();
        self
    }

    /// Ends a sample where its text holds one of these. Default none.
    pub fn stop_strings<S: Into<String>>(mut self, texts: impl IntoIterator<Item = S>) -> Self {
        self.stop_strings = texts.into_iter().map(Into::into).collect();
        self
    }

    /// Runs on after EOS. Default false.
    pub fn ignore_eos(mut self, ignore: bool) -> Self {
        self.ignore_eos = ignore;
        self
    }

    /// Default 0 = off. Over output tokens, so not replayable: needs [`Replay::RestartOk`].
    pub fn presence_penalty(mut self, penalty: f32) -> Self {
        self.presence_penalty = penalty;
        self
    }

    /// Default 0 = off. Over output tokens, so not replayable: needs [`Replay::RestartOk`].
    pub fn frequency_penalty(mut self, penalty: f32) -> Self {
        self.frequency_penalty = penalty;
        self
    }

    /// Default 1.0 = off.
    pub fn repetition_penalty(mut self, penalty: f32) -> Self {
        self.repetition_penalty = penalty;
        self
    }

    /// Of the group; each sample's own is derived from it. Default: from the job's seed and the key.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Default [`Replay::Strict`].
    pub fn replay(mut self, replay: Replay) -> Self {
        self.replay = replay;
        self
    }

    /// Handed to the engine as it is (a grammar, a thinking budget). Not replayable.
    pub fn extra(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.extra.insert(key.into(), value.into());
        self
    }

    /// What no engine could do is refused here, before anything is sent.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.max_tokens == 0 {
            return Err(Error::invalid("max_tokens is 0; it must be at least 1"));
        }
        if self.min_tokens > self.max_tokens {
            let (min, max) = (self.min_tokens, self.max_tokens);
            return Err(Error::invalid(format!("min_tokens {min} is above max_tokens {max}")));
        }
        check_range("temperature", self.temperature, 0.0..=100.0)?;
        check_range("top_p", self.top_p, f32::MIN_POSITIVE..=1.0)?;
        check_range("min_p", self.min_p, 0.0..=1.0)?;
        check_range("presence_penalty", self.presence_penalty, -2.0..=2.0)?;
        check_range("frequency_penalty", self.frequency_penalty, -2.0..=2.0)?;
        check_range("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE..=10.0)?;
        if self.stop_strings.iter().any(String::is_empty) {
            return Err(Error::invalid(
                "a stop string is empty; it would end every sample at once",
            ));
        }
        Ok(())
    }
}

fn check_range(name: &str, value: f32, range: std::ops::RangeInclusive<f32>) -> Result<(), Error> {
    if range.contains(&value) {
        return Ok(());
    }
    let (low, high) = (range.start(), range.end());
    Err(Error::invalid(match *low == f32::MIN_POSITIVE {
        true => format!("{name} is {value}; it must be above 0 and at most {high}"),
        false => format!("{name} is {value}; it must be from {low} to {high}"),
    }))
}

impl From<Sampling> for pb::Sampling {
    fn from(s: Sampling) -> Self {
        Self {
            max_tokens: s.max_tokens,
            min_tokens: s.min_tokens,
            temperature: Some(s.temperature),
            top_p: Some(s.top_p),
            top_k: s.top_k,
            min_p: s.min_p,
            stop_ids: s.stop_ids,
            stop_strings: s.stop_strings,
            ignore_eos: s.ignore_eos,
            presence_penalty: s.presence_penalty,
            frequency_penalty: s.frequency_penalty,
            repetition_penalty: (s.repetition_penalty != 1.0).then_some(s.repetition_penalty),
            seed: s.seed,
            replay: match s.replay {
                Replay::Strict => pb::Replay::Strict,
                Replay::RestartOk => pb::Replay::RestartOk,
            } as i32,
            extra: s.extra.into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_engine_could_do_is_refused_with_the_bounds() {
        let base = || Sampling::new(8);
        let refused = |s: Sampling| s.check().expect_err("refused").to_string();
        assert!(refused(Sampling::new(0)).contains("at least 1"));
        assert!(refused(base().min_tokens(9)).contains("above max_tokens 8"));
        assert!(refused(base().temperature(f32::NAN)).contains("temperature is NaN"));
        assert!(refused(base().top_p(0.0)).contains("above 0 and at most 1"));
        assert!(refused(base().min_p(1.5)).contains("from 0 to 1"));
        assert!(refused(base().stop_strings([""])).contains("empty"));
        assert!(Sampling::greedy(1).check().is_ok());
    }
}
