//! The pass over whole sequences, made of operations that candle can differentiate.
//!
//! Owns the mathematics of one decoder. Not the step-by-step decode of generation, which keeps a
//! KV cache (`local`), nor parameters.

use candle_core::{D, Device, Result, Tensor};

use super::ModelConfig;

/// One layer's tensors, matrices as [in, out].
#[derive(Debug, Clone)]
pub struct Layer {
    /// Scale of the norm before attention.
    pub input_norm: Tensor,
    /// Query projection.
    pub q: Tensor,
    /// Key projection.
    pub k: Tensor,
    /// Value projection.
    pub v: Tensor,
    /// Output projection of attention.
    pub o: Tensor,
    /// Scale of the norm before the SwiGLU block.
    pub mlp_norm: Tensor,
    /// Gate projection of the SwiGLU block.
    pub gate: Tensor,
    /// Up projection of the SwiGLU block.
    pub up: Tensor,
    /// Down projection of the SwiGLU block.
    pub down: Tensor,
}

/// All tensors of one version, either tied to the parameters or a frozen copy.
#[derive(Debug, Clone)]
pub struct Weights {
    /// Sizes and constants of the decoder.
    pub config: ModelConfig,
    /// Embedding of the token ids, [vocab, d].
    pub embed: Tensor,
    /// Layers in their order.
    pub layers: Vec<Layer>,
    /// Scale of the final norm.
    pub norm: Tensor,
    /// Output head, [d, vocab].
    pub head: Tensor,
}

impl Weights {
    /// Takes tensors in the order of `Model::parameters`.
    pub(super) fn from_tensors(
        config: &ModelConfig,
        tensor: impl Fn(usize) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut next = 0..;
        let mut take = || tensor(next.next().expect("an endless range"));
        let embed = take()?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for _ in 0..config.num_hidden_layers {
            layers.push(Layer {
                input_norm: take()?,
                q: take()?,
                k: take()?,
                v: take()?,
                o: take()?,
                mlp_norm: take()?,
                gate: take()?,
                up: take()?,
                down: take()?,
            });
        }
        Ok(Self { config: config.clone(), embed, layers, norm: take()?, head: take()? })
    }

    /// Logits [rows.len(), vocab] of the flat positions `rows` (b * T + t) of `ids` [B, T]. Padding goes on the right,
    /// where the causal mask hides it.
    pub fn logits_at(&self, ids: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let (batch, len) = ids.dims2()?;
        let tables = rope_tables(&self.config, 0, len)?;
        let mask = causal_mask(len)?;
        let mut x = self.embed.index_select(&ids.flatten_all()?, 0)?;
        for layer in &self.layers {
            let h = rms_norm(&x, &layer.input_norm, self.config.rms_norm_eps)?;
            x = (x + self.attention(layer, &h, (batch, len), &tables, &mask)?)?;
            x = (&x + layer.mlp(&x, self.config.rms_norm_eps)?)?;
        }
        self.project(&x.index_select(rows, 0)?)
    }

    /// Applies the final norm and the output head to rows [N, d].
    pub fn project(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.norm, self.config.rms_norm_eps)?.matmul(&self.head)
    }

    fn attention(
        &self,
        layer: &Layer,
        h: &Tensor,
        (batch, len): (usize, usize),
        tables: &(Tensor, Tensor),
        mask: &Tensor,
    ) -> Result<Tensor> {
        let (heads, dim) = (self.config.num_attention_heads, self.config.head_dim());
        let split = |x: Tensor| x.reshape((batch, len, heads, dim))?.transpose(1, 2)?.contiguous();
        let q = rotate(&split(h.matmul(&layer.q)?)?, tables)?;
        let k = rotate(&split(h.matmul(&layer.k)?)?, tables)?;
        let v = split(h.matmul(&layer.v)?)?;
        let scores = (q.matmul(&k.t()?)? * (1.0 / (dim as f64).sqrt()))?.broadcast_add(mask)?;
        let mixed = softmax_last(&scores)?.matmul(&v)?;
        mixed.transpose(1, 2)?.reshape((batch * len, heads * dim))?.matmul(&layer.o)
    }
}

impl Layer {
    /// Applies the norm and the SwiGLU block to rows [N, d], without the residual.
    pub fn mlp(&self, x: &Tensor, eps: f64) -> Result<Tensor> {
        let h = rms_norm(x, &self.mlp_norm, eps)?;
        let gate = h.matmul(&self.gate)?.silu()?;
        (gate * h.matmul(&self.up)?)?.matmul(&self.down)
    }
}

/// RMSNorm over the last dimension, scaled by `weight`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&scale)?.broadcast_mul(weight)
}

/// Softmax over the last dimension, with a backward pass, which candle's own `softmax_last_dim` lacks. The maximum is
/// subtracted only to keep `exp` in range.
pub fn softmax_last(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

/// Cosines and sines [len, head_dim / 2] for positions start..start + len.
pub fn rope_tables(config: &ModelConfig, start: usize, len: usize) -> Result<(Tensor, Tensor)> {
    let half = config.head_dim() / 2;
    let angle = |i: usize| {
        let (position, pair) = (start + i / half, i % half);
        position as f64 / config.rope_theta.powf(pair as f64 / half as f64)
    };
    let table = |f: fn(f64) -> f64| -> Result<Tensor> {
        let values: Vec<f32> = (0..len * half).map(|i| f(angle(i)) as f32).collect();
        Tensor::from_vec(values, (len, half), &Device::Cpu)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

/// Rotates [B, H, T, head_dim] in Hugging Face's half-split layout.
pub fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)
}

fn causal_mask(len: usize) -> Result<Tensor> {
    let hidden = |i: usize| if i % len > i / len { f32::NEG_INFINITY } else { 0.0 };
    Tensor::from_vec((0..len * len).map(hidden).collect(), (len, len), &Device::Cpu)
}
