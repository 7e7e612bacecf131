//! The model as Hugging Face files and as named bytes for publishing.
//!
//! Owns names, shapes, byte order and `config.json`. Does not know versions or transfer.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anabranch_trainer::{DType, TensorRef};
use candle_core::{Device, Tensor, Var};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use thiserror::Error;

use super::{Layout, Model, ModelConfig, Parameter, blueprint};

/// Reason why a model cannot be written or read.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A file cannot be written or read.
    #[error("cannot read or write {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// `config.json` does not fit the model.
    #[error("{path} is not a model config: {source}")]
    Config { path: PathBuf, source: serde_json::Error },
    /// The weights are no safetensors file.
    #[error("{path} is not a safetensors file: {source}")]
    Format { path: PathBuf, source: safetensors::SafeTensorError },
    /// The file lacks a tensor of the model.
    #[error("{path} has no tensor {name}; it was saved by another model")]
    Missing { path: PathBuf, name: String },
    /// A tensor has another type or shape than the model's.
    #[error("{path}: {name} is {found_dtype:?} {found:?}, expected F32 {expected:?}")]
    Shape {
        /// The safetensors file.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Type in the file.
        found_dtype: Dtype,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the model needs.
        expected: Vec<usize>,
    },
    /// A tensor operation failed.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// One published tensor: Hugging Face's name and layout, little-endian f32.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedTensor {
    /// Name in Hugging Face's format.
    pub name: String,
    /// Shape in Hugging Face's layout.
    pub shape: Vec<u64>,
    /// Little-endian f32, row by row.
    pub bytes: Vec<u8>,
}

impl NamedTensor {
    /// The tensor in the form that the SDK publishes.
    pub fn borrow(&self) -> TensorRef<'_> {
        TensorRef { name: &self.name, dtype: DType::F32, shape: &self.shape, data: &self.bytes }
    }

    fn dims(&self) -> Vec<usize> {
        self.shape.iter().map(|n| *n as usize).collect()
    }
}

impl Model {
    /// Every parameter as bytes, in a fixed order: names and sizes are the same in each version.
    pub fn tensors(&self) -> candle_core::Result<Vec<NamedTensor>> {
        self.parameters.iter().map(named_tensor).collect()
    }

    /// Writes `config.json` and `model.safetensors` into `dir`.
    pub fn save(&self, dir: &Path) -> Result<(), CheckpointError> {
        fs::create_dir_all(dir).map_err(io(dir))?;
        let config = dir.join("config.json");
        let text = format!("{:#}\n", self.config.to_hugging_face());
        fs::write(&config, text).map_err(io(&config))?;
        let path = dir.join("model.safetensors");
        let tensors = self.tensors()?;
        let views: Vec<(&str, TensorView<'_>)> = tensors
            .iter()
            .map(|t| Ok((t.name.as_str(), TensorView::new(Dtype::F32, t.dims(), &t.bytes)?)))
            .collect::<Result<_, _>>()
            .map_err(format_of(&path))?;
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(format_of(&path))?;
        fs::write(&path, bytes).map_err(io(&path))
    }

    /// Reads a model that `save` wrote into `dir`.
    pub fn load(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join("config.json");
        let text = fs::read_to_string(&path).map_err(io(&path))?;
        let config: ModelConfig = serde_json::from_str(&text)
            .map_err(|source| CheckpointError::Config { path: path.clone(), source })?;
        let path = dir.join("model.safetensors");
        let bytes = fs::read(&path).map_err(io(&path))?;
        let file = SafeTensors::deserialize(&bytes).map_err(format_of(&path))?;
        let views: BTreeMap<String, TensorView<'_>> = file.tensors().into_iter().collect();
        let parameters = blueprint(&config)
            .into_iter()
            .map(|(name, layout, shape, _)| {
                let view = views.get(&name).ok_or_else(|| CheckpointError::Missing {
                    path: path.clone(),
                    name: name.clone(),
                })?;
                parameter(&path, name, layout, &shape, view)
            })
            .collect::<Result<_, CheckpointError>>()?;
        Ok(Self { config, parameters })
    }
}

impl ModelConfig {
    /// A complete `config.json`; the rotary base is given in both the old and the new place.
    pub fn to_hugging_face(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.head_dim(),
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_parameters": { "rope_type": "default", "rope_theta": self.rope_theta },
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "mlp_bias": false,
            "tie_word_embeddings": false,
            "initializer_range": 0.02,
            "use_cache": true,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "torch_dtype": "float32",
        })
    }
}

fn named_tensor(p: &Parameter) -> candle_core::Result<NamedTensor> {
    let tensor = p.var.as_detached_tensor();
    let tensor = match p.layout {
        Layout::AsNamed => tensor,
        Layout::Transposed => tensor.t()?,
    };
    let shape = tensor.dims().iter().map(|n| *n as u64).collect();
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Ok(NamedTensor { name: p.name.clone(), shape, bytes })
}

fn parameter(
    path: &Path,
    name: String,
    layout: Layout,
    shape: &[usize],
    view: &TensorView<'_>,
) -> Result<Parameter, CheckpointError> {
    let on_disk: Vec<usize> = match layout {
        Layout::AsNamed => shape.to_vec(),
        Layout::Transposed => shape.iter().rev().copied().collect(),
    };
    if view.dtype() != Dtype::F32 || view.shape() != on_disk {
        return Err(CheckpointError::Shape {
            path: path.to_owned(),
            name,
            found_dtype: view.dtype(),
            found: view.shape().to_vec(),
            expected: on_disk,
        });
    }
    let values = view
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().expect("chunks of four bytes")))
        .collect();
    let tensor = Tensor::from_vec::<_, f32>(values, on_disk, &Device::Cpu)?;
    let tensor = match layout {
        Layout::AsNamed => tensor,
        Layout::Transposed => tensor.t()?.contiguous()?,
    };
    Ok(Parameter { name, layout, var: Var::from_tensor(&tensor)? })
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io { path, source }
}

fn format_of(path: &Path) -> impl FnOnce(safetensors::SafeTensorError) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Format { path, source }
}
