//! Settings of an engine process, and the errors of starting one.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::synthetic::SyntheticParams;
use crate::weights::WeightsError;

/// Model that an engine serves.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSpec {
    /// The oracle, which needs no checkpoint.
    Synthetic(SyntheticParams),
    /// A Llama, Qwen2 or Qwen3 checkpoint directory; needs the feature `candle`.
    Hf(PathBuf),
}

/// Settings of an engine process. Defaults are those of [`EngineConfig::new`].
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Model to serve.
    pub model: ModelSpec,
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Tokens per second of each running sample; default `None`, as fast as possible.
    pub rate: Option<f64>,
    /// Prompt tokens per second of a prefill, one sample at a time unhindered by others; default `None`, no delay.
    pub prefill_rate: Option<f64>,
    /// Tokens per stream chunk after the first, which is sent at once; default 8. A request's `stream_interval` wins.
    pub chunk: u32,
    /// Context length of the model in tokens, for a prompt and its `max_new_tokens`; default 32,768.
    pub context_capacity: u32,
    /// Samples that run at a time; default 256.
    pub max_running: u32,
    /// Requests that may wait; more are refused. Default 65,536.
    pub max_waiting: u32,
    /// Tokens of KV cache over all running samples; above it the youngest sample is retracted. Default 4 Mi.
    pub kv_tokens: u64,
    /// True if chunks are deltas (`--incremental-streaming-output`), the default; if not, each repeats everything, as
    /// SGLang's do by default.
    pub incremental: bool,
    /// True if `POST /fault` is served; default no.
    pub faults: bool,
    /// File that counts the tokens made, for bench and chaos runs; the file outlives a kill. Default none.
    pub meter: Option<PathBuf>,
    /// Bearer token for everything but health, readiness and metrics; default none.
    pub api_key: Option<String>,
    /// Label `weight_version` before the first update; default "default".
    pub weight_version: String,
    /// True if log-probabilities are those before temperature (`SGLANG_RETURN_ORIGINAL_LOGPROB`); `hf` models only.
    /// Default no.
    pub return_original_logprob: bool,
}

impl EngineConfig {
    /// Settings with all defaults.
    pub fn new(model: ModelSpec, listen: SocketAddr) -> Self {
        Self {
            model,
            listen,
            rate: None,
            prefill_rate: None,
            chunk: 8,
            context_capacity: 32_768,
            max_running: 256,
            max_waiting: 65_536,
            kv_tokens: 4 << 20,
            incremental: true,
            faults: false,
            meter: None,
            api_key: None,
            weight_version: "default".to_owned(),
            return_original_logprob: false,
        }
    }

    /// Settings of a synthetic engine on a free loopback port.
    pub fn synthetic(params: SyntheticParams) -> Self {
        Self::new(ModelSpec::Synthetic(params), SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub(crate) fn check(&self) -> Result<(), EngineError> {
        let wrong = |field, why| Err(EngineError::Config { field, why });
        let positive = |rate: Option<f64>| rate.is_none_or(|r| r.is_finite() && r > 0.0);
        if !positive(self.rate) {
            return wrong("rate", "must be a positive number of tokens per second");
        }
        if !positive(self.prefill_rate) {
            return wrong("prefill_rate", "must be a positive number of tokens per second");
        }
        if self.chunk == 0 || self.max_running == 0 || self.max_waiting == 0 {
            return wrong("chunk, max_running, max_waiting", "must be at least 1");
        }
        if self.context_capacity < 2 || self.kv_tokens < 2 {
            return wrong("context_capacity, kv_tokens", "must be at least 2");
        }
        if let ModelSpec::Synthetic(params) = &self.model
            && params.vocab < 2
        {
            return wrong("vocab", "must be at least 2");
        }
        Ok(())
    }
}

/// Reason why an engine cannot start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A setting is out of range.
    #[error("setting {field}: {why}")]
    Config { field: &'static str, why: &'static str },
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {source}; choose another --listen, or port 0 for a free one")]
    Listen { addr: SocketAddr, source: std::io::Error },
    /// The meter file cannot be written.
    #[error("cannot write the meter file {path}: {source}")]
    Meter { path: PathBuf, source: std::io::Error },
    /// The engine thread cannot be started.
    #[error("cannot start the engine thread: {0}")]
    Thread(std::io::Error),
    /// The checkpoint cannot be read, or is not the model's.
    #[error("cannot load the model: {0}")]
    Weights(#[from] WeightsError),
    /// The model cannot be served.
    #[error("cannot load {dir}: {reason}")]
    Model { dir: PathBuf, reason: String },
    /// An `hf` model in a build without the feature `candle`.
    #[error(
        "this binary was built without the feature `candle`, which serves hf:DIR models; use the synthetic model or build with --features candle"
    )]
    NoCandle,
    /// The engine thread panicked.
    #[error("the engine thread ended by a panic; its message is above in the log")]
    Panicked,
}
