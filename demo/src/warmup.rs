//! The supervised warm-up: teaches the *form* of an answer, never a right one.
//!
//! Owns a short imitation run on answers of the right shape and the wrong content (what that is,
//! the task says). From random weights a policy almost never tries EOS at the right place, and
//! finds out late where in the prompt to look; which token is right, it has to find by RL.

use candle_core::{Device, Result, Tensor};

use crate::grpo::{log_softmax, sequence_tensors};
use crate::model::{Model, Weights};
use crate::optim::{GradientSum, OptimConfig, Updater, gradients};
use crate::task::{Problem, Task};

/// Settings of the warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WarmupConfig {
    /// Optimizer steps.
    pub steps: usize,
    /// Examples per step.
    pub rows: usize,
    /// Learning rate at the top of the schedule.
    pub lr: f64,
}

/// Trains `model` in place; returns the last step's cross-entropy per token (0 without steps).
pub fn warm_up(model: &Model, task: &dyn Task, config: &WarmupConfig) -> Result<f64> {
    let vars = model.vars();
    let mut updater = Updater::new(vars.clone(), schedule(config))?;
    let mut last = 0.0;
    for step in 0..config.steps {
        let first = (step * config.rows) as u64;
        let examples: Vec<Problem> =
            (first..first + config.rows as u64).map(|i| task.form_example(i)).collect();
        let loss = imitation_loss(&model.live(), &examples)?;
        let mut sum = GradientSum::new(vars.len());
        sum.add(gradients(&loss, &vars)?)?;
        updater.apply(&sum)?;
        last = f64::from(loss.to_scalar::<f32>()?);
    }
    Ok(last)
}

fn schedule(config: &WarmupConfig) -> OptimConfig {
    OptimConfig {
        lr: config.lr,
        lr_rise_steps: 3,
        lr_fall_share: 0.3,
        lr_floor: 0.1,
        total_steps: config.steps,
        beta1: 0.9,
        beta2: 0.95,
        weight_decay: 0.0,
        clip_norm: 1.0,
    }
}

fn imitation_loss(weights: &Weights, examples: &[Problem]) -> Result<Tensor> {
    let pairs = examples.iter().map(|e| (&e.prompt[..], &e.expected[..]));
    let (ids, rows) = sequence_tensors(pairs)?;
    let log_probs = log_softmax(&weights.logits_at(&ids, &rows)?)?;
    let wanted: Vec<u32> = examples.iter().flat_map(|e| e.expected.iter().copied()).collect();
    let wanted = Tensor::new(wanted, &Device::Cpu)?.unsqueeze(1)?;
    log_probs.gather(&wanted, 1)?.mean_all()?.neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::{Choice, Request, generate};
    use crate::model::ModelConfig;
    use crate::recipe::Recipe;
    use crate::task::Strand;

    #[test]
    fn a_warmed_up_policy_ends_its_answers_and_gets_none_of_them_right() {
        let task = Strand::new(1);
        let model = Model::random(ModelConfig::for_task(&task), 1).unwrap();
        warm_up(&model, &task, &Recipe::default().warmup).unwrap();
        let problems = task.held_out(64);
        let request = |p: &Problem| Request {
            prompt: p.prompt.clone(),
            kept: Vec::new(),
            kept_logprobs: Vec::new(),
            seed: 0,
            max_tokens: task.max_answer_tokens(),
        };
        let requests: Vec<Request> = problems.iter().map(request).collect();
        let answers = generate(&model.snapshot().unwrap(), &requests, Choice::Greedy).unwrap();
        let full = answers.iter().filter(|a| a.tokens.len() == task.max_answer_tokens()).count();
        assert!(full > 48, "{full} of 64 have the right length");
        let right = problems.iter().zip(&answers).filter(|(p, a)| task.score(p, &a.tokens).exact);
        assert_eq!(right.count(), 0);
    }
}
