//! A batched sampler in the trainer's own process.
//!
//! Owns generation without a fleet: recipe search, tests, and a reference for what engines make.
//! The demo's own rollouts never come from here.

use std::collections::BTreeMap;

use candle_core::{D, Result, Tensor};

use crate::model::{Weights, id_tensor, rms_norm, rope_tables, rotate, softmax_last};
use crate::rng::unit;

/// Rule by which the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The most probable token.
    Greedy,
    /// Sampling at temperature 1, keyed by (seed, position): a resumed sample takes the same path.
    Sampled,
}

/// One answer to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Tokens of an earlier attempt, which the answer continues.
    pub kept: Vec<u32>,
    /// Natural log-probability of each token in `kept`.
    pub kept_logprobs: Vec<f32>,
    /// Key of the answer's random numbers.
    pub seed: u64,
    /// Longest answer in tokens, kept tokens included.
    pub max_tokens: usize,
}

/// One generated answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Token ids, kept tokens included.
    pub tokens: Vec<u32>,
    /// Natural log-probability of each token, at temperature 1.
    pub logprobs: Vec<f32>,
}

/// Generates all answers, in the order of `requests`; requests of one length run as one batch. Fails if candle does.
pub fn generate(weights: &Weights, requests: &[Request], choice: Choice) -> Result<Vec<Answer>> {
    let mut by_length: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (i, request) in requests.iter().enumerate() {
        by_length.entry(request.prompt.len() + request.kept.len()).or_default().push(i);
    }
    let mut answers: Vec<Answer> = requests
        .iter()
        .map(|r| Answer { tokens: r.kept.clone(), logprobs: r.kept_logprobs.clone() })
        .collect();
    for members in by_length.values() {
        let open = |i: &usize| !finished(weights, &requests[*i], &answers[*i]);
        let open: Vec<usize> = members.iter().copied().filter(open).collect();
        if !open.is_empty() {
            generate_batch(weights, requests, open, choice, &mut answers)?;
        }
    }
    Ok(answers)
}

fn finished(weights: &Weights, request: &Request, answer: &Answer) -> bool {
    answer.tokens.len() >= request.max_tokens
        || answer.tokens.last() == Some(&weights.config.eos_token_id)
}

fn generate_batch(
    weights: &Weights,
    requests: &[Request],
    mut open: Vec<usize>,
    choice: Choice,
    answers: &mut [Answer],
) -> Result<()> {
    let mut cache = Cache::new(weights);
    let first: Vec<u32> = open
        .iter()
        .flat_map(|i| requests[*i].prompt.iter().chain(&requests[*i].kept).copied())
        .collect();
    let width = first.len() / open.len();
    let mut logits = cache.feed(&id_tensor(first, width)?)?;
    loop {
        let mut staying: Vec<u32> = Vec::new();
        let mut still_open = Vec::new();
        for (row, (i, row_logits)) in open.iter().zip(logits.to_vec2::<f32>()?).enumerate() {
            let answer = &mut answers[*i];
            let draw = unit(requests[*i].seed, answer.tokens.len() as u64);
            let (token, logprob) = choose(&row_logits, choice, draw);
            answer.tokens.push(token);
            answer.logprobs.push(logprob);
            if !finished(weights, &requests[*i], answer) {
                staying.push(row as u32);
                still_open.push(*i);
            }
        }
        if still_open.is_empty() {
            return Ok(());
        }
        if still_open.len() < open.len() {
            cache.keep_rows(&Tensor::new(staying, logits.device())?)?;
            open = still_open;
        }
        let last = |i: &usize| *answers[*i].tokens.last().expect("a token was just added");
        logits = cache.feed(&id_tensor(open.iter().map(last).collect(), 1)?)?;
    }
}

/// The chosen token and its log-probability at temperature 1, in f64 and in a fixed order of sums.
fn choose(logits: &[f32], choice: Choice, draw: f64) -> (u32, f32) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|x| f64::from(x - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    let token = match choice {
        Choice::Greedy => logits.iter().position(|x| *x == max).unwrap_or(0),
        Choice::Sampled => {
            let mut left = draw * total;
            let mut passes = |w: &f64| {
                left -= w;
                left < 0.0
            };
            weights.iter().position(&mut passes).unwrap_or(logits.len() - 1)
        }
    };
    (token as u32, (weights[token] / total).ln() as f32)
}

/// Keys and values of a batch of sequences that all have the same length.
struct Cache<'a> {
    weights: &'a Weights,
    layers: Vec<Option<(Tensor, Tensor)>>,
    length: usize,
}

impl<'a> Cache<'a> {
    fn new(weights: &'a Weights) -> Self {
        Self { weights, layers: vec![None; weights.layers.len()], length: 0 }
    }

    fn keep_rows(&mut self, rows: &Tensor) -> Result<()> {
        for (k, v) in self.layers.iter_mut().flatten() {
            *k = k.index_select(rows, 0)?;
            *v = v.index_select(rows, 0)?;
        }
        Ok(())
    }

    /// Appends ids [B, T] and returns the logits [B, vocab] after the last of them.
    fn feed(&mut self, ids: &Tensor) -> Result<Tensor> {
        let (batch, len) = ids.dims2()?;
        let config = &self.weights.config;
        let (heads, dim) = (config.num_attention_heads, config.head_dim());
        let tables = rope_tables(config, self.length, len)?;
        let mask = self.mask(len)?;
        let mut x = self.weights.embed.index_select(&ids.flatten_all()?, 0)?;
        for (layer, cached) in self.weights.layers.iter().zip(&mut self.layers) {
            let h = rms_norm(&x, &layer.input_norm, config.rms_norm_eps)?;
            let split =
                |x: Tensor| x.reshape((batch, len, heads, dim))?.transpose(1, 2)?.contiguous();
            let q = rotate(&split(h.matmul(&layer.q)?)?, &tables)?;
            let mut k = rotate(&split(h.matmul(&layer.k)?)?, &tables)?;
            let mut v = split(h.matmul(&layer.v)?)?;
            if let Some((old_k, old_v)) = cached.take() {
                k = Tensor::cat(&[old_k, k], 2)?;
                v = Tensor::cat(&[old_v, v], 2)?;
            }
            let scores = (q.matmul(&k.t()?)? * (1.0 / (dim as f64).sqrt()))?;
            let mixed = softmax_last(&scores.broadcast_add(&mask)?)?.matmul(&v)?;
            *cached = Some((k, v));
            let mixed = mixed.transpose(1, 2)?.reshape((batch * len, heads * dim))?;
            x = (x + mixed.matmul(&layer.o)?)?;
            x = (&x + layer.mlp(&x, config.rms_norm_eps)?)?;
        }
        self.length += len;
        let last = x.reshape((batch, len, x.dim(D::Minus1)?))?.narrow(1, len - 1, 1)?.squeeze(1)?;
        self.weights.project(&last.contiguous()?)
    }

    /// Causal mask [len, length + len]: each new position sees all older positions, and the new ones up to itself.
    fn mask(&self, len: usize) -> Result<Tensor> {
        let (old, width) = (self.length, self.length + len);
        let hidden = |i: usize| if i % width > old + i / width { f32::NEG_INFINITY } else { 0.0 };
        let values = (0..len * width).map(hidden).collect();
        Tensor::from_vec(values, (len, width), self.weights.embed.device())
    }
}

#[cfg(test)]
mod tests;
