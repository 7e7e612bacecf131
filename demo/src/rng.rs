//! Keyed random numbers: every draw is a function of its key, never of the order of draws.
//!
//! Owns the mixing function that seeds weights, problems and the local sampler. Not the engines'
//! sampling: each engine keys its own.

/// SplitMix64 over a two-part key.
pub fn mix(key: u64, index: u64) -> u64 {
    let mut z = key ^ index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Uniform in (0, 1): never 0, so that its logarithm is finite.
pub fn unit(key: u64, index: u64) -> f64 {
    ((mix(key, index) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Standard normal draws 0..n of the stream `key` (Box-Muller).
pub fn normals(key: u64, n: usize) -> Vec<f32> {
    (0..n as u64)
        .map(|i| {
            let radius = (-2.0 * unit(key, 2 * i).ln()).sqrt();
            (radius * (std::f64::consts::TAU * unit(key, 2 * i + 1)).cos()) as f32
        })
        .collect()
}

/// FNV-1a over bytes: names to keys.
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_draws_have_mean_zero_and_unit_variance() {
        let draws = normals(7, 20_000);
        let mean = draws.iter().sum::<f32>() / draws.len() as f32;
        let var = draws.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / draws.len() as f32;
        assert!(mean.abs() < 0.03, "mean {mean}");
        assert!((var - 1.0).abs() < 0.05, "variance {var}");
    }
}
