//! Seeds. Every sample has its own, so that siblings never coincide. An engine whose random stream restarts
//! with each request gets one per attempt: resuming there with the same seed would repeat the old noise.

use serde::{Deserialize, Serialize};

use crate::pb;
use crate::wire_enum::{wire, words};

/// Bits of a seed; a JSON number holds so many exactly.
const MASK: u64 = (1 << 53) - 1;

/// How an engine's random numbers depend on the seed that it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeedKeying {
    /// On (seed, position in the sample): a resume with the same seed continues the stream.
    AbsolutePosition,
    /// On (seed, position in the request): a resume needs a seed of its own, see [`of_attempt`].
    Stream,
    /// Not at all: the engine ignores seeds.
    Unkeyed,
}

words!(SeedKeying, "seed_keying", {
    AbsolutePosition => "absolute_position", Stream => "stream", Unkeyed => "unkeyed",
});
wire!(SeedKeying, pb::caps::SeedKeying, "caps.seed_keying", {
    AbsolutePosition => AbsolutePosition, Stream => Stream, Unkeyed => None,
});

/// Seed of sample `index` of the group with key `key`.
pub fn of_sample(job_seed: u64, key: &str, index: u32) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("anabranch 2026 sample seed");
    hasher.update(&job_seed.to_le_bytes());
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key.as_bytes());
    hasher.update(&index.to_le_bytes());
    first_word(&hasher)
}

/// Seed of one attempt, for engines whose stream restarts with each request ([`SeedKeying::Stream`]).
pub fn of_attempt(sample_seed: u64, attempt: u32) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("anabranch 2026 attempt seed");
    hasher.update(&sample_seed.to_le_bytes());
    hasher.update(&attempt.to_le_bytes());
    first_word(&hasher)
}

fn first_word(hasher: &blake3::Hasher) -> u64 {
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    u64::from_le_bytes(word) & MASK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_groups_jobs_and_attempts_never_share_a_seed() {
        let mut seen = std::collections::BTreeSet::new();
        for job in 0..3 {
            for key in ["a", "b", "ab"] {
                for index in 0..16 {
                    let seed = of_sample(job, key, index);
                    assert!(seen.insert(seed));
                    assert!(seen.insert(of_attempt(seed, 2)));
                }
            }
        }
    }
}
