//! The oracle: every token of the `synthetic` model is a pure function of the seed, of every token before it and of
//! the weights digest. Owns that function and nothing else; the engine calls it to generate, a verifier calls it to
//! recompute a trajectory from its prompt and its weight spans. No I/O, no clock, no state.
//!
//! `h_0 = H(seed)`, `h_{i+1} = H(h_i, token_i)` over every token, given or made; token `i`, its log-probability and
//! its extra column follow from `(h_i, weights digest)`. So a lost, doubled, swapped or foreign token anywhere in
//! the past, a wrong seed or a wrong weight version changes everything after it.

use serde::{Deserialize, Serialize};

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const LOGPROB_RANGE: u64 = 12;
/// Steps of a log-probability per unit: multiples of 2^-16 are exact in an f32 and short in JSON.
const LOGPROB_STEPS_PER_UNIT: u64 = 1 << 16;

/// Settings of the oracle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SyntheticParams {
    /// Number of token ids; default 32,000.
    pub vocab: u32,
    /// Token id that ends an answer; default 2.
    pub eos_id: u32,
    /// Mean of the geometric length distribution, in tokens; default `None`: no answer ends by EOS.
    pub mean_len: Option<u32>,
}

impl Default for SyntheticParams {
    fn default() -> Self {
        Self { vocab: 32_000, eos_id: 2, mean_len: None }
    }
}

/// The running hash over the seed and every token of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Chain(u64);

impl Chain {
    /// The chain before any token. A request without a `sampling_seed` runs as seed 0.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed ^ GOLDEN))
    }

    /// The chain after one more token.
    #[must_use]
    pub fn push(self, token: u32) -> Self {
        // Bijective in the state for each token: two different pasts never merge on the same tokens.
        Self(mix(self.0.wrapping_add(GOLDEN)
            ^ (u64::from(token) + 1).wrapping_mul(0xd6e8_feb8_6659_fd93)))
    }

    /// The chain after all of `tokens`.
    #[must_use]
    pub fn extend(self, tokens: &[u32]) -> Self {
        tokens.iter().fold(self, |chain, &token| chain.push(token))
    }
}

/// Digest of the weights, folded once so that a token costs a few multiplications.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightsKey([u64; 4]);

impl WeightsKey {
    /// Folds a digest.
    pub fn new(digest: &[u8; 32]) -> Self {
        let word = |i: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&digest[i * 8..i * 8 + 8]);
            u64::from_le_bytes(bytes)
        };
        Self([word(0), word(1), word(2), word(3)])
    }
}

/// One token with its columns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Made {
    /// The token's id.
    pub token: u32,
    /// Log-probability in (-12, 0], a multiple of 2^-16.
    pub logprob: f32,
    /// The extra column, sent if a request asks for it (`return_extra`).
    pub extra: u32,
}

/// The token that follows `chain` under these weights; never the EOS with `ignore_eos`.
pub fn next(chain: Chain, weights: WeightsKey, params: SyntheticParams, ignore_eos: bool) -> Made {
    let [w0, w1, w2, w3] = weights.0;
    let end = mix(mix(chain.0 ^ w0).wrapping_add(w1));
    let pick = mix(end.wrapping_add(GOLDEN) ^ w2);
    let rest = mix(pick.wrapping_add(GOLDEN) ^ w3);
    let ends =
        !ignore_eos && params.mean_len.is_some_and(|mean| below(end, u64::from(mean.max(1))) == 0);
    Made {
        token: if ends { params.eos_id } else { other_than_eos(pick, params) },
        logprob: 0.0
            - below(rest, LOGPROB_RANGE * LOGPROB_STEPS_PER_UNIT) as f32
                / LOGPROB_STEPS_PER_UNIT as f32,
        extra: rest as u32,
    }
}

/// The digest of the weights that a synthetic engine starts with, before any update.
pub fn base_digest() -> [u8; 32] {
    *blake3::hash(b"anabranch synthetic base weights, 1").as_bytes()
}

fn other_than_eos(bits: u64, params: SyntheticParams) -> u32 {
    if params.eos_id >= params.vocab {
        return below(bits, u64::from(params.vocab.max(1))) as u32;
    }
    let token = below(bits, u64::from(params.vocab.saturating_sub(1).max(1))) as u32;
    if token >= params.eos_id { token + 1 } else { token }
}

