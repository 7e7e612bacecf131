//! The policy: a small Llama-style decoder (RMSNorm, RoPE, SwiGLU, no biases) with random weights.
//!
//! Owns the configuration, the trainable parameters and their names. `forward` holds the
//! differentiable pass, `checkpoint` the Hugging Face file format. Does not know RL.
//!
//! Matrices live as [in, out], because candle multiplies those bit-identically at every batch
//! size and faster; files and published tensors are [out, in] as Hugging Face has them.

mod checkpoint;
mod forward;

pub use checkpoint::{CheckpointError, NamedTensor};
pub use forward::{Layer, Weights, rms_norm, rope_tables, rotate, softmax_last};

use candle_core::{Device, Result, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::rng::{hash_bytes, mix, normals};
use crate::task::Task;

/// Sizes and constants of the decoder, named as in Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the SwiGLU block.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads.
    pub num_attention_heads: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Number added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Token id that begins a prompt.
    pub bos_token_id: u32,
    /// Token id that ends an answer.
    pub eos_token_id: u32,
}

impl ModelConfig {
    /// The demo's model, sized for `task`.
    pub fn for_task(task: &dyn Task) -> Self {
        let vocabulary = task.vocabulary();
        Self {
            vocab_size: vocabulary.size,
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 2,
            // Many small heads: one of them begins near the offset that the task needs.
            num_attention_heads: 8,
            max_position_embeddings: (task.max_prompt_tokens() + task.max_answer_tokens())
                .next_power_of_two(),
            // Sequences are short: with the usual 10,000 most frequency pairs would stand still.
            rope_theta: 10.0,
            rms_norm_eps: 1e-5,
            bos_token_id: vocabulary.bos,
            eos_token_id: vocabulary.eos,
        }
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}

/// Order in which a parameter's numbers lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The order on disk.
    AsNamed,
    /// [in, out] in memory, [out, in] on disk.
    Transposed,
}

/// One trainable tensor.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Name in Hugging Face's format.
    pub name: String,
    /// Order of the numbers in memory.
    pub layout: Layout,
    /// The values.
    pub var: Var,
}

/// The trainable parameters, always in the same order.
#[derive(Debug, Clone)]
pub struct Model {
    /// Sizes and constants.
    pub config: ModelConfig,
    /// The parameters.
    pub parameters: Vec<Parameter>,
}

impl Model {
    /// Makes random weights, a function of `seed` alone.
    pub fn random(config: ModelConfig, seed: u64) -> Result<Self> {
        let parameters = blueprint(&config)
            .into_iter()
            .map(|(name, layout, shape, init)| {
                let values = initial_values(&name, &shape, init, seed);
                let var = Var::from_vec(values, shape.as_slice(), &Device::Cpu)?;
                Ok(Parameter { name, layout, var })
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, parameters })
    }

    /// Handles to the parameters' values, in their order, for the optimizer.
    pub fn vars(&self) -> Vec<Var> {
        self.parameters.iter().map(|p| p.var.clone()).collect()
    }

    /// Number of trainable numbers in all parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|p| p.var.elem_count()).sum()
    }

    /// The weights as the training pass sees them: gradients flow back to the parameters.
    pub fn live(&self) -> Weights {
        Weights::from_tensors(&self.config, |i| Ok(self.parameters[i].var.as_tensor().clone()))
            .expect("cloning a handle cannot fail")
    }

    /// A frozen copy: later optimizer steps do not change it.
    pub fn snapshot(&self) -> Result<Weights> {
        Weights::from_tensors(&self.config, |i| self.parameters[i].var.as_detached_tensor().copy())
    }
}

#[derive(Debug, Clone, Copy)]
enum Init {
    Ones,
    Normal {
        std: f32,
    },
    /// Rows share one random direction beside their own. Queries and keys get a part that does not depend on the token,
    /// so "look n places back" is learnable without biases.
    Embedding {
        std: f32,
        shared: f32,
    },
}

type Plan = (String, Layout, Vec<usize>, Init);

/// Names, shapes and initial scales in the fixed order of [`Model::parameters`].
fn blueprint(config: &ModelConfig) -> Vec<Plan> {
    let (d, ff, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let matrix = |name: String, rows: usize, cols: usize, gain: f32| {
        let std = gain / (rows as f32).sqrt();
        (name, Layout::Transposed, vec![rows, cols], Init::Normal { std })
    };
    let norm = |name: String| (name, Layout::AsNamed, vec![d], Init::Ones);
    let depth_gain = 1.0 / (2.0 * config.num_hidden_layers as f32).sqrt();
    let mut plan = vec![(
        "model.embed_tokens.weight".to_owned(),
        Layout::AsNamed,
        vec![vocab, d],
        Init::Embedding { std: 1.0, shared: 1.0 },
    )];
    for layer in 0..config.num_hidden_layers {
        let at = |part: &str| format!("model.layers.{layer}.{part}.weight");
        plan.push(norm(at("input_layernorm")));
        for part in ["q_proj", "k_proj", "v_proj"] {
            plan.push(matrix(at(&format!("self_attn.{part}")), d, d, 1.0));
        }
        plan.push(matrix(at("self_attn.o_proj"), d, d, depth_gain));
        plan.push(norm(at("post_attention_layernorm")));
        plan.push(matrix(at("mlp.gate_proj"), d, ff, 1.0));
        plan.push(matrix(at("mlp.up_proj"), d, ff, 1.0));
        plan.push(matrix(at("mlp.down_proj"), ff, d, depth_gain));
    }
    plan.push(norm("model.norm.weight".to_owned()));
    // Near-uniform first answers: exploration starts wide.
    plan.push(matrix("lm_head.weight".to_owned(), d, vocab, 0.2));
    plan
}

fn initial_values(name: &str, shape: &[usize], init: Init, seed: u64) -> Vec<f32> {
    let count = shape.iter().product();
    let key = mix(seed, hash_bytes(name.as_bytes()));
    match init {
        Init::Ones => vec![1.0; count],
        Init::Normal { std } => normals(key, count).into_iter().map(|x| x * std).collect(),
        Init::Embedding { std, shared } => {
            let common = normals(mix(key, 1), shape[1]);
            let own = normals(key, count).into_iter();
            own.enumerate().map(|(i, x)| x * std + shared * common[i % shape[1]]).collect()
        }
    }
}

/// Token ids as a [rows, columns] tensor.
pub fn id_tensor(ids: Vec<u32>, columns: usize) -> Result<Tensor> {
    let rows = ids.len() / columns.max(1);
    Tensor::from_vec(ids, (rows, columns), &Device::Cpu)
}

#[cfg(test)]
mod tests;
