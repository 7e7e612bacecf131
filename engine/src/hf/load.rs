//! Conversion of safetensors to the decoder's arrays: the table of tensors that a config demands, the check against
//! it, the conversion to f32 and to `[K, N]`. Runs away from the engine thread.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::config::{Family, HfConfig};
use crate::weights::{TensorEntry, TensorTable, WeightsError, digest_table, list_tensors};

/// Names in an error: enough to see what is wrong, as a checkpoint has hundreds.
const NAMES_IN_ERROR: usize = 4;

/// One linear layer: weight `[K, N]` contiguous, so that a row's result does not depend on its batch.
pub(crate) struct Linear {
    pub weight: Tensor,
    pub bias: Option<Vec<f32>>,
    pub inputs: usize,
    pub outputs: usize,
}

pub(crate) struct Layer {
    pub input_norm: Vec<f32>,
    pub qkv: Linear,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub out: Linear,
    pub post_norm: Vec<f32>,
    pub gate_up: Linear,
    pub down: Linear,
}

pub(crate) struct HfWeights {
    pub digest: [u8; 32],
    /// `[vocab, hidden]`
    pub embed: Vec<f32>,
    pub layers: Vec<Layer>,
    pub norm: Vec<f32>,
    pub head: Linear,
}

pub(crate) fn load(config: &HfConfig, dir: &Path) -> Result<HfWeights, WeightsError> {
    let table = list_tensors(dir)?;
    check(config, &table)?;
    let reader = Reader { table: &table };
    let h = config.hidden;
    let embed = reader.read("model.embed_tokens.weight")?;
    let head = if config.tied {
        linear(&[(&embed, config.vocab)], h, None)?
    } else {
        linear(&[(&reader.read("lm_head.weight")?, config.vocab)], h, None)?
    };
    Ok(HfWeights {
        digest: digest_table(&table)?,
        layers: (0..config.layers).map(|i| reader.layer(config, i)).collect::<Result<_, _>>()?,
        norm: reader.read("model.norm.weight")?,
        embed,
        head,
    })
}

/// Every tensor that the config demands, with its shape.
fn expected(config: &HfConfig) -> BTreeMap<String, Vec<u64>> {
    let (h, q, kv) =
        (config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut table = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        table.insert(name, shape.iter().map(|&n| n as u64).collect());
    };
    add("model.embed_tokens.weight".into(), &[config.vocab, h]);
    add("model.norm.weight".into(), &[h]);
    if !config.tied {
        add("lm_head.weight".into(), &[config.vocab, h]);
    }
    for i in 0..config.layers {
        let p = format!("model.layers.{i}");
        add(format!("{p}.input_layernorm.weight"), &[h]);
        add(format!("{p}.post_attention_layernorm.weight"), &[h]);
        for (name, outputs) in [("q", q), ("k", kv), ("v", kv)] {
            add(format!("{p}.self_attn.{name}_proj.weight"), &[outputs, h]);
            if config.qkv_bias {
                add(format!("{p}.self_attn.{name}_proj.bias"), &[outputs]);
            }
        }
        add(format!("{p}.self_attn.o_proj.weight"), &[h, q]);
        if config.out_bias {
            add(format!("{p}.self_attn.o_proj.bias"), &[h]);
        }
        if config.family == Family::Qwen3 {
            add(format!("{p}.self_attn.q_norm.weight"), &[config.head_dim]);
            add(format!("{p}.self_attn.k_norm.weight"), &[config.head_dim]);
        }
        add(format!("{p}.mlp.gate_proj.weight"), &[config.intermediate, h]);
        add(format!("{p}.mlp.up_proj.weight"), &[config.intermediate, h]);
        add(format!("{p}.mlp.down_proj.weight"), &[h, config.intermediate]);
    }
    table
}

