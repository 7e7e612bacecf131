//! `config.json` and `generation_config.json` of a checkpoint: the dimensions that the decoder needs, or why it
//! cannot serve this model.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Llama,
    Qwen2,
    Qwen3,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HfConfig {
    pub family: Family,
    pub architecture: String,
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_eps: f32,
    pub rope_theta: f64,
    pub tied: bool,
    /// True if q, k and v have biases.
    pub qkv_bias: bool,
    /// True if the output projection has a bias too: Llama and Qwen3 with `attention_bias`.
    pub out_bias: bool,
    pub context: u32,
    pub eos: Vec<u32>,
}

#[derive(Deserialize)]
struct Raw {
    model_type: String,
    #[serde(default)]
    architectures: Option<Vec<String>>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_parameters: Option<Value>,
    rope_scaling: Option<Value>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    use_sliding_window: Option<bool>,
    sliding_window: Option<Value>,
    max_position_embeddings: Option<u32>,
    eos_token_id: Option<Ids>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl HfConfig {
    pub fn read(dir: &Path) -> Result<Self, String> {
        let raw: Raw =
            read_json(&dir.join("config.json"))?.ok_or("there is no config.json in it")?;
        let generation: Option<Value> = read_json(&dir.join("generation_config.json"))?;
        Self::from_raw(raw, generation)
    }

    fn from_raw(raw: Raw, generation: Option<Value>) -> Result<Self, String> {
        let family = match raw.model_type.as_str() {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            other => {
                return Err(format!("model_type is {other:?}; served are llama, qwen2 and qwen3"));
            }
        };
        refuse_unserved(&raw, family)?;
        let heads = raw.num_attention_heads;
        let kv_heads = raw.num_key_value_heads.unwrap_or(heads);
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(format!(
                "{heads} attention heads do not divide into {kv_heads} key-value heads"
            ));
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(format!("head_dim is {head_dim}; rotary positions need an even one"));
        }
        let attention_bias = raw.attention_bias.unwrap_or(false) && family != Family::Qwen2;
        Ok(Self {
            family,
            architecture: raw.architectures.iter().flatten().next().cloned().unwrap_or_default(),
            vocab: raw.vocab_size,
            hidden: raw.hidden_size,
            intermediate: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            rms_eps: raw.rms_norm_eps as f32,
            rope_theta: rope_theta(&raw)?,
            tied: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias: family == Family::Qwen2 || attention_bias,
            out_bias: attention_bias,
            context: raw.max_position_embeddings.unwrap_or(u32::MAX),
            eos: eos_ids(raw.eos_token_id, generation),
        })
    }

    pub fn kind(&self) -> &'static str {
        match self.family {
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }
}

fn refuse_unserved(raw: &Raw, family: Family) -> Result<(), String> {
    if raw.hidden_act.as_deref().is_some_and(|act| act != "silu") {
        return Err(format!("hidden_act is {:?}; served is silu", raw.hidden_act));
    }
    if raw.mlp_bias == Some(true) {
        return Err("mlp_bias is true; served are models without it".to_owned());
    }
    // Qwen writes a window into every config and turns it on by a flag of its own.
    let window = raw.sliding_window.as_ref().is_some_and(|window| !window.is_null());
    if raw.use_sliding_window.unwrap_or(window && family == Family::Llama) {
        return Err("a sliding window is on; served is full attention".to_owned());
    }
    Ok(())
}

fn rope_theta(raw: &Raw) -> Result<f64, String> {
    for field in [&raw.rope_parameters, &raw.rope_scaling] {
        let kind = field
            .as_ref()
            .and_then(|rope| rope.get("rope_type").or(rope.get("type")))
            .and_then(Value::as_str);
        if let Some(kind) = kind
            && kind != "default"
        {
            return Err(format!("rope_type is {kind:?}; served is the default without scaling"));
        }
    }
    let nested = raw
        .rope_parameters
        .as_ref()
        .and_then(|rope| rope.get("rope_theta"))
        .and_then(Value::as_f64);
    Ok(nested.or(raw.rope_theta).unwrap_or(10_000.0))
}

/// End tokens of both files; either list may be the longer one.
fn eos_ids(config: Option<Ids>, generation: Option<Value>) -> Vec<u32> {
    let named =
        generation.and_then(|mut value| serde_json::from_value(value["eos_token_id"].take()).ok());
    let mut ids = Vec::new();
    for source in [config, named].into_iter().flatten() {
        match source {
            Ids::One(id) => ids.push(id),
            Ids::Many(many) => ids.extend(many),
        }
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, String> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|why| format!("{}: {why}", path.display())),
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(why) => Err(format!("{}: {why}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(change: impl FnOnce(&mut Value)) -> Result<HfConfig, String> {
        let mut config = json!({"model_type": "qwen2", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
            "sliding_window": null, "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}, "eos_token_id": 3});
        change(&mut config);
        HfConfig::from_raw(
            serde_json::from_value(config).unwrap(),
            Some(json!({"eos_token_id": [4, 3]})),
        )
    }

    #[test]
    fn both_places_of_rope_theta_and_both_lists_of_ends_are_read() {
        let config = parse(|_| {}).unwrap();
        assert_eq!(
            (config.rope_theta, config.eos.clone(), config.head_dim, config.qkv_bias),
            (5.0, vec![3, 4], 4, true)
        );
        let old = parse(|config| {
            config["rope_parameters"] = Value::Null;
            config["rope_theta"] = json!(7.0);
        });
        assert_eq!(old.unwrap().rope_theta, 7.0);
    }

    #[test]
    fn models_that_would_be_computed_wrongly_are_refused() {
        let refused =
            |field: &str, value: Value| parse(|config| config[field] = value).unwrap_err();
        assert!(refused("model_type", json!("gemma")).contains("gemma"));
        assert!(refused("hidden_act", json!("gelu")).contains("gelu"));
        assert!(refused("use_sliding_window", json!(true)).contains("window"));
        assert!(refused("rope_scaling", json!({"rope_type": "llama3"})).contains("llama3"));
        assert!(refused("num_key_value_heads", json!(3)).contains("do not divide into 3"));
    }
}
