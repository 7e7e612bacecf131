//! The decoder's forward pass: Llama, Qwen2 and Qwen3 over rows of several sequences at once. Matrix products are
//! candle's; everything that mixes positions (norms, rotary, attention) goes row by row in a fixed order, so that a
//! row's result is the same alone, in a batch, in a prefill and in a decode.

use candle_core::{Device, Tensor};

use super::config::HfConfig;
use super::load::{HfWeights, Layer, Linear};

/// Fewest rows of one product: below 2, gemm takes another path with another order of additions.
const MIN_ROWS: usize = 2;
/// Most rows of one product: a fixed bound keeps gemm's blocking the same for long prefills.
const MAX_ROWS: usize = 256;
/// Number of partial sums of a dot product: enough for the widest vector registers, always in the same order.
const DOT_LANES: usize = 16;

/// Keys and values of one sequence, `[position, kv_heads * head_dim]` for each layer.
#[derive(Clone, Debug, Default)]
pub(crate) struct KvCache {
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    pub len: usize,
}

impl KvCache {
    pub fn new(config: &HfConfig) -> Self {
        Self { layers: vec![(Vec::new(), Vec::new()); config.layers], len: 0 }
    }
}

/// Cosine and sine of every rotary angle at one position.
struct Rotary {
    inverse_frequencies: Vec<f32>,
}

pub(crate) struct Decoder {
    config: HfConfig,
    rotary: Rotary,
}

/// Tokens that one sequence feeds in this pass.
pub(crate) struct Feed<'a> {
    pub kv: &'a mut KvCache,
    pub tokens: &'a [u32],
}

impl Decoder {
    pub fn new(config: HfConfig) -> Self {
        let half = config.head_dim / 2;
        let inverse =
            |i| 1.0 / (config.rope_theta as f32).powf(2.0 * i as f32 / config.head_dim as f32);
        let rotary = Rotary { inverse_frequencies: (0..half).map(inverse).collect() };
        Self { config, rotary }
    }

    pub fn config(&self) -> &HfConfig {
        &self.config
    }

