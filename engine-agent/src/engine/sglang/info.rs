//! Facts about an SGLang server, from its answers, with the model directory's `config.json` for
//! what the server does not say.

use std::path::{Path, PathBuf};

use anabranch_proto::{Caps, LogprobsMode, Model, SeedKeying};
use serde::Deserialize;

use crate::engine::{EngineError, EngineInfo, Utilization};

pub(super) fn parse(
    model: &[u8],
    server: &[u8],
    loads: Option<&[u8]>,
    mode: Option<LogprobsMode>,
) -> Result<EngineInfo, EngineError> {
    let model: ModelInfo = json("model_info", model)?;
    let server: ServerInfo = json("server_info", server)?;
    let capacity =
        loads.and_then(|body| json::<RawLoads>("v1/loads", body).ok()).unwrap_or_default();
    let directory = Some(PathBuf::from(&model.model_path)).filter(|path| path.is_dir());
    let files = directory.as_deref().map(ModelFiles::read).unwrap_or_default();
    let embedded = server.version.starts_with(EMBEDDED);
    let incremental = server.incremental_streaming_output || server.stream_output;
    Ok(EngineInfo {
        kind: match embedded {
            true => server.version.clone(),
            false => format!("sglang {}", server.version),
        },
        caps: caps(&server, embedded, mode),
        kv_tokens: server.max_total_num_tokens.unwrap_or_else(|| capacity.kv_tokens()),
        max_running: server.max_running_requests.unwrap_or_else(|| capacity.max_running()),
        model: Model {
            id: model.served_model_name.unwrap_or_else(|| model.model_path.clone()),
            tokenizer_digest: files.tokenizer_digest,
            vocab: server.vocab_size.or(files.config.vocab()).unwrap_or(0),
            max_context: server.context_length.or(files.config.context()).unwrap_or(0),
            eos_ids: server.eos_token_ids.clone().unwrap_or(files.eos_ids),
            dtype: server.dtype.clone().or(files.config.dtype).unwrap_or_default(),
            quant: server.quantization.clone().unwrap_or_default(),
        },
        incremental,
        model_directory: directory,
        weight_label: model.weight_version.unwrap_or_default(),
    })
}

/// Start of the embedded engine's version text.
const EMBEDDED: &str = "anabranch-engine";

fn caps(server: &ServerInfo, embedded: bool, mode: Option<LogprobsMode>) -> Caps {
    // Without deterministic inference SGLang ignores the seed.
    let keying = match embedded || server.enable_deterministic_inference {
        true => SeedKeying::AbsolutePosition,
        false => SeedKeying::Unkeyed,
    };
    let said = match server.return_original_logprob {
        true => LogprobsMode::Raw,
        false => LogprobsMode::Tempered,
    };
    Caps {
        spans: true,
        pause_modes: ["abort", "retract", "in_place"].map(str::to_owned).into(),
        release_memory: server.enable_memory_saver,
        ..Caps::new(keying, vec![mode.unwrap_or(said)])
    }
}

pub(super) fn parse_label(body: &[u8]) -> Result<String, EngineError> {
    let model: ModelInfo = json("model_info", body)?;
    Ok(model.weight_version.unwrap_or_default())
}

pub(super) fn parse_utilization(body: &[u8]) -> Result<Utilization, EngineError> {
    let raw: RawLoads = json("v1/loads", body)?;
    let ranks = raw.loads.len().max(1) as f32;
    Ok(Utilization {
        running: raw.loads.iter().map(|load| load.num_running_reqs).sum(),
        waiting: raw.loads.iter().map(|load| load.num_waiting_reqs).sum(),
        kv_used: raw.loads.iter().map(|load| load.token_usage).sum::<f32>() / ranks,
    })
}

fn json<'a, T: Deserialize<'a>>(call: &'static str, body: &'a [u8]) -> Result<T, EngineError> {
    serde_json::from_slice(body)
        .map_err(|error| EngineError::Malformed { call, what: error.to_string() })
}

#[derive(Deserialize)]
struct ModelInfo {
    model_path: String,
    served_model_name: Option<String>,
    weight_version: Option<String>,
}

