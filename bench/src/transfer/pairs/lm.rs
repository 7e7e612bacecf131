//! A decoder-only language model over bytes, made of operations that candle can differentiate. Weights are fp32.

use candle_core::{D, Device, Result, Tensor, Var};

use crate::rng::Rng;

/// The model in words.
pub const ABOUT: &str = "decoder of bytes, 7 layers, width 512, 8 heads, GELU";
/// Rows of one step.
pub const BATCH: usize = 2;
/// Length of a row in bytes.
pub const LEN: usize = 64;
const LAYERS: usize = 7;
const WIDTH: usize = 512;
const HEADS: usize = 8;
const VOCAB: usize = 256;
/// Standard deviation of the initial weights.
const SIGMA: f64 = 0.02;
const HIDDEN: f32 = -1e9;

/// The weights of the model.
pub struct Lm {
    /// Parameters by name, in the order of use.
    vars: Vec<(String, Var)>,
    mask: Tensor,
}

// === impl Lm ===

impl Lm {
    /// Random weights, always the same.
    pub fn new() -> Result<Lm> {
        let mut rng = Rng::new(0x11);
        let mut vars = Vec::new();
        let mut matrix = |name: String, rows, columns| {
            let values: Vec<f32> = (0..rows * columns).map(|_| normal(&mut rng)).collect();
            let values = Tensor::from_vec(values, (rows, columns), &Device::Cpu)?;
            vars.push((name, Var::from_tensor(&values)?));
            Result::Ok(())
        };
        matrix("embed.weight".into(), VOCAB, WIDTH)?;
        matrix("position.weight".into(), LEN, WIDTH)?;
        for layer in 0..LAYERS {
            for part in ["q", "k", "v", "o"] {
                matrix(format!("layers.{layer}.{part}.weight"), WIDTH, WIDTH)?;
            }
            matrix(format!("layers.{layer}.up.weight"), WIDTH, 4 * WIDTH)?;
            matrix(format!("layers.{layer}.down.weight"), 4 * WIDTH, WIDTH)?;
        }
        matrix("head.weight".into(), WIDTH, VOCAB)?;
        for layer in 0..2 * LAYERS + 1 {
            let ones = Tensor::ones(WIDTH, candle_core::DType::F32, &Device::Cpu)?;
            vars.push((format!("norms.{layer}.weight"), Var::from_tensor(&ones)?));
        }
        let hidden = |at: usize| if at % LEN > at / LEN { HIDDEN } else { 0.0 };
        let mask: Vec<f32> = (0..LEN * LEN).map(hidden).collect();
        Ok(Lm { vars, mask: Tensor::from_vec(mask, (LEN, LEN), &Device::Cpu)? })
    }

    /// The parameters by name.
    pub fn vars(&self) -> &[(String, Var)] {
        &self.vars
    }

    /// Number of trainable numbers.
    pub fn parameters(&self) -> usize {
        self.vars.iter().map(|(_, var)| var.elem_count()).sum()
    }

    /// Cross entropy of `BATCH` rows of `LEN + 1` bytes, per byte.
    pub fn loss(&self, bytes: &[u8]) -> Result<Tensor> {
        let rows = || bytes.chunks_exact(LEN + 1);
        let ids = |skip: usize| {
            let ids: Vec<u32> =
                rows().flat_map(|r| &r[skip..skip + LEN]).map(|b| u32::from(*b)).collect();
            Tensor::from_vec(ids, BATCH * LEN, &Device::Cpu)
        };
        let mut vars = self.vars.iter().map(|(_, var)| var.as_tensor());
        let mut norms = vars.clone().rev().take(2 * LAYERS + 1);
        let mut take = || vars.next().expect("a tensor for each use");
        let mut norm = || norms.next().expect("a norm for each use");
        let (embed, position) = (take(), take());
        let position = position.unsqueeze(0)?.broadcast_as((BATCH, LEN, WIDTH))?.contiguous()?;
        let mut x = (embed.index_select(&ids(0)?, 0)? + position.reshape(((), WIDTH))?)?;
        for _ in 0..LAYERS {
            let weights = [take(), take(), take(), take()];
            x = (&x + self.attention(weights, &rms_norm(&x, norm())?)?)?;
            let inner = rms_norm(&x, norm())?.matmul(take())?.gelu()?;
            x = (&x + inner.matmul(take())?)?;
        }
        let logits = rms_norm(&x, norm())?.matmul(take())?;
        candle_nn::loss::cross_entropy(&logits, &ids(1)?)
    }

    fn attention(&self, [q, k, v, o]: [&Tensor; 4], h: &Tensor) -> Result<Tensor> {
        let shape = (BATCH, LEN, HEADS, WIDTH / HEADS);
        let split = |w: &Tensor| h.matmul(w)?.reshape(shape)?.transpose(1, 2)?.contiguous();
        let (q, k, v) = (split(q)?, split(k)?, split(v)?);
        let scores = (q.matmul(&k.t()?)? * (1.0 / ((WIDTH / HEADS) as f64).sqrt()))?;
        // `softmax_last_dim` has no backward pass.
        let shares = candle_nn::ops::softmax(&scores.broadcast_add(&self.mask)?, D::Minus1)?;
        shares.matmul(&v)?.transpose(1, 2)?.reshape(((), WIDTH))?.matmul(o)
    }
}

fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
    x.broadcast_div(&scale)?.broadcast_mul(weight)
}

fn normal(rng: &mut Rng) -> f32 {
    let mut unit = || ((rng.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let (a, b) = (unit(), unit());
    (SIGMA * (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
}
