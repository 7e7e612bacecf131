//! Group-relative policy optimisation: advantages and the clipped surrogate.
//!
//! Owns the algorithm's arithmetic on whole groups. Not the optimizer, nor where rollouts come from.
//!
//! Two parts make an advantage, both normalised within the group:
//! - *outcome* (plain GRPO): the answer's reward, the same for each of its tokens;
//! - *process* (GRPO with process supervision, immediate reward only): where the verifier grades
//!   every position, a token is compared with its siblings' tokens at the same position. Right for
//!   tasks where token i alone decides position i; it is not plain outcome GRPO.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{D, Device, Result, Tensor};

use crate::model::{Weights, id_tensor};
use crate::task::Score;

/// A finished answer with the log-probabilities of the engines that made it, token by token.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Token ids of the answer.
    pub tokens: Vec<u32>,
    /// Natural log-probability of each token of the answer, as the engine reported it.
    pub logprobs: Vec<f32>,
    /// Number of the problem; the answers to one problem form a group.
    pub group: u64,
    /// Verdict on the answer.
    pub score: Score,
}

/// Settings of the clipped surrogate and of its advantages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GrpoConfig {
    /// Clip range below a ratio of 1, as a difference.
    pub clip_low: f64,
    /// Clip range above a ratio of 1, as a difference.
    pub clip_high: f64,
    /// Factor of the entropy per token in the objective.
    pub entropy_bonus: f64,
    /// Factor of the outcome part of an advantage.
    pub outcome_weight: f32,
    /// Factor of the process part of an advantage.
    pub process_weight: f32,
}

/// Smallest standard deviation of a group's rewards that is a signal; below it all siblings did equally well.
const MIN_STD: f32 = 1e-4;
/// Bound of the log-ratio before `exp()`; larger ones are clipped anyway.
const MAX_LOG_RATIO: f64 = 10.0;

/// Computes one advantage per token. `rollouts` must hold whole groups.
pub fn advantages(rollouts: &[Rollout], config: &GrpoConfig) -> Vec<Vec<f32>> {
    let mut advantages: Vec<Vec<f32>> =
        rollouts.iter().map(|r| vec![0.0; r.tokens.len()]).collect();
    let mut groups: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (i, rollout) in rollouts.iter().enumerate() {
        groups.entry(rollout.group).or_default().push(i);
    }
    for members in groups.values() {
        add_outcome(rollouts, members, config.outcome_weight, &mut advantages);
        add_process(rollouts, members, config.process_weight, &mut advantages);
    }
    advantages
}

fn add_outcome(rollouts: &[Rollout], members: &[usize], weight: f32, out: &mut [Vec<f32>]) {
    let rewards: Vec<f32> = members.iter().map(|m| rollouts[*m].score.reward).collect();
    for (member, relative) in members.iter().zip(normalised(&rewards)) {
        out[*member].iter_mut().for_each(|a| *a += weight * relative);
    }
}

/// Adds the process part. Siblings that ended earlier take no part in the comparison at a later position.
fn add_process(rollouts: &[Rollout], members: &[usize], weight: f32, out: &mut [Vec<f32>]) {
    let longest = members.iter().map(|m| rollouts[*m].score.per_token.len()).max().unwrap_or(0);
    for position in 0..longest {
        let present: Vec<(usize, f32)> = members
            .iter()
            .filter_map(|m| Some((*m, *rollouts[*m].score.per_token.get(position)?)))
            .collect();
        let rewards: Vec<f32> = present.iter().map(|(_, reward)| *reward).collect();
        for ((member, _), relative) in present.iter().zip(normalised(&rewards)) {
            if let Some(advantage) = out[*member].get_mut(position) {
                *advantage += weight * relative;
            }
        }
    }
}

/// Computes (reward - mean) / standard deviation; all zero if the rewards do not differ.
fn normalised(rewards: &[f32]) -> Vec<f32> {
    let count = rewards.len() as f32;
    let mean = rewards.iter().sum::<f32>() / count;
    let std = (rewards.iter().map(|r| (r - mean).powi(2)).sum::<f32>() / count).sqrt();
    if std < MIN_STD {
        return vec![0.0; rewards.len()];
    }
    rewards.iter().map(|r| (r - mean) / std).collect()
}

/// Sums over one pass over some rollouts; passes add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PassStats {
    /// Part of the step's loss.
    pub loss: f64,
    /// Tokens of the answers.
    pub tokens: usize,
    /// Tokens whose ratio was outside the clip range.
    pub clipped: usize,
    /// Sum of the policy's entropy at each token, in nats.
    pub entropy_sum: f64,
    /// Sum of (ratio - 1 - log ratio), the k3 estimate of KL(rollout policy || policy).
    pub kl_sum: f64,
}

