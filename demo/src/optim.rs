//! The optimizer step: gradient sums, clip by global norm, AdamW, learning-rate schedule.
//!
//! Owns the accumulated gradients between two steps. Does not know losses.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};

/// Settings of AdamW, of the gradient clip and of the learning-rate schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimConfig {
    /// Learning rate at the top of the schedule.
    pub lr: f64,
    /// Steps over which the learning rate rises linearly, at the start.
    pub lr_rise_steps: usize,
    /// Share of all steps over which the learning rate falls linearly to `lr * lr_floor`, at the end.
    pub lr_fall_share: f64,
    /// Lowest learning rate of the fall, as a share of `lr`.
    pub lr_floor: f64,
    /// Steps of the whole run.
    pub total_steps: usize,
    /// Decay of AdamW's first moment.
    pub beta1: f64,
    /// Decay of AdamW's second moment.
    pub beta2: f64,
    /// Weight decay of AdamW.
    pub weight_decay: f64,
    /// Largest global norm of the gradients; a larger one is scaled down to it.
    pub clip_norm: f64,
}

impl OptimConfig {
    /// The learning rate of step 0, 1, ...
    pub fn lr_at(&self, step: usize) -> f64 {
        let rise = ((step + 1) as f64 / self.lr_rise_steps.max(1) as f64).min(1.0);
        let fall_steps = (self.total_steps as f64 * self.lr_fall_share).max(1.0);
        let left = self.total_steps.saturating_sub(step) as f64;
        let fall = (left / fall_steps).min(1.0).max(self.lr_floor);
        self.lr * rise.min(fall)
    }
}

/// Figures of one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateStats {
    /// Learning rate of the step.
    pub lr: f64,
    /// Global norm of the gradients before the clip.
    pub grad_norm: f64,
}

/// Gradients per parameter, summed in the order in which they are added.
#[derive(Debug)]
pub struct GradientSum {
    sums: Vec<Option<Tensor>>,
}

impl GradientSum {
    /// An empty sum for so many parameters.
    pub fn new(parameters: usize) -> Self {
        Self { sums: vec![None; parameters] }
    }

    /// Adds the gradients of one backward pass, in the parameters' order.
    pub fn add(&mut self, gradients: Vec<Option<Tensor>>) -> Result<()> {
        for (sum, gradient) in self.sums.iter_mut().zip(gradients) {
            *sum = match (sum.take(), gradient) {
                (Some(sum), Some(gradient)) => Some((sum + gradient)?),
                (sum, gradient) => sum.or(gradient),
            };
        }
        Ok(())
    }

    /// The sums in the parameters' order; `None` where no pass had a gradient.
    pub fn sums(&self) -> &[Option<Tensor>] {
        &self.sums
    }
}

/// The gradients of one backward pass, in the order of `vars`.
pub fn gradients(loss: &Tensor, vars: &[Var]) -> Result<Vec<Option<Tensor>>> {
    let mut store = loss.backward()?;
    Ok(vars.iter().map(|var| store.remove(var)).collect())
}

/// AdamW over fixed parameters, with clip and schedule.
pub struct Updater {
    config: OptimConfig,
    vars: Vec<Var>,
    adam: AdamW,
    steps: usize,
}

impl Updater {
    /// Makes an optimizer of `vars` at step 0.
    pub fn new(vars: Vec<Var>, config: OptimConfig) -> Result<Self> {
        let params = ParamsAdamW {
            lr: config.lr,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: 1e-8,
            weight_decay: config.weight_decay,
        };
        let adam = AdamW::new(vars.clone(), params)?;
        Ok(Self { config, vars, adam, steps: 0 })
    }

    /// Makes one optimizer step from the sum of its gradients.
    pub fn apply(&mut self, gradients: &GradientSum) -> Result<UpdateStats> {
        let grad_norm = global_norm(gradients.sums())?;
        let scale = (self.config.clip_norm / grad_norm.max(f64::MIN_POSITIVE)).min(1.0);
        let mut store = GradStore::default();
        for (var, sum) in self.vars.iter().zip(gradients.sums()) {
            if let Some(gradient) = sum {
                store.insert(var, (gradient * scale)?);
            }
        }
        let lr = self.config.lr_at(self.steps);
        self.adam.set_learning_rate(lr);
        self.adam.step(&store)?;
        self.steps += 1;
        Ok(UpdateStats { lr, grad_norm })
    }
}

fn global_norm(gradients: &[Option<Tensor>]) -> Result<f64> {
    let mut squares = 0.0;
    for gradient in gradients.iter().flatten() {
        squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    Ok(squares.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    const CONFIG: OptimConfig = OptimConfig {
        lr: 0.1,
        lr_rise_steps: 2,
        lr_fall_share: 0.5,
        lr_floor: 0.1,
        total_steps: 10,
        beta1: 0.9,
        beta2: 0.95,
        weight_decay: 0.0,
        clip_norm: 1.0,
    };

    #[test]
    fn the_learning_rate_rises_holds_and_falls_to_its_floor() {
        assert!((CONFIG.lr_at(0) - 0.05).abs() < 1e-12);
        assert!((CONFIG.lr_at(3) - 0.1).abs() < 1e-12);
        assert!((CONFIG.lr_at(9) - 0.02).abs() < 1e-12);
        assert!((CONFIG.lr_at(50) - 0.01).abs() < 1e-12);
    }

    #[test]
    fn gradients_are_reported_unclipped_and_move_the_parameter_against_them() -> Result<()> {
        let var = Var::from_vec(vec![1.0f32, 1.0], 2, &Device::Cpu)?;
        let mut updater = Updater::new(vec![var.clone()], CONFIG)?;
        let loss = (var.as_tensor() * &Tensor::new(&[3.0f32, -4.0], &Device::Cpu)?)?.sum_all()?;
        let mut sum = GradientSum::new(1);
        sum.add(gradients(&loss, std::slice::from_ref(&var))?)?;
        let stats = updater.apply(&sum)?;
        assert!((stats.grad_norm - 5.0).abs() < 1e-5);
        let moved = var.to_vec1::<f32>()?;
        assert!(moved[0] < 1.0 && moved[1] > 1.0, "{moved:?}");
        Ok(())
    }
}
