//! The learner: one policy, one optimizer, micro-batches in, versions out.
//!
//! Owns the model, its accumulated gradients and its version. Does not know processes, engines or
//! the wire; whoever feeds it delivers whole groups in each micro-batch.

use std::thread;

use candle_core::{Result, Tensor, Var};

use crate::grpo::{GrpoConfig, PassStats, Rollout, advantages, surrogate};
use crate::model::{Model, NamedTensor, Weights};
use crate::optim::{GradientSum, OptimConfig, UpdateStats, Updater, gradients};

/// Settings of the learner.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainerConfig {
    /// Settings of the loss.
    pub grpo: GrpoConfig,
    /// Settings of the optimizer.
    pub optim: OptimConfig,
    /// Samples of a whole step times the longest answer: divides every token's loss.
    pub step_denominator: f64,
    /// Sequences per forward and backward pass: bounds memory.
    pub rows_per_pass: usize,
    /// Passes that run at the same time. Gradients are summed in the passes' order, so the result does not depend on
    /// this number.
    pub threads: usize,
}

/// Figures of a micro-batch or of a step: sums and counts, so that micro-batches add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct BatchStats {
    /// Answers.
    pub samples: usize,
    /// Micro-batches that were added.
    pub micro_batches: usize,
    /// Sum of the answers' rewards.
    pub reward_sum: f64,
    /// Answers that are right as a whole.
    pub exact: usize,
    /// Sums over the tokens.
    pub pass: PassStats,
}

impl BatchStats {
    /// Reward per answer.
    pub fn mean_reward(&self) -> f64 {
        self.reward_sum / self.samples.max(1) as f64
    }

    /// Share of the answers that are right as a whole.
    pub fn exact_share(&self) -> f64 {
        self.exact as f64 / self.samples.max(1) as f64
    }

    /// Share of the tokens whose ratio was outside the clip range.
    pub fn clipped_share(&self) -> f64 {
        self.pass.clipped as f64 / self.pass.tokens.max(1) as f64
    }

    /// Entropy of the policy per token, in nats.
    pub fn mean_entropy(&self) -> f64 {
        self.pass.entropy_sum / self.pass.tokens.max(1) as f64
    }

    /// Estimate of KL(rollout policy || policy) per token, in nats.
    pub fn mean_kl(&self) -> f64 {
        self.pass.kl_sum / self.pass.tokens.max(1) as f64
    }

    fn add(&mut self, other: &Self) {
        self.samples += other.samples;
        self.micro_batches += other.micro_batches;
        self.reward_sum += other.reward_sum;
        self.exact += other.exact;
        self.pass.add(&other.pass);
    }
}

/// Figures of one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepStats {
    /// Number of the version that this step made.
    pub version: u64,
    /// Figures of the step's answers.
    pub batch: BatchStats,
    /// Figures of the update.
    pub update: UpdateStats,
}

/// The policy with its optimizer and the gradients of the step in progress.
pub struct Trainer {
    model: Model,
    vars: Vec<Var>,
    updater: Updater,
    config: TrainerConfig,
    version: u64,
    gradients: GradientSum,
    batch: BatchStats,
}

impl Trainer {
    /// Takes over `model` as version 0.
    pub fn new(model: Model, config: TrainerConfig) -> Result<Self> {
        let vars = model.vars();
        Ok(Self {
            updater: Updater::new(vars.clone(), config.optim)?,
            gradients: GradientSum::new(vars.len()),
            batch: BatchStats::default(),
            version: 0,
            model,
            vars,
            config,
        })
    }

    /// Number of the current version.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The policy.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The current version as it is published.
    pub fn tensors(&self) -> Result<Vec<NamedTensor>> {
        self.model.tensors()
    }

    /// Adds the gradients of `rollouts`, which must be whole groups, to the step in progress. Answers without a token
    /// are only counted. Fails if candle does.
    pub fn add_micro_batch(&mut self, rollouts: &[Rollout]) -> Result<BatchStats> {
        let mut stats = BatchStats {
            samples: rollouts.len(),
            micro_batches: 1,
            reward_sum: rollouts.iter().map(|r| f64::from(r.score.reward)).sum(),
            exact: rollouts.iter().filter(|r| r.score.exact).count(),
            pass: PassStats::default(),
        };
        let advantages = advantages(rollouts, &self.config.grpo);
        let (spoken, advantages): (Vec<Rollout>, Vec<Vec<f32>>) = rollouts
            .iter()
            .cloned()
            .zip(advantages)
            .filter(|(rollout, _)| !rollout.tokens.is_empty())
            .unzip();
        for (gradients, pass) in self.passes(&spoken, &advantages)? {
            self.gradients.add(gradients)?;
            stats.pass.add(&pass);
        }
        self.batch.add(&stats);
        Ok(stats)
    }

    /// Makes one optimizer step over everything added since the last one; the result is the next version.
    pub fn step(&mut self) -> Result<StepStats> {
        let update = self.updater.apply(&self.gradients)?;
        self.gradients = GradientSum::new(self.vars.len());
        self.version += 1;
        Ok(StepStats { version: self.version, batch: std::mem::take(&mut self.batch), update })
    }

    fn passes(
        &self,
        rollouts: &[Rollout],
        advantages: &[Vec<f32>],
    ) -> Result<Vec<(Vec<Option<Tensor>>, PassStats)>> {
        let weights = self.model.live();
        let rows = self.config.rows_per_pass.max(1);
        let chunks: Vec<_> = rollouts.chunks(rows).zip(advantages.chunks(rows)).collect();
        let mut results = Vec::with_capacity(chunks.len());
        for wave in chunks.chunks(self.config.threads.max(1)) {
            results.extend(self.wave(&weights, wave));
        }
        results.into_iter().collect()
    }

    /// Runs each chunk of `wave` on its own thread; results in the chunks' order.
    fn wave(
        &self,
        weights: &Weights,
        wave: &[(&[Rollout], &[Vec<f32>])],
    ) -> Vec<Result<(Vec<Option<Tensor>>, PassStats)>> {
        let pass = |(rollouts, advantages): (&[Rollout], &[Vec<f32>])| {
            let (grpo, denominator) = (&self.config.grpo, self.config.step_denominator);
            let (loss, stats) = surrogate(weights, rollouts, advantages, grpo, denominator)?;
            Ok((gradients(&loss, &self.vars)?, stats))
        };
        if let [only] = wave {
            return vec![pass(*only)];
        }
        thread::scope(|scope| {
            let running: Vec<_> = wave.iter().map(|chunk| scope.spawn(|| pass(*chunk))).collect();
            let joined = running.into_iter().map(|t| t.join().expect("a pass does not panic"));
            joined.collect()
        })
    }
}

#[cfg(test)]
mod tests;