    /// Puts the tokens into the caches; with `logits`, returns the `[feeds, vocab]` logits after each feed's last
    /// token.
    pub fn forward(
        &self,
        weights: &HfWeights,
        feeds: &mut [Feed<'_>],
        logits: bool,
    ) -> candle_core::Result<Option<Vec<f32>>> {
        let h = self.config.hidden;
        let mut x = self.embed(weights, feeds);
        for (i, layer) in weights.layers.iter().enumerate() {
            // A prefill wants only keys and values: after the last layer's there is nothing more to compute.
            let done = !logits && i + 1 == weights.layers.len();
            self.layer(layer, i, feeds, &mut x, done)?;
        }
        feeds.iter_mut().for_each(|feed| feed.kv.len += feed.tokens.len());
        if !logits {
            return Ok(None);
        }
        let mut last = Vec::with_capacity(feeds.len() * h);
        let mut row = 0;
        for feed in feeds.iter() {
            row += feed.tokens.len();
            last.extend_from_slice(&x[(row - 1) * h..row * h]);
        }
        let normed = self.norm_rows(&last, &weights.norm);
        Ok(Some(apply(&weights.head, &normed)?))
    }

    fn embed(&self, weights: &HfWeights, feeds: &[Feed<'_>]) -> Vec<f32> {
        let h = self.config.hidden;
        let tokens = feeds.iter().flat_map(|feed| feed.tokens);
        tokens
            .flat_map(|&token| &weights.embed[token as usize * h..(token as usize + 1) * h])
            .copied()
            .collect()
    }

    fn layer(
        &self,
        layer: &Layer,
        index: usize,
        feeds: &mut [Feed<'_>],
        x: &mut [f32],
        only_kv: bool,
    ) -> candle_core::Result<()> {
        let mut qkv = apply(&layer.qkv, &self.norm_rows(x, &layer.input_norm))?;
        self.cache(layer, index, feeds, &mut qkv);
        if only_kv {
            return Ok(());
        }
        let attended = self.attend(index, feeds, &qkv);
        add(x, &apply(&layer.out, &attended)?);
        let gate_up = apply(&layer.gate_up, &self.norm_rows(x, &layer.post_norm))?;
        add(x, &apply(&layer.down, &self.gated(&gate_up))?);
        Ok(())
    }

    /// Applies norm and rotation to q and k in place, and appends k and v to the caches.
    fn cache(&self, layer: &Layer, index: usize, feeds: &mut [Feed<'_>], qkv: &mut [f32]) {
        let config = &self.config;
        let (d, q_len, kv_len) =
            (config.head_dim, config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let mut rows = qkv.chunks_exact_mut(q_len + 2 * kv_len);
        for feed in feeds {
            for offset in 0..feed.tokens.len() {
                let row = rows.next().expect("one row for each token");
                let (q, kv) = row.split_at_mut(q_len);
                let (k, v) = kv.split_at_mut(kv_len);
                for (part, norm) in [(&mut *q, &layer.q_norm), (&mut *k, &layer.k_norm)] {
                    for head in part.chunks_exact_mut(d) {
                        if let Some(norm) = norm {
                            let normed = norm_row(head, norm, config.rms_eps);
                            head.copy_from_slice(&normed);
                        }
                        self.rotary.rotate(head, feed.kv.len + offset);
                    }
                }
                let (keys, values) = &mut feed.kv.layers[index];
                keys.extend_from_slice(k);
                values.extend_from_slice(v);
            }
        }
    }

    fn attend(&self, index: usize, feeds: &[Feed<'_>], qkv: &[f32]) -> Vec<f32> {
        let config = &self.config;
        let (d, q_len, kv_len) =
            (config.head_dim, config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let group = config.heads / config.kv_heads;
        let scale = 1.0 / (d as f32).sqrt();
        let rows: usize = feeds.iter().map(|feed| feed.tokens.len()).sum();
        let mut out = vec![0.0; rows * q_len];
        let mut scores = Vec::new();
        let mut row = 0;
        for feed in feeds {
            let (keys, values) = &feed.kv.layers[index];
            for offset in 0..feed.tokens.len() {
                let seen = feed.kv.len + offset + 1;
                let q = &qkv[row * (q_len + 2 * kv_len)..][..q_len];
                for head in 0..config.heads {
                    let first = head / group * d;
                    scores.clear();
                    let q = &q[head * d..(head + 1) * d];
                    scores.extend(
                        (0..seen).map(|at| dot(q, &keys[at * kv_len + first..][..d]) * scale),
                    );
                    softmax(&mut scores);
                    let out = &mut out[row * q_len + head * d..][..d];
                    for (at, &weight) in scores.iter().enumerate() {
                        let value = &values[at * kv_len + first..][..d];
                        out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * value);
                    }
                }
                row += 1;
            }
        }
        out
    }

    fn gated(&self, gate_up: &[f32]) -> Vec<f32> {
        let m = self.config.intermediate;
        let mut out = Vec::with_capacity(gate_up.len() / 2);
        for row in gate_up.chunks_exact(2 * m) {
            let (gate, up) = row.split_at(m);
            out.extend(gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u));
        }
        out
    }

    fn norm_rows(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        x.chunks_exact(weight.len())
            .flat_map(|row| norm_row(row, weight, self.config.rms_eps))
            .collect()
    }
}

impl Rotary {
    /// Rotates one head in Hugging Face's halves: element i turns with element i + d/2.
    fn rotate(&self, head: &mut [f32], position: usize) {
        let (low, high) = head.split_at_mut(head.len() / 2);
        for ((low, high), frequency) in low.iter_mut().zip(high).zip(&self.inverse_frequencies) {
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }
}

/// Computes `x [rows, K] @ weight [K, N] + bias`, in products of at least two rows.
pub(crate) fn apply(linear: &Linear, x: &[f32]) -> candle_core::Result<Vec<f32>> {
    let rows = x.len() / linear.inputs;
    let mut out = Vec::with_capacity(rows.max(MIN_ROWS) * linear.outputs);
    for block in x.chunks(MAX_ROWS * linear.inputs) {
        let count = block.len() / linear.inputs;
        let mut block = block.to_vec();
        block.resize(count.max(MIN_ROWS) * linear.inputs, 0.0);
        let product = Tensor::from_vec(block, (count.max(MIN_ROWS), linear.inputs), &Device::Cpu)?
            .matmul(&linear.weight)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        out.extend_from_slice(&product[..count * linear.outputs]);
    }
    if let Some(bias) = &linear.bias {
        out.chunks_exact_mut(linear.outputs).for_each(|row| add(row, bias));
    }
    Ok(out)
}

fn norm_row(row: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let scale = 1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt();
    row.iter().zip(weight).map(|(x, w)| w * (x * scale)).collect()
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    scores.iter_mut().for_each(|score| *score /= sum);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; DOT_LANES];
    let (a_wide, a_rest) = a.as_chunks::<DOT_LANES>();
    let (b_wide, b_rest) = b.as_chunks::<DOT_LANES>();
    for (a, b) in a_wide.iter().zip(b_wide) {
        for i in 0..DOT_LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let wide: f32 = lanes.iter().sum();
    wide + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}
