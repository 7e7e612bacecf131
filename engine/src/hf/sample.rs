//! The choice of a token: a pure function of the logits, the parameters, the seed and the position in the sequence.
//! A sample that continues elsewhere, or after a retraction, therefore takes the path that it would have taken.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::model::{Made, Sampling};

/// Settings of one choice, and the tokens that may not be chosen.
pub(crate) struct Choice<'a> {
    pub sampling: &'a Sampling,
    pub seed: u64,
    /// Number of tokens before the one that is chosen, prompt included.
    pub position: u64,
    /// Tokens that may not be chosen: the ends, while `min_new_tokens` are not made.
    pub forbidden: &'a [&'a [u32]],
    pub original_logprob: bool,
}

pub(crate) fn choose(logits: &[f32], choice: &Choice<'_>) -> Made {
    let mut logits: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for id in choice.forbidden.iter().copied().flatten() {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit = f64::NEG_INFINITY;
        }
    }
    let temperature = f64::from(choice.sampling.temperature);
    if temperature == 0.0 {
        let token = argmax(&logits);
        return made(token, log_softmax_at(&logits, token));
    }
    let tempered: Vec<f64> = logits.iter().map(|x| x / temperature).collect();
    let uniform = uniform(choice.seed, choice.position);
    let (token, logprob) = draw(&tempered, choice.sampling, uniform);
    made(token, if choice.original_logprob { log_softmax_at(&logits, token) } else { logprob })
}

/// Seed of a request that brought none; its path cannot be repeated.
pub(crate) fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Uniform number in [0, 1) with 53 random bits.
fn uniform(seed: u64, position: u64) -> f64 {
    let bits = splitmix(splitmix(seed).wrapping_add(position));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

fn splitmix(x: u64) -> u64 {
    let mut x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Draws a token by the inverse of the cumulative distribution, in a fixed order; the log-probability is the one before
/// any filter.
fn draw(tempered: &[f64], sampling: &Sampling, uniform: f64) -> (usize, f64) {
    let max = tempered.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = tempered.iter().map(|x| (x - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    let plain = sampling.top_k == 0 && sampling.top_p >= 1.0 && sampling.min_p <= 0.0;
    let token = if plain {
        pick(weights.iter().copied().enumerate(), uniform * total)
    } else {
        let kept = filter(&weights, total, sampling);
        let mass: f64 = kept.iter().map(|&token| weights[token]).sum();
        pick(kept.iter().map(|&token| (token, weights[token])), uniform * mass)
    };
    (token, tempered[token] - max - total.ln())
}

/// Tokens that pass the filters in SGLang's order: by probability, then top-k, top-p over the whole distribution, min-p
/// of the best.
fn filter(weights: &[f64], total: f64, sampling: &Sampling) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k as usize);
    }
    let (top_p, floor) = (f64::from(sampling.top_p), weights[order[0]] * f64::from(sampling.min_p));
    let mut before = 0.0;
    order.retain(|&token| {
        let keep = before / total <= top_p && weights[token] >= floor;
        before += weights[token];
        keep
    });
    order
}

fn pick(weights: impl Iterator<Item = (usize, f64)>, target: f64) -> usize {
    let mut below = 0.0;
    let mut last = 0;
    for (token, weight) in weights {
        if weight > 0.0 {
            below += weight;
            last = token;
            if below > target {
                break;
            }
        }
    }
    last
}

fn argmax(logits: &[f64]) -> usize {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best
}

fn log_softmax_at(logits: &[f64], token: usize) -> f64 {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    logits[token] - max - total.ln()
}

fn made(token: usize, logprob: f64) -> Made {
    Made { token: token as u32, logprob: logprob as f32, extra: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, 0.0];

    fn sampling() -> Sampling {
        Sampling {
            max_new_tokens: 1,
            min_new_tokens: 0,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            stop_token_ids: vec![],
            ignore_eos: false,
            seed: None,
        }
    }

    fn share(sampling: &Sampling, forbidden: &[&[u32]]) -> [f64; 4] {
        let mut counts = [0.0; 4];
        for position in 0..40_000 {
            let choice = Choice { sampling, seed: 5, position, forbidden, original_logprob: false };
            counts[choose(&LOGITS, &choice).token as usize] += 1.0 / 40_000.0;
        }
        counts
    }

    fn close(got: [f64; 4], want: [f64; 4]) {
        assert!(
            got.iter().zip(want).all(|(g, w)| (g - w).abs() < 0.01),
            "{got:?} against {want:?}"
        );
    }

    #[test]
    fn draws_follow_the_distribution_and_its_filters() {
        close(share(&sampling(), &[]), [0.0871, 0.6439, 0.2369, 0.0321]);
        close(share(&Sampling { top_k: 2, ..sampling() }, &[]), [0.0, 0.731, 0.269, 0.0]);
        close(share(&Sampling { top_p: 0.6, ..sampling() }, &[]), [0.0, 1.0, 0.0, 0.0]);
        close(share(&Sampling { top_p: 0.65, ..sampling() }, &[]), [0.0, 0.731, 0.269, 0.0]);
        close(share(&Sampling { min_p: 0.2, ..sampling() }, &[]), [0.0, 0.731, 0.269, 0.0]);
        close(share(&Sampling { temperature: 1e-3, ..sampling() }, &[]), [0.0, 1.0, 0.0, 0.0]);
        close(share(&sampling(), &[&[1]]), [0.2447, 0.0, 0.6652, 0.0900]);
    }

    #[test]
    fn log_probabilities_are_tempered_or_original_as_asked_and_raw_when_greedy() {
        let hot = Sampling { temperature: 2.0, top_k: 1, ..sampling() };
        let logprob = |sampling: &Sampling, original_logprob| {
            let choice =
                Choice { sampling, seed: 5, position: 0, forbidden: &[], original_logprob };
            choose(&LOGITS, &choice).logprob
        };
        assert!((logprob(&hot, false) - 0.4551f32.ln()).abs() < 1e-3);
        assert!((logprob(&hot, true) - 0.6439f32.ln()).abs() < 1e-3);
        assert!(
            (logprob(&Sampling { temperature: 0.0, ..sampling() }, false) - 0.6439f32.ln()).abs()
                < 1e-3
        );
    }

    #[test]
    fn the_path_depends_on_seed_and_position_only() {
        let sampling = sampling();
        let path = |seed| -> Vec<u32> {
            let choose = |position| {
                let choice = Choice {
                    sampling: &sampling,
                    seed,
                    position,
                    forbidden: &[],
                    original_logprob: false,
                };
                choose(&LOGITS, &choice).token
            };
            (0..64).map(choose).collect()
        };
        assert_eq!(path(1), path(1));
        assert_ne!(path(1), path(2));
        assert_ne!(path(1)[1..], path(2)[..63], "neighbouring seeds are not shifted copies");
    }
}