/// Uniform number in `[0, bound)` from the high half of a widening product: no division, and a negligible modulo bias.
fn below(bits: u64, bound: u64) -> u64 {
    ((u128::from(bits) * u128::from(bound)) >> 64) as u64
}

/// The splitmix64 finalizer: a bijection with full avalanche.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PARAMS: SyntheticParams =
        SyntheticParams { vocab: 32_000, eos_id: 2, mean_len: Some(64) };

    fn generate(seed: u64, past: &[u32], digest: [u8; 32], count: usize) -> Vec<Made> {
        let key = WeightsKey::new(&digest);
        let mut chain = Chain::new(seed).extend(past);
        (0..count)
            .map(|_| {
                let made = next(chain, key, PARAMS, true);
                chain = chain.push(made.token);
                made
            })
            .collect()
    }

    proptest! {
        #[test]
        fn changing_dropping_doubling_or_swapping_any_token_changes_what_follows(
            seed: u64, past in prop::collection::vec(0u32..32_000, 2..60), at: prop::sample::Index, by in 1u32..31_999,
        ) {
            let truth = generate(seed, &past, base_digest(), 4);
            let at = at.index(past.len());
            let mut changed = past.clone();
            changed[at] = (changed[at] + by) % 32_000;
            prop_assert_ne!(&generate(seed, &changed, base_digest(), 4), &truth);
            let mut dropped = past.clone();
            dropped.remove(at);
            prop_assert_ne!(&generate(seed, &dropped, base_digest(), 4), &truth);
            let mut doubled = past.clone();
            doubled.insert(at, past[at]);
            prop_assert_ne!(&generate(seed, &doubled, base_digest(), 4), &truth);
            let mut swapped = past.clone();
            swapped.swap(at, (at + 1) % past.len());
            if swapped != past {
                prop_assert_ne!(&generate(seed, &swapped, base_digest(), 4), &truth);
            }
        }

        #[test]
        fn another_seed_or_any_flipped_bit_of_the_digest_changes_what_follows(
            seed: u64, other: u64, past in prop::collection::vec(0u32..32_000, 1..20), bit in 0usize..256,
        ) {
            let truth = generate(seed, &past, base_digest(), 4);
            if other != seed {
                prop_assert_ne!(&generate(other, &past, base_digest(), 4), &truth);
            }
            let mut digest = base_digest();
            digest[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(&generate(seed, &past, digest, 4), &truth);
        }

        #[test]
        fn a_resume_from_prompt_and_kept_tokens_takes_the_same_path(seed: u64, cut in 0usize..32) {
            let whole = generate(seed, &[5, 6, 7], base_digest(), 32);
            let mut past = vec![5, 6, 7];
            past.extend(whole[..cut].iter().map(|made| made.token));
            prop_assert_eq!(&generate(seed, &past, base_digest(), 32 - cut)[..], &whole[cut..]);
        }
    }

    #[test]
    fn log_probabilities_are_exact_and_tokens_stay_in_the_vocabulary() {
        for made in generate(9, &[1], base_digest(), 20_000) {
            assert!(made.logprob > -12.0 && made.logprob <= 0.0, "{made:?}");
            assert_eq!(made.logprob * 65_536.0, (made.logprob * 65_536.0).trunc());
            assert!(made.token < 32_000 && made.token != 2, "{made:?}");
        }
    }

    #[test]
    fn lengths_follow_the_mean_and_eos_is_never_made_when_ignored() {
        let key = WeightsKey::new(&base_digest());
        let mut lengths = 0u64;
        for seed in 0..4_000 {
            let mut chain = Chain::new(seed);
            loop {
                lengths += 1;
                let made = next(chain, key, PARAMS, false);
                if made.token == PARAMS.eos_id {
                    break;
                }
                assert_eq!(
                    made,
                    next(chain, key, PARAMS, true),
                    "ignoring EOS changes only the EOS itself"
                );
                chain = chain.push(made.token);
            }
        }
        let mean = lengths as f64 / 4_000.0;
        assert!((60.0..68.0).contains(&mean), "mean {mean}");
    }

    #[test]
    fn tiny_vocabularies_work() {
        let params = SyntheticParams { vocab: 2, eos_id: 0, mean_len: None };
        let key = WeightsKey::new(&base_digest());
        assert_eq!(next(Chain::new(1), key, params, false).token, 1);
    }
}
