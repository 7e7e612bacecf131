//! `anabranch engine`: the embedded CPU engine, in SGLang's dialect.

use std::net::SocketAddr;
use std::path::PathBuf;

use anabranch_engine::synthetic::SyntheticParams;
use anabranch_engine::{EngineConfig, EngineError, ModelSpec, Server};
use anabranch_runtime::Exit;
use anabranch_runtime::signal::shutdown_signal;
use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, OrExit, Outcome};

/// Flags of `anabranch engine`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// synthetic, or hf:DIR, a Llama, Qwen2 or Qwen3 checkpoint in safetensors
    #[arg(long, value_parser = model)]
    model: Model,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:30000")]
    listen: SocketAddr,
    /// Tokens per second of each running sample [default: as fast as possible]
    #[arg(long)]
    rate: Option<f64>,
    /// Prompt tokens per second of a prefill [default: no delay]
    #[arg(long)]
    prefill_rate: Option<f64>,
    /// Tokens per stream chunk after the first
    #[arg(long)]
    chunk: Option<u32>,
    /// The model's context length
    #[arg(long)]
    context_capacity: Option<u32>,
    /// Samples that run at once
    #[arg(long)]
    max_running: Option<u32>,
    /// Requests that may wait
    #[arg(long)]
    max_waiting: Option<u32>,
    /// Tokens of KV cache over all running samples
    #[arg(long)]
    kv_tokens: Option<u64>,
    /// Each chunk repeats everything, as SGLang does by default
    #[arg(long)]
    cumulative: bool,
    /// Serve POST /fault, with which tests break this engine
    #[arg(long)]
    faults: bool,
    /// Bearer token that requests must carry
    #[arg(long, env = "ANABRANCH_ENGINE_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Log-probabilities before temperature (hf models)
    #[arg(long)]
    return_original_logprob: bool,
    /// A file that counts the tokens made, for benches
    #[arg(long, hide = true)]
    meter: Option<PathBuf>,
    /// Vocabulary of the synthetic model
    #[arg(long)]
    vocab: Option<u32>,
    /// EOS of the synthetic model
    #[arg(long)]
    eos_id: Option<u32>,
    /// Mean length of the synthetic model's answers [default: they end only at their limit]
    #[arg(long)]
    mean_len: Option<u32>,
}

#[derive(Clone, Debug)]
enum Model {
    Synthetic,
    Hf(PathBuf),
}

fn model(text: &str) -> Result<Model, String> {
    match text.split_once(':') {
        None if text == "synthetic" => Ok(Model::Synthetic),
        Some(("hf", dir)) if !dir.is_empty() => Ok(Model::Hf(dir.into())),
        _ => Err("write synthetic, or hf:DIR for a checkpoint directory".into()),
    }
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    let server = Server::bind(args.config()).await.map_err(failure)?;
    let stop = CancellationToken::new();
    let addr = server.local_addr();
    tracing::info!(%addr, "the engine listens; attach it with: anabranch agent --engine sglang=http://{addr}");
    let run = server.run(stop.clone());
    let mut run = std::pin::pin!(run);
    tokio::select! {
        ended = &mut run => return ended.map(|()| Exit::Ok).map_err(failure),
        signal = shutdown_signal() => {
            let signal = signal.or_exit(Exit::Io)?;
            tracing::info!(signal, "the engine stops");
            stop.cancel();
        }
    }
    run.await.map(|()| Exit::Ok).map_err(failure)
}

fn failure(error: EngineError) -> Failure {
    let exit = match &error {
        EngineError::Config { .. } | EngineError::NoCandle => Exit::Usage,
        EngineError::Listen { .. } => Exit::CannotCreate,
        EngineError::Weights(_) | EngineError::Model { .. } => Exit::Data,
        _ => Exit::Internal,
    };
    Failure::new(exit, error)
}

// === impl Args ===

impl Args {
    fn config(self) -> EngineConfig {
        let params = SyntheticParams::default();
        let model = match self.model {
            Model::Hf(dir) => ModelSpec::Hf(dir),
            Model::Synthetic => ModelSpec::Synthetic(SyntheticParams {
                vocab: self.vocab.unwrap_or(params.vocab),
                eos_id: self.eos_id.unwrap_or(params.eos_id),
                mean_len: self.mean_len.or(params.mean_len),
            }),
        };
        let base = EngineConfig::new(model, self.listen);
        EngineConfig {
            rate: self.rate,
            prefill_rate: self.prefill_rate,
            chunk: self.chunk.unwrap_or(base.chunk),
            context_capacity: self.context_capacity.unwrap_or(base.context_capacity),
            max_running: self.max_running.unwrap_or(base.max_running),
            max_waiting: self.max_waiting.unwrap_or(base.max_waiting),
            kv_tokens: self.kv_tokens.unwrap_or(base.kv_tokens),
            incremental: !self.cumulative,
            faults: self.faults,
            meter: self.meter,
            api_key: self.api_key,
            return_original_logprob: self.return_original_logprob,
            ..base
        }
    }
}
