//! Keyed random numbers: every draw is a function of its key, never of the order of draws. Keys go through BLAKE3.
//!
//! Seeds weights, problems and the local sampler. Not the engines' sampling: each engine keys its own.

/// Draw `index` of the stream `key`.
pub fn mix(key: u64, index: u64) -> u64 {
    hash_bytes([key.to_le_bytes(), index.to_le_bytes()].as_flattened())
}

/// Uniform in (0, 1): never 0, so that its logarithm is finite.
pub fn unit(key: u64, index: u64) -> f64 {
    ((mix(key, index) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Standard normal draws 0..n of the stream `key` (Box-Muller).
pub fn normals(key: u64, n: usize) -> Vec<f32> {
    let mut draws = fastrand::Rng::with_seed(key);
    let mut normal = || {
        // 1 - [0, 1) is never 0, so that its logarithm is finite.
        let radius = (-2.0 * (1.0 - draws.f64()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * draws.f64()).cos()) as f32
    };
    (0..n).map(|_| normal()).collect()
}

/// Key of a name: the first eight bytes of the name's BLAKE3 digest.
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    let digest = blake3::hash(bytes);
    u64::from_le_bytes(*digest.as_bytes().first_chunk().expect("a digest has 32 bytes"))
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