impl PassStats {
    /// Adds the sums of another pass.
    pub fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.tokens += other.tokens;
        self.clipped += other.clipped;
        self.entropy_sum += other.entropy_sum;
        self.kl_sum += other.kl_sum;
    }
}

/// The loss of some rollouts as a scalar that can be differentiated. `denominator` is the whole step's, known before
/// the step begins: the sum over any split into micro-batches is the same. Fails if candle does.
pub fn surrogate(
    weights: &Weights,
    rollouts: &[Rollout],
    advantages: &[Vec<f32>],
    config: &GrpoConfig,
    denominator: f64,
) -> Result<(Tensor, PassStats)> {
    let columns = Columns::of(rollouts, advantages);
    let (ids, rows) = sequence_tensors(rollouts.iter().map(|r| (&r.prompt[..], &r.tokens[..])))?;
    let vector = |values: Vec<f32>| Tensor::new(values, &Device::Cpu);
    let (old, advantage) = (vector(columns.logprobs)?, vector(columns.advantages)?);

    let log_probs = log_softmax(&weights.logits_at(&ids, &rows)?)?;
    let taken = Tensor::new(columns.tokens, &Device::Cpu)?.unsqueeze(1)?;
    let new = log_probs.gather(&taken, 1)?.squeeze(1)?;
    let log_ratio = (new - old)?.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)?;
    let ratio = log_ratio.exp()?;
    let clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)?;
    let gain = (&ratio * &advantage)?.minimum(&(clipped * &advantage)?)?;
    let entropy = (log_probs.exp()? * &log_probs)?.sum(D::Minus1)?.neg()?;
    let objective = (gain.sum_all()? + (entropy.sum_all()? * config.entropy_bonus)?)?;
    let loss = (objective * (-1.0 / denominator))?;
    let stats = pass_stats(&loss, &ratio.detach(), &entropy.detach(), config)?;
    Ok((loss, stats))
}

/// Values per token of all rollouts, end to end.
struct Columns {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    advantages: Vec<f32>,
}

impl Columns {
    fn of(rollouts: &[Rollout], advantages: &[Vec<f32>]) -> Self {
        Self {
            tokens: rollouts.iter().flat_map(|r| r.tokens.iter().copied()).collect(),
            logprobs: rollouts.iter().flat_map(|r| r.logprobs.iter().copied()).collect(),
            advantages: advantages.iter().flatten().copied().collect(),
        }
    }
}

/// Ids [B, T], padded on the right, and the flat rows whose logits predict each answer token. The last answer token is
/// predicted but never fed.
pub(crate) fn sequence_tensors<'a>(
    pairs: impl Iterator<Item = (&'a [u32], &'a [u32])> + Clone,
) -> Result<(Tensor, Tensor)> {
    let fed = |(prompt, answer): &(&[u32], &[u32])| prompt.len() + answer.len() - 1;
    let len = pairs.clone().map(|pair| fed(&pair)).max().unwrap_or(0);
    let (mut ids, mut rows): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
    for (b, (prompt, answer)) in pairs.enumerate() {
        let start = b * len;
        ids.extend(prompt.iter().chain(answer).take(fed(&(prompt, answer))));
        ids.resize(start + len, 0);
        let predicting: Range<usize> = prompt.len() - 1..prompt.len() - 1 + answer.len();
        rows.extend(predicting.map(|t| (start + t) as u32));
    }
    Ok((id_tensor(ids, len)?, Tensor::new(rows, &Device::Cpu)?))
}

pub(crate) fn log_softmax(logits: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

fn pass_stats(
    loss: &Tensor,
    ratio: &Tensor,
    entropy: &Tensor,
    config: &GrpoConfig,
) -> Result<PassStats> {
    let ratios = ratio.to_vec1::<f32>()?;
    let range = 1.0 - config.clip_low..=1.0 + config.clip_high;
    let kl = |r: &f32| f64::from(*r) - 1.0 - f64::from(*r).ln();
    Ok(PassStats {
        loss: f64::from(loss.to_scalar::<f32>()?),
        tokens: ratios.len(),
        clipped: ratios.iter().filter(|r| !range.contains(&f64::from(**r))).count(),
        entropy_sum: f64::from(entropy.sum_all()?.to_scalar::<f32>()?),
        kl_sum: ratios.iter().map(kl).sum(),
    })
}

#[cfg(test)]
mod tests;
