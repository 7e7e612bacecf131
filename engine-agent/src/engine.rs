//! What the agent needs of an inference engine, whatever its dialect. Typed: no JSON passes this
//! line. Owns no state of a sample; that is [`crate::core`].

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::pb;

pub mod relay;
pub mod sglang;

/// One engine process, spoken to over its own protocol. Calls may run at the same time.
pub trait Engine: Send + Sync + 'static {
    type Stream: TokenStream;

    /// What it is and what it can do. Also how it is asked whether it lives, after attach: see
    /// [`Engine::alive`].
    fn info(&self) -> impl Future<Output = Result<EngineInfo, EngineError>> + Send;

    /// The label of its weights. Answers fast, also while paused.
    fn alive(&self) -> impl Future<Output = Result<String, EngineError>> + Send;

    fn utilization(&self) -> impl Future<Output = Result<Utilization, EngineError>> + Send;

    fn generate(
        &self,
        request: &Generate,
    ) -> impl Future<Output = Result<Self::Stream, StreamError>> + Send;

    /// An answer says nothing: only the stream's terminal chunk does.
    fn abort(&self, rid: &str) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Requests go back to the queue; their KV is rebuilt after [`Engine::resume`].
    fn pause(&self) -> impl Future<Output = Result<(), EngineError>> + Send;

    fn continue_generation(&self) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Loads a safetensors directory, drops every cache made by older weights, and takes the label.
    fn load(
        &self,
        directory: &Path,
        label: &str,
    ) -> impl Future<Output = Result<(), EngineError>> + Send;

    fn flush(&self) -> impl Future<Output = Result<(), EngineError>> + Send;

    fn release_memory(&self) -> impl Future<Output = Result<(), EngineError>> + Send;

    fn resume_memory(&self) -> impl Future<Output = Result<(), EngineError>> + Send;
}

/// The tokens of one request as they come.
pub trait TokenStream: Send {
    /// Fills `chunk` (its buffers are reused). After a chunk with a finish, or an error, do not
    /// call again.
    fn next(&mut self, chunk: &mut Chunk) -> impl Future<Output = Result<(), StreamError>> + Send;

    /// After the finish: reads what is left, so that the connection can serve again.
    fn close(&mut self) -> impl Future<Output = ()> + Send;
}

/// Names one request at the engine, within one life of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId(pub u64);

/// A request. Input is `prompt` followed by `tail`.
#[derive(Clone, Debug)]
pub struct Generate {
    pub attempt: AttemptId,
    /// Fixed width, so that no rid is a prefix of another.
    pub rid: String,
    pub prompt: Arc<[u32]>,
    pub tail: Vec<u32>,
    pub sampling: Arc<pb::Sampling>,
    /// Of this request: what remains, not what the sample was given.
    pub max_tokens: u32,
    pub min_tokens: u32,
    pub stop_ids: Arc<[u32]>,
    pub seed: Option<u64>,
}

/// What came since the last chunk. Log-probabilities are as many as tokens.
#[derive(Debug, Default)]
pub struct Chunk {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub finish: Option<Finish>,
    pub usage: Usage,
    /// The engine's weights when it sent the last chunk; empty where it does not say.
    pub label: String,
    /// Only with the finish, if at all: which weights made which of the request's tokens.
    pub spans: Vec<LabelSpan>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
}

/// Tokens `[start, end)` of a request were made under `label`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelSpan {
    pub label: String,
    pub start: u32,
    pub end: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    StopId,
    StopString(String),
    Length,
    Aborted,
}

/// Why a stream ended without a finish.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The engine says that the request is wrong: it will be wrong elsewhere too.
    #[error("the engine refused the request ({code}): {message}")]
    Refused { code: u16, message: String },
    /// The engine has a fault of its own.
    #[error("the engine failed ({code}): {message}")]
    Failed { code: u16, message: String },
    #[error("the engine sent something that makes no sense: {what}")]
    Malformed { what: String },
    #[error("the stream ended without a finish")]
    CleanEnd,
    #[error("the connection broke: {why}")]
    Broken { why: String },
    /// Nothing listens at the engine's address.
    #[error("the engine is not reachable: {why}")]
    Unreachable { why: String },
}

/// A control call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    #[error("{call}: the engine is not reachable: {why}")]
    Unreachable { call: &'static str, why: String },
    #[error("{call}: no answer within {after:?}")]
    Timeout { call: &'static str, after: Duration },
    #[error("{call}: the engine answered {status}: {message}")]
    Rejected { call: &'static str, status: u16, message: String },
    #[error("{call}: the engine's answer makes no sense: {what}")]
    Malformed { call: &'static str, what: String },
}

/// Read once per life of the engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineInfo {
    /// "sglang 0.5.23"
    pub kind: String,
    pub model: pb::Model,
    pub caps: pb::Caps,
    pub kv_tokens: u64,
    pub max_running: u32,
    /// Chunks carry deltas; otherwise each repeats all tokens from the start.
    pub incremental: bool,
    /// Where its start-up weights are, if this host can read them.
    pub model_directory: Option<PathBuf>,
    /// The label of the weights it has now.
    pub weight_label: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Utilization {
    pub running: u32,
    pub waiting: u32,
    /// 0..1
    pub kv_used: f32,
}

// === impl Chunk ===

impl Chunk {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.logprobs.clear();
        self.spans.clear();
        self.finish = None;
    }
}

// === impl EngineError ===

impl EngineError {
    /// The process is gone, as against: it answered no.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, EngineError::Unreachable { .. })
    }
}
