//! Pairs of bf16 checkpoints as real training leaves them, for figure C: a small language model, trained by AdamW on
//! fp32 master weights, its image cut from the master some steps apart. Owns their files; the model is in `lm`.
//!
//! ```text
//!   DIR/run.json                what was trained, and the loss by step
//!   DIR/lr-1e-6/step-10.safetensors, step-11, step-20, step-110
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use serde_json::json;

use crate::progress;

mod lm;
mod text;

use lm::Lm;
use text::Text;

/// Learning rates: first that of pretraining, from whose weights the two of reinforcement learning start.
const RATES: [(&str, f64); 3] = [("3e-4", 3e-4), ("1e-5", 1e-5), ("1e-6", 1e-6)];
/// Steps of a rate before its first image, in which Adam's moments settle.
const SETTLED: usize = 10;
/// Steps between the two checkpoints of a pair.
const APART: [usize; 3] = [1, 10, 100];
/// Settings of both optimizers; each has half of the tensors and a thread of its own.
const ADAM: ParamsAdamW =
    ParamsAdamW { lr: 0.0, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.01 };

/// Two checkpoints of one run.
pub struct Pair {
    /// Learning rate, and number of steps between the checkpoints: `lr-1e-6.10`.
    pub name: String,
    /// File of the older checkpoint.
    pub base: PathBuf,
    /// File of the newer checkpoint.
    pub new: PathBuf,
}

/// The pairs in `dir`. If a checkpoint is missing, all are trained, which takes minutes.
pub fn pairs(dir: &Path) -> anyhow::Result<Vec<Pair>> {
    let missing = |(name, _): &(&str, f64)| images(dir, name).iter().any(|(_, p)| !p.is_file());
    if RATES.iter().any(missing) {
        train(dir).with_context(|| format!("training pairs into {}", dir.display()))?;
    }
    let of_rate = |(name, _): &(&str, f64)| {
        let [(_, base), later @ ..] = images(dir, name);
        later.into_iter().zip(APART).map(move |((rate, new), apart)| Pair {
            name: format!("{rate}.{apart}"),
            base: base.clone(),
            new,
        })
    };
    Ok(RATES.iter().flat_map(of_rate).collect())
}

/// The base of a rate's pairs, then the newer checkpoint of each pair.
fn images(dir: &Path, rate: &str) -> [(String, PathBuf); 4] {
    let [a, b, c] = APART;
    [0, a, b, c].map(|after| {
        let rate = format!("lr-{rate}");
        let path = dir.join(&rate).join(format!("step-{}.safetensors", SETTLED + after));
        (rate, path)
    })
}

fn train(dir: &Path) -> anyhow::Result<()> {
    let lm = Lm::new()?;
    let mut text = Text::new();
    let mut losses = serde_json::Map::new();
    let steps = SETTLED + APART[2];
    for (name, lr) in RATES {
        let images = images(dir, name);
        let folder = images[0].1.parent().context("an image has a folder")?;
        std::fs::create_dir_all(folder)?;
        let mut adam = Adam::new(&lm, lr)?;
        let mut of_rate = Vec::new();
        for step in 1..=steps {
            let loss = adam.step(&lm, &mut text)?;
            of_rate.push(loss);
            progress::line(&format!("pairs: lr {name}, step {step}/{steps}, loss {loss:.3}"));
            let file = format!("step-{step}.safetensors");
            if let Some((_, path)) = images.iter().find(|(_, p)| p.ends_with(&file)) {
                save(&lm, path)?;
            }
        }
        losses.insert(name.to_owned(), json!(of_rate));
    }
    let about = json!({
        "parameters": lm.parameters(), "model": lm::ABOUT, "optimizer": "AdamW, fp32 master",
        "beta1": ADAM.beta1, "beta2": ADAM.beta2, "weight_decay": ADAM.weight_decay,
        "tokens_per_step": lm::BATCH * lm::LEN, "losses": losses,
    });
    std::fs::write(dir.join("run.json"), serde_json::to_string_pretty(&about)?)?;
    Ok(())
}

/// Writes the master weights as bf16; the file is complete or not there.
fn save(lm: &Lm, path: &Path) -> anyhow::Result<()> {
    let mut tensors = HashMap::new();
    for (name, var) in lm.vars() {
        tensors.insert(name.clone(), var.as_detached_tensor().to_dtype(candle_core::DType::BF16)?);
    }
    let partial = path.with_extension("partial");
    candle_core::safetensors::save(&tensors, &partial)?;
    std::fs::rename(&partial, path)?;
    Ok(())
}

struct Adam {
    halves: [AdamW; 2],
}

// === impl Adam ===

impl Adam {
    fn new(lm: &Lm, lr: f64) -> anyhow::Result<Adam> {
        let half = |odd| {
            let vars = lm.vars().iter().enumerate().filter(|(at, _)| at % 2 == odd);
            AdamW::new(vars.map(|(_, (_, v))| v.clone()).collect(), ParamsAdamW { lr, ..ADAM })
        };
        Ok(Adam { halves: [half(0)?, half(1)?] })
    }

    fn step(&mut self, lm: &Lm, text: &mut Text) -> anyhow::Result<f64> {
        let loss = lm.loss(&text.take(lm::BATCH * (lm::LEN + 1)))?;
        let gradients = loss.backward()?;
        let stepped: Vec<candle_core::Result<()>> = std::thread::scope(|scope| {
            let halves = self.halves.iter_mut();
            let threads: Vec<_> = halves.map(|h| scope.spawn(|| h.step(&gradients))).collect();
            threads.into_iter().map(|t| t.join().expect("the optimizer does not panic")).collect()
        });
        stepped.into_iter().collect::<candle_core::Result<()>>()?;
        Ok(loss.to_scalar::<f32>()?.into())
    }
}
