//! Every sample that was asked for, and what came of it: exactly once, by whom, with which weights.

use std::collections::BTreeMap;

use anabranch_trainer::{Finish, Trajectory};

/// Sums over all trajectories so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals {
    /// Samples that were asked for.
    pub asked: u64,
    /// Samples that came back, each counted once.
    pub trajectories: u64,
    /// Samples that came a second time.
    pub duplicated: u64,
    /// Samples that were never asked for.
    pub foreign: u64,
    /// Samples that the manager gave up; counted as lost.
    pub abandoned: u64,
    /// Tokens of the trajectories.
    pub tokens: u64,
    /// Times that a sample continued on another engine.
    pub migrations: u64,
    /// Trajectories whose tokens come from more than one engine.
    pub across_engines: u64,
    /// Trajectories whose tokens come from more than one version.
    pub across_versions: u64,
    /// Tokens thrown away by restarts from the prompt.
    pub restarted_tokens: u64,
    /// Largest lag of a token, in versions.
    pub max_lag: u64,
    /// Tokens by the engine that made them.
    pub tokens_by_engine: BTreeMap<String, u64>,
}

/// Every sample that was asked for, and every trajectory that came back.
#[derive(Debug, Default)]
pub struct Book {
    asked: BTreeMap<String, u32>,
    /// Digest of each sample's tokens and log-probabilities, by (step, key, index).
    seen: BTreeMap<(u64, String, u32), blake3::Hash>,
    totals: Totals,
}

impl Book {
    pub(super) fn asked(&mut self, key: &str, n: u32) {
        if self.asked.insert(key.to_owned(), n).is_none() {
            self.totals.asked += u64::from(n);
        }
    }

    pub(super) fn received(&mut self, step: u64, t: &Trajectory) {
        let totals = &mut self.totals;
        if self.asked.get(&t.key).is_none_or(|n| t.index >= *n) {
            totals.foreign += 1;
            return;
        }
        if self.seen.insert((step, t.key.clone(), t.index), digest(t)).is_some() {
            totals.duplicated += 1;
            return;
        }
        totals.trajectories += 1;
        totals.abandoned += u64::from(matches!(t.finish, Finish::Abandoned(_)));
        totals.tokens += t.tokens.len() as u64;
        totals.migrations += u64::from(t.migrations());
        totals.restarted_tokens += u64::from(t.discarded_tokens);
        totals.max_lag = totals.max_lag.max(t.lag().unwrap_or(0));
        let differ = |pair: &[anabranch_trainer::Span]| pair[0].engine != pair[1].engine;
        totals.across_engines += u64::from(t.spans.windows(2).any(differ));
        let differ = |pair: &[anabranch_trainer::Span]| pair[0].version != pair[1].version;
        totals.across_versions += u64::from(t.spans.windows(2).any(differ));
        for span in &t.spans {
            *totals.tokens_by_engine.entry(span.engine.clone()).or_default() += u64::from(span.len);
        }
    }

    /// The sums so far.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Samples that were asked for and did not come back whole.
    pub fn lost(&self) -> u64 {
        self.totals.asked - self.totals.trajectories + self.totals.abandoned
    }

    /// Samples that came more than once, or were never asked for.
    pub fn duplicated(&self) -> u64 {
        self.totals.duplicated + self.totals.foreign
    }

    /// BLAKE3 digest, in hexadecimal, of the tokens and log-probabilities of all trajectories in the order of (step,
    /// key, index).
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for ((step, key, index), hash) in &self.seen {
            hasher.update(&step.to_le_bytes());
            hasher.update(&(key.len() as u64).to_le_bytes());
            hasher.update(key.as_bytes());
            hasher.update(&index.to_le_bytes());
            hasher.update(hash.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

fn digest(t: &Trajectory) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(t.tokens.len() as u64).to_le_bytes());
    t.tokens.iter().for_each(|id| {
        hasher.update(&id.to_le_bytes());
    });
    t.logprobs.iter().for_each(|logprob| {
        hasher.update(&logprob.to_bits().to_le_bytes());
    });
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_trainer::{AttestedBy, Span, Version};

    fn trajectory(key: &str, index: u32, spans: &[(&str, u64, u32)]) -> Trajectory {
        let mut start = 0;
        let span = |(engine, number, len): &(&str, u64, u32)| {
            let span = Span {
                start,
                len: *len,
                engine: (*engine).to_owned(),
                incarnation: 1,
                version: Version { number: *number, ..Version::default() },
                exact: true,
                kv_recomputed: true,
                attested_by: Some(AttestedBy::Transfer),
                numerics: 0,
            };
            start += len;
            span
        };
        let spans: Vec<Span> = spans.iter().map(span).collect();
        Trajectory {
            key: key.to_owned(),
            index,
            tokens: (0..start).collect(),
            logprobs: vec![-0.5; start as usize],
            attempts: spans.len() as u32,
            spans,
            columns: Vec::new(),
            finish: Finish::Length,
            meta: Default::default(),
            seed: 0,
            offered_at: Version::default(),
            numerics: Vec::new(),
            discarded_tokens: 0,
        }
    }

    #[test]
    fn what_is_missing_doubled_foreign_or_given_up_is_counted() {
        let mut book = Book::default();
        book.asked("a", 3);
        book.received(1, &trajectory("a", 0, &[("e1", 0, 4), ("e2", 1, 3)]));
        book.received(1, &trajectory("a", 0, &[("e1", 0, 7)]));
        book.received(1, &trajectory("a", 3, &[("e1", 0, 7)]));
        book.received(1, &trajectory("b", 0, &[("e1", 0, 7)]));
        let given_up = Finish::Abandoned("poison".into());
        book.received(1, &Trajectory { finish: given_up, ..trajectory("a", 1, &[("e1", 0, 1)]) });
        assert_eq!((book.lost(), book.duplicated()), (2, 3));
        let totals = book.totals();
        assert_eq!((totals.tokens, totals.migrations), (8, 1));
        assert_eq!((totals.across_engines, totals.across_versions), (1, 1));
        assert_eq!(totals.tokens_by_engine["e1"], 5);
    }

    #[test]
    fn the_digest_knows_no_order_of_arrival_but_every_bit() {
        let digest = |order: &[u32], logprob: f32| {
            let mut book = Book::default();
            book.asked("a", 2);
            for index in order {
                let mut t = trajectory("a", *index, &[("e1", 0, 2 + index)]);
                t.logprobs[0] = logprob;
                book.received(1, &t);
            }
            book.digest()
        };
        assert_eq!(digest(&[0, 1], -0.5), digest(&[1, 0], -0.5));
        assert_ne!(digest(&[0, 1], -0.5), digest(&[0, 1], -0.500_000_06));
        assert_ne!(digest(&[0, 1], -0.5), digest(&[0], -0.5));
    }
}
