//! Weights that look like a model's to a codec: bf16, normal, some of them moved by one step. The same seed gives the
//! same bytes in every process. Owns their memory; knows nothing of versions.

use anabranch_proto::manifest::DType;
use anabranch_transfer::TensorRef;

use crate::rng::Rng;

const TENSOR_BYTES: u64 = 8 << 20;
const COLUMNS: u64 = 1024;
/// Standard deviation of the weights.
const SIGMA: f64 = 0.02;

/// Tensors of one version.
pub struct Model {
    tensors: Vec<Tensor>,
}

struct Tensor {
    name: String,
    shape: [u64; 2],
    data: Vec<u8>,
}

// === impl Model ===

impl Model {
    /// Makes `bytes` of weights, rounded up to whole rows.
    pub fn new(bytes: u64, seed: u64) -> Model {
        let row = 2 * COLUMNS;
        let mut left = bytes.div_ceil(row).max(1) * row;
        let mut tensors = Vec::new();
        while left > 0 {
            let len = left.min(TENSOR_BYTES);
            left -= len;
            let name = format!("layers.{:05}.weight", tensors.len());
            let (shape, data) = ([len / row, COLUMNS], vec![0; len as usize]);
            tensors.push(Tensor { name, shape, data });
        }
        let mut model = Model { tensors };
        model.renew(seed);
        model
    }

    /// Makes all elements anew, in the same memory.
    pub fn renew(&mut self, seed: u64) {
        let table = normals();
        for (nth, tensor) in self.tensors.iter_mut().enumerate() {
            let mut rng = Rng::new(seed.wrapping_mul(0x1_0001) ^ ((nth as u64) << 32));
            for four in tensor.data.chunks_exact_mut(8) {
                let word = rng.next();
                for (at, out) in four.chunks_exact_mut(2).enumerate() {
                    let pick = (word >> (16 * at)) as u16;
                    out.copy_from_slice(&table[usize::from(pick)].to_le_bytes());
                }
            }
        }
    }

    /// Size of all tensors in bytes.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.data.len() as u64).sum()
    }

    /// Makes the next version's weights: `old` with a share of its elements moved, or all of them anew. Also returns
    /// the share that really changed.
    pub fn next(old: Option<Model>, bytes: u64, seed: u64, changed: Option<f64>) -> (Model, f64) {
        match (old, changed) {
            (Some(mut model), Some(share)) => {
                let moved = model.step(share, seed);
                (model, moved)
            }
            (Some(mut model), None) if model.bytes() == bytes => {
                model.renew(seed);
                (model, 1.0)
            }
            _ => (Model::new(bytes, seed), 1.0),
        }
    }

    /// Moves about `share` of the elements to the next value up or down. Returns the share that really moved.
    pub fn step(&mut self, share: f64, seed: u64) -> f64 {
        let (mut moved, mut all) = (0u64, 0u64);
        let gap = (2.0 / share.clamp(1e-9, 1.0)) as u64;
        let mut rng = Rng::new(seed ^ 0x5eed);
        for tensor in &mut self.tensors {
            let elements = tensor.data.len() as u64 / 2;
            all += elements;
            let mut at = rng.range(0, gap);
            while at < elements {
                let two = &mut tensor.data[2 * at as usize..][..2];
                let old = u16::from_le_bytes([two[0], two[1]]);
                // Magnitudes stay inside the normals: no sign changes, no infinities.
                let by = if rng.next() & 1 == 0 { 1 } else { u16::MAX };
                let new = old.wrapping_add(by);
                two.copy_from_slice(&new.to_le_bytes());
                moved += 1;
                at += 1 + rng.range(0, gap.max(2) - 1);
            }
        }
        moved as f64 / all as f64
    }

    /// The tensors in the form that the SDK publishes.
    pub fn refs(&self) -> Vec<TensorRef<'_>> {
        self.tensors.iter().map(Tensor::as_ref).collect()
    }

    /// Digest of every tensor's name and bytes, in the order of the names.
    pub fn digest(&self) -> String {
        digest(self.tensors.iter().map(|t| (t.name.as_str(), &t.data[..])))
    }
}

impl Tensor {
    fn as_ref(&self) -> TensorRef<'_> {
        TensorRef { name: &self.name, dtype: DType::BF16, shape: &self.shape, data: &self.data }
    }
}

/// Digest of names and bytes; the names must come in order.
pub fn digest<'a>(tensors: impl Iterator<Item = (&'a str, impl AsRef<[u8]>)>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, data) in tensors {
        let data = data.as_ref();
        hasher.update(name.as_bytes()).update(&(data.len() as u64).to_le_bytes()).update(data);
    }
    hasher.finalize().to_hex().to_string()
}

/// 2^16 values of a normal distribution, as bf16.
fn normals() -> Vec<u16> {
    let mut rng = Rng::new(0xb16);
    let unit = |word: u64| ((word >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let one = |_| {
        let (a, b) = (unit(rng.next()), unit(rng.next()));
        let value = SIGMA * (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos();
        ((value as f32).to_bits() >> 16) as u16
    };
    (0..1 << 16).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_a_step_moves_the_share_asked_for() {
        let (mut a, b) = (Model::new(9 << 20, 7), Model::new(9 << 20, 7));
        assert_eq!(a.digest(), b.digest());
        assert_ne!(a.digest(), Model::new(9 << 20, 8).digest());
        assert_eq!(a.refs().iter().map(|t| t.data.len()).sum::<usize>(), 9 << 20);
        let share = a.step(0.01, 1);
        assert!((share - 0.01).abs() < 0.001, "{share}");
        assert_ne!(a.digest(), b.digest());
        let close = |x: &[u8], y: &[u8]| {
            let v = |b: &[u8]| i32::from(u16::from_le_bytes([b[0], b[1]]));
            x.chunks(2).zip(y.chunks(2)).all(|(x, y)| (v(x) - v(y)).abs() <= 1)
        };
        assert!(a.refs().iter().zip(b.refs()).all(|(x, y)| close(x.data, y.data)));
    }
}