/// The few keys that matter, of some 556.
#[derive(Deserialize)]
struct ServerInfo {
    #[serde(default)]
    version: String,
    vocab_size: Option<u32>,
    context_length: Option<u32>,
    eos_token_ids: Option<Vec<u32>>,
    max_total_num_tokens: Option<u64>,
    max_running_requests: Option<u32>,
    dtype: Option<String>,
    quantization: Option<String>,
    #[serde(default)]
    incremental_streaming_output: bool,
    /// Older name of the flag, until 0.5.6.
    #[serde(default)]
    stream_output: bool,
    #[serde(default)]
    enable_deterministic_inference: bool,
    #[serde(default)]
    enable_memory_saver: bool,
    #[serde(default)]
    return_original_logprob: bool,
}

#[derive(Deserialize, Default)]
struct RawLoads {
    loads: Vec<RawLoad>,
}

impl RawLoads {
    /// KV cache of all data-parallel ranks. An engine that does not say gets a modest guess: 0
    /// would mean none.
    fn kv_tokens(&self) -> u64 {
        let sum = self.loads.iter().map(|load| load.max_total_num_tokens).sum();
        if sum == 0 { GUESSED_KV_TOKENS } else { sum }
    }

    fn max_running(&self) -> u32 {
        let sum = self.loads.iter().map(|load| load.max_running_requests).sum();
        if sum == 0 { GUESSED_MAX_RUNNING } else { sum }
    }
}

const GUESSED_KV_TOKENS: u64 = 65_536;
const GUESSED_MAX_RUNNING: u32 = 64;

#[derive(Deserialize)]
struct RawLoad {
    #[serde(default)]
    num_running_reqs: u32,
    #[serde(default)]
    num_waiting_reqs: u32,
    #[serde(default)]
    token_usage: f32,
    #[serde(default)]
    max_total_num_tokens: u64,
    #[serde(default)]
    max_running_requests: u32,
}

/// Facts from a Hugging Face model directory, empty if a file is missing or unreadable.
#[derive(Default)]
struct ModelFiles {
    config: HfConfig,
    eos_ids: Vec<u32>,
    tokenizer_digest: String,
}

#[derive(Deserialize, Default)]
struct HfConfig {
    vocab_size: Option<u32>,
    max_position_embeddings: Option<u32>,
    #[serde(alias = "torch_dtype")]
    dtype: Option<String>,
    eos_token_id: Option<Ids>,
    text_config: Option<Box<HfConfig>>,
}

#[derive(Deserialize, Default)]
struct HfGeneration {
    eos_token_id: Option<Ids>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl ModelFiles {
    fn read(directory: &Path) -> ModelFiles {
        let config: HfConfig = file(directory, "config.json");
        let generation: HfGeneration = file(directory, "generation_config.json");
        let mut eos_ids: Vec<u32> = [&config.eos_token_id, &generation.eos_token_id]
            .into_iter()
            .flatten()
            .flat_map(Ids::list)
            .collect();
        eos_ids.sort_unstable();
        eos_ids.dedup();
        let tokenizer_digest = std::fs::read(directory.join("tokenizer.json"))
            .map(|bytes| blake3::hash(&bytes).to_hex().to_string())
            .unwrap_or_default();
        ModelFiles { config, eos_ids, tokenizer_digest }
    }
}

fn file<T: for<'a> Deserialize<'a> + Default>(directory: &Path, name: &str) -> T {
    let Ok(bytes) = std::fs::read(directory.join(name)) else { return T::default() };
    serde_json::from_slice(&bytes).unwrap_or_else(|error| {
        tracing::warn!(file = %directory.join(name).display(), %error, "ignored: not the expected JSON");
        T::default()
    })
}

impl HfConfig {
    fn vocab(&self) -> Option<u32> {
        self.vocab_size.or_else(|| self.text_config.as_ref()?.vocab())
    }

    fn context(&self) -> Option<u32> {
        self.max_position_embeddings.or_else(|| self.text_config.as_ref()?.context())
    }
}

impl Ids {
    fn list(&self) -> Vec<u32> {
        match self {
            Ids::One(id) => vec![*id],
            Ids::Many(ids) => ids.clone(),
        }
    }
}