fn check(config: &HfConfig, table: &TensorTable) -> Result<(), WeightsError> {
    let expected = expected(config);
    // A tied model may carry its head once more.
    let known =
        |name: &str| expected.contains_key(name) || (config.tied && name == "lm_head.weight");
    let missing: Vec<&str> =
        expected.keys().filter(|name| !table.contains_key(*name)).map(String::as_str).collect();
    let extra: Vec<&str> = table.keys().filter(|name| !known(name)).map(String::as_str).collect();
    let mut wrong = Vec::new();
    for (name, entry) in table {
        if let Some(shape) = expected.get(name)
            && *shape != entry.shape
        {
            wrong.push(format!("{name} has shape {:?} where the model has {shape:?}", entry.shape));
        } else if !["F32", "F16", "BF16"].contains(&entry.dtype.as_str()) {
            wrong.push(format!("{name} has type {}; F32, F16 and BF16 can be read", entry.dtype));
        }
    }
    let mut faults = Vec::new();
    if !missing.is_empty() {
        faults.push(format!("{} tensors are missing: {}", missing.len(), some(&missing)));
    }
    if !extra.is_empty() {
        faults.push(format!("{} tensors are unknown: {}", extra.len(), some(&extra)));
    }
    if !wrong.is_empty() {
        faults.push(some(&wrong.iter().map(String::as_str).collect::<Vec<_>>()));
    }
    if faults.is_empty() { Ok(()) } else { Err(WeightsError::Mismatch(faults.join("; "))) }
}

fn some(names: &[&str]) -> String {
    let more = names.len().saturating_sub(NAMES_IN_ERROR);
    let shown = names[..names.len() - more].join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

struct Reader<'a> {
    table: &'a TensorTable,
}

impl Reader<'_> {
    fn layer(&self, config: &HfConfig, i: usize) -> Result<Layer, WeightsError> {
        let (h, q, kv) =
            (config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let read = |name: &str| self.read(&format!("model.layers.{i}.{name}"));
        let attn = |name: &str| read(&format!("self_attn.{name}"));
        let qkv_bias = if config.qkv_bias {
            Some([attn("q_proj.bias")?, attn("k_proj.bias")?, attn("v_proj.bias")?].concat())
        } else {
            None
        };
        let normed = config.family == Family::Qwen3;
        let parts = [attn("q_proj.weight")?, attn("k_proj.weight")?, attn("v_proj.weight")?];
        let (gate, up) = (read("mlp.gate_proj.weight")?, read("mlp.up_proj.weight")?);
        let m = config.intermediate;
        Ok(Layer {
            input_norm: read("input_layernorm.weight")?,
            qkv: linear(&[(&parts[0], q), (&parts[1], kv), (&parts[2], kv)], h, qkv_bias)?,
            q_norm: normed.then(|| attn("q_norm.weight")).transpose()?,
            k_norm: normed.then(|| attn("k_norm.weight")).transpose()?,
            out: linear(
                &[(&attn("o_proj.weight")?, h)],
                q,
                config.out_bias.then(|| attn("o_proj.bias")).transpose()?,
            )?,
            post_norm: read("post_attention_layernorm.weight")?,
            gate_up: linear(&[(&gate, m), (&up, m)], h, None)?,
            down: linear(&[(&read("mlp.down_proj.weight")?, h)], m, None)?,
        })
    }

    fn read(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let entry =
            self.table.get(name).expect("the table was checked against what the config demands");
        let bytes = read_bytes(entry)
            .map_err(|source| WeightsError::Read { path: entry.path.clone(), source })?;
        to_f32(&entry.dtype, &bytes)
            .map_err(|error| WeightsError::Mismatch(format!("{name}: {error}")))
    }
}

fn read_bytes(entry: &TensorEntry) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; entry.len_bytes as usize];
    File::open(&entry.path)?.read_exact_at(&mut bytes, entry.offset_bytes)?;
    Ok(bytes)
}

fn to_f32(dtype: &str, bytes: &[u8]) -> candle_core::Result<Vec<f32>> {
    let (dtype, width) = match dtype {
        "BF16" => (DType::BF16, 2),
        "F16" => (DType::F16, 2),
        _ => (DType::F32, 4),
    };
    Tensor::from_raw_buffer(bytes, dtype, &[bytes.len() / width], &Device::Cpu)?
        .to_dtype(DType::F32)?
        .to_vec1()
}

/// Joins `[N_i, K]` weights into one `[K, sum N_i]`.
fn linear(
    parts: &[(&[f32], usize)],
    inputs: usize,
    bias: Option<Vec<f32>>,
) -> Result<Linear, WeightsError> {
    let outputs = parts.iter().map(|(_, n)| n).sum();
    let mut weight = vec![0.0; inputs * outputs];
    let mut first = 0;
    for (part, n) in parts {
        for (row, from) in part.chunks_exact(inputs).enumerate() {
            for (k, value) in from.iter().enumerate() {
                weight[k * outputs + first + row] = *value;
            }
        }
        first += n;
    }
    let weight = Tensor::from_vec(weight, (inputs, outputs), &Device::Cpu)
        .map_err(|error| WeightsError::Mismatch(error.to_string()))?;
    Ok(Linear { weight, bias, inputs, outputs })
}
