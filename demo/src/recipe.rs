//! The demo's settings: what was found to learn the strand task on every seed that was tried.
//!
//! Owns numbers only. `examples/recipe.rs` runs them in one process.

use crate::grpo::GrpoConfig;
use crate::optim::OptimConfig;
use crate::task::Task;
use crate::trainer::TrainerConfig;
use crate::warmup::WarmupConfig;

/// Settings of a whole run: model training, step sizes, optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// Supervised warm-up before RL.
    pub warmup: WarmupConfig,
    /// Optimizer steps.
    pub steps: usize,
    /// Prompts of one step.
    pub prompts_per_step: usize,
    /// Answers to each prompt.
    pub group_size: usize,
    /// Settings of the loss.
    pub grpo: GrpoConfig,
    /// Learning rate at the top of the schedule.
    pub lr: f64,
    /// Steps over which the learning rate rises, at the start.
    pub lr_rise_steps: usize,
    /// Share of all steps over which the learning rate falls, at the end.
    pub lr_fall_share: f64,
    /// Lowest learning rate of the fall, as a share of `lr`.
    pub lr_floor: f64,
    /// Decay of AdamW's first moment.
    pub beta1: f64,
    /// Decay of AdamW's second moment.
    pub beta2: f64,
    /// Largest global norm of the gradients.
    pub clip_norm: f64,
    /// Sequences per forward and backward pass: bounds memory.
    pub rows_per_pass: usize,
    /// Passes that run at the same time.
    pub threads: usize,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            warmup: WarmupConfig { steps: 80, rows: 64, lr: 5e-3 },
            steps: 36,
            prompts_per_step: 32,
            group_size: 8,
            grpo: GrpoConfig {
                clip_low: 0.2,
                clip_high: 0.28,
                entropy_bonus: 0.01,
                outcome_weight: 0.0,
                process_weight: 1.0,
            },
            lr: 5e-3,
            lr_rise_steps: 3,
            lr_fall_share: 0.4,
            lr_floor: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            clip_norm: 1.0,
            rows_per_pass: 64,
            threads: 1,
        }
    }
}

impl Recipe {
    /// The recipe for long text prompts: the same algorithm, sized so that a step stays in seconds. The reward is the
    /// outcome alone, because nothing grades single positions.
    pub fn workload() -> Self {
        let recipe = Self::default();
        Self {
            warmup: WarmupConfig { steps: 10, rows: 8, lr: 3e-3 },
            steps: 12,
            prompts_per_step: 8,
            rows_per_pass: 8,
            grpo: GrpoConfig { outcome_weight: 1.0, process_weight: 0.0, ..recipe.grpo },
            ..recipe
        }
    }

    /// Answers of one step.
    pub fn samples_per_step(&self) -> usize {
        self.prompts_per_step * self.group_size
    }

    /// The trainer's settings for `task`.
    pub fn trainer(&self, task: &dyn Task) -> TrainerConfig {
        TrainerConfig {
            grpo: self.grpo,
            optim: OptimConfig {
                lr: self.lr,
                lr_rise_steps: self.lr_rise_steps,
                lr_fall_share: self.lr_fall_share,
                lr_floor: self.lr_floor,
                total_steps: self.steps,
                beta1: self.beta1,
                beta2: self.beta2,
                weight_decay: 0.0,
                clip_norm: self.clip_norm,
            },
            step_denominator: (self.samples_per_step() * task.max_answer_tokens()) as f64,
            rows_per_pass: self.rows_per_pass,
            threads: self.threads,
        }
    }
}
