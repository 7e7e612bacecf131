//! Versions that differ in their content only, and their digests. Made before the transfer sees them.

use anabranch_engine::{TensorContent, content_digest_of};
use anabranch_proto::manifest::DType;
use anabranch_trainer::TensorRef;

use crate::records::Weights;
use crate::rng::Rng;

const TENSORS: u64 = 8;
const COLUMNS: u64 = 1024;

/// One tensor of a version.
pub struct Tensor {
    name: String,
    shape: Vec<u64>,
    data: Vec<u8>,
}

/// Makes version `number` of epoch 0: names and shapes as in every version, other bytes.
pub fn version(seed: u64, number: u64, bytes: u64) -> (Vec<Tensor>, Weights) {
    let rows = (bytes / 4 / COLUMNS / TENSORS).max(1);
    let tensors: Vec<Tensor> = (0..TENSORS).map(|i| tensor(seed, number, i, rows)).collect();
    let digest = content_digest_of(tensors.iter().map(|tensor| TensorContent {
        name: &tensor.name,
        dtype: "F32",
        shape: &tensor.shape,
        data: &tensor.data,
    }));
    (tensors, Weights { epoch: 0, number, digest: hex::encode(digest) })
}

impl Tensor {
    /// The tensor in the form that the SDK publishes.
    pub fn borrow(&self) -> TensorRef<'_> {
        TensorRef { name: &self.name, dtype: DType::F32, shape: &self.shape, data: &self.data }
    }
}

fn tensor(seed: u64, number: u64, index: u64, rows: u64) -> Tensor {
    let mut rng = Rng::new(seed ^ (number << 20) ^ index);
    let words = rows * COLUMNS / 2;
    // Small exponents, so that every word is two ordinary floats.
    let data: Vec<u8> =
        (0..words).flat_map(|_| (rng.next() & 0xbeff_ffff_beff_ffff).to_le_bytes()).collect();
    Tensor { name: format!("layers.{index}.weight"), shape: vec![rows, COLUMNS], data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_have_one_layout_and_their_own_content() {
        let ((a, first), (b, second)) = (version(1, 1, 1 << 20), version(1, 2, 1 << 20));
        assert_ne!(first.digest, second.digest);
        assert_eq!(version(1, 1, 1 << 20).1, first);
        let layout = |tensors: &[Tensor]| {
            tensors
                .iter()
                .map(|t| (t.name.clone(), t.shape.clone(), t.data.len()))
                .collect::<Vec<_>>()
        };
        assert_eq!(layout(&a), layout(&b));
        assert_eq!(a.iter().map(|t| t.data.len()).sum::<usize>(), 1 << 20);
    }
}
