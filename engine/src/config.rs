//! Settings of an engine process, and the errors of starting one.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::synthetic::SyntheticParams;
use crate::weights::WeightsError;

#[derive(Clone, Debug, PartialEq)]
pub enum ModelSpec {
    Synthetic(SyntheticParams),
    /// A Llama, Qwen2 or Qwen3 checkpoint directory; needs the feature `candle`.
    Hf(PathBuf),
}

#[derive(Clone, Debug)]
pub struct EngineConfig {
    pub model: ModelSpec,
    pub listen: SocketAddr,
    /// Tokens per second of each running sample; `None` is as fast as possible.
    pub rate: Option<f64>,
    /// Prompt tokens per second of a prefill, one sample at a time unhindered by others; `None` is at once.
    pub prefill_rate: Option<f64>,
    /// Tokens per stream chunk after the first, which is sent at once; a request's `stream_interval` wins.
    pub chunk: u32,
    /// The model's context length; a prompt and its `max_new_tokens` must fit in it.
    pub context_capacity: u32,
    pub max_running: u32,
    /// Requests that may wait; more are refused.
    pub max_waiting: u32,
    /// Tokens of KV cache over all running samples; above it the youngest sample is retracted.
    pub kv_tokens: u64,
    /// Chunks are deltas (`--incremental-streaming-output`); otherwise each repeats everything, as SGLang's default.
    pub incremental: bool,
    /// Serve `POST /fault`.
    pub faults: bool,
    /// File that counts the tokens made, for bench and chaos runs; the file outlives a kill.
    pub meter: Option<PathBuf>,
    /// Bearer token for everything but health, readiness and metrics.
    pub api_key: Option<String>,
    /// `weight_version` label before the first update.
    pub weight_version: String,
    /// Report log-probabilities before temperature (`SGLANG_RETURN_ORIGINAL_LOGPROB`); `hf` models only.
    pub return_original_logprob: bool,
}

impl EngineConfig {
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

    /// A synthetic engine on a free loopback port.
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

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("setting {field}: {why}")]
    Config { field: &'static str, why: &'static str },
    #[error("cannot listen on {addr}: {source}; choose another --listen, or port 0 for a free one")]
    Listen { addr: SocketAddr, source: std::io::Error },
    #[error("cannot write the meter file {path}: {source}")]
    Meter { path: PathBuf, source: std::io::Error },
    #[error("cannot start the engine thread: {0}")]
    Thread(std::io::Error),
    #[error("cannot load the model: {0}")]
    Weights(#[from] WeightsError),
    #[error("cannot load {dir}: {reason}")]
    Model { dir: PathBuf, reason: String },
    #[error(
        "this binary was built without the feature `candle`, which serves hf:DIR models; use the synthetic model or build with --features candle"
    )]
    NoCandle,
    #[error("the engine thread ended by a panic; its message is above in the log")]
    Panicked,
}
