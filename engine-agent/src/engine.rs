//! The interface to an inference engine, whatever its dialect. Typed: no JSON passes this line. The
//! state of an attempt belongs to [`crate::core`].

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{Caps, Model, Sampling};

/// A stand-in for an engine in a relay.
pub mod relay;
/// The SGLang dialect.
pub mod sglang;

/// One engine process, reached over its own protocol. Calls may run at the same time.
pub trait Engine: Send + Sync + 'static {
    /// Stream of tokens.
    type Stream: TokenStream;

    /// Facts that the engine tells about itself; read once per life. [`Engine::alive`] is the
    /// cheaper question later.
    fn info(&self) -> impl Future<Output = Result<EngineInfo, EngineError>> + Send;

    /// The label of the engine's weights. Answers fast, also while paused.
    fn alive(&self) -> impl Future<Output = Result<String, EngineError>> + Send;

    /// Number of requests and share of the KV cache in use.
    fn utilization(&self) -> impl Future<Output = Result<Utilization, EngineError>> + Send;

    /// Starts a request.
    fn generate(
        &self,
        request: &Generate,
    ) -> impl Future<Output = Result<Self::Stream, StreamError>> + Send;

    /// Aborts a request. The answer says nothing about the outcome: only the terminal chunk of the
    /// stream does.
    fn abort(&self, rid: &str) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Pauses generation: requests go back to the engine's queue, and their KV cache is rebuilt
    /// after [`Engine::continue_generation`].
    fn pause(&self) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Continues after a pause.
    fn continue_generation(&self) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Loads a safetensors directory, drops every cache made by older weights, and takes the label.
    fn load(
        &self,
        directory: &Path,
        label: &str,
    ) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Drops the prefix cache.
    fn flush(&self) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Gives GPU memory back; the engine must be idle.
    fn release_memory(&self) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Takes GPU memory again; the weights are gone.
    fn resume_memory(&self) -> impl Future<Output = Result<(), EngineError>> + Send;
}

/// Tokens of one request, as they come.
pub trait TokenStream: Send {
    /// Waits for the next chunk and fills `chunk`, whose buffers are reused. Not to be called after
    /// a finish or an error.
    fn next(&mut self, chunk: &mut Chunk) -> impl Future<Output = Result<(), StreamError>> + Send;

    /// Reads the rest after the finish, so that the connection can serve again.
    fn close(&mut self) -> impl Future<Output = ()> + Send;
}

/// Name of one attempt, within one life of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId(pub u64);

/// A request to the engine. The input is `prompt` followed by `tail`.
#[derive(Clone, Debug)]
pub struct Generate {
    /// The attempt that the request belongs to.
    pub attempt: AttemptId,
    /// Request id, of fixed width, so that no id is a prefix of another.
    pub rid: String,
    /// Token ids of the prompt.
    pub prompt: Arc<[u32]>,
    /// Token ids generated so far.
    pub tail: Vec<u32>,
    /// Sampling settings of the sample.
    pub sampling: Arc<Sampling>,
    /// Most tokens to generate: what remains of the sample's budget.
    pub max_tokens: u32,
    /// Fewest tokens to generate before a stop counts.
    pub min_tokens: u32,
    /// Token ids that end the request.
    pub stop_ids: Arc<[u32]>,
    /// Seed; `None` if the engine ignores seeds.
    pub seed: Option<u64>,
}

/// Tokens since the last chunk. There are as many log-probabilities as tokens.
#[derive(Debug, Default)]
pub struct Chunk {
    /// New token ids.
    pub tokens: Vec<u32>,
    /// Log-probability of each new token.
    pub logprobs: Vec<f32>,
    /// Set by the terminal chunk.
    pub finish: Option<Finish>,
    /// Token counts of the prompt.
    pub usage: Usage,
    /// Label of the engine's weights when it sent the chunk; empty if the engine does not say.
    pub label: String,
    /// Weights that made each of the request's tokens; at most with the finish.
    pub spans: Vec<LabelSpan>,
}

/// Token counts of a request's prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Length of the input.
    pub prompt_tokens: u32,
    /// Part of the input found in the prefix cache.
    pub cached_tokens: u32,
}

/// Tokens `[start, end)` of a request were made under `label`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelSpan {
    /// Label of the weights.
    pub label: String,
    /// First token of the span, counted within the request.
    pub start: u32,
    /// End of the span, exclusive.
    pub end: u32,
}

/// Reason of a request's end, as the engine tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop id or EOS came.
    StopId,
    /// This stop string came.
    StopString(String),
    /// The budget is used up.
    Length,
    /// The request was aborted.
    Aborted,
}

/// Reason why a stream ended without a finish.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The engine refused the request, which would be wrong elsewhere too.
    #[error("the engine refused the request ({code}): {message}")]
    Refused {
        /// Status code.
        code: u16,
        /// Text of the engine.
        message: String,
    },
    /// The engine failed by a fault of its own.
    #[error("the engine failed ({code}): {message}")]
    Failed {
        /// Status code.
        code: u16,
        /// Text of the engine.
        message: String,
    },
    /// The stream does not follow the protocol.
    #[error("the engine sent something that makes no sense: {what}")]
    Malformed {
        /// The mistake in words.
        what: String,
    },
    /// The stream ended in order, but without a finish.
    #[error("the stream ended without a finish")]
    CleanEnd,
    /// The connection broke.
    #[error("the connection broke: {why}")]
    Broken {
        /// Reason in words.
        why: String,
    },
    /// Nothing listens at the engine's address.
    #[error("the engine is not reachable: {why}")]
    Unreachable {
        /// Reason in words.
        why: String,
    },
}

/// Failure of a control call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// No connection to the engine.
    #[error("{call}: the engine is not reachable: {why}")]
    Unreachable {
        /// Name of the call.
        call: &'static str,
        /// Reason in words.
        why: String,
    },
    /// The engine did not answer in time.
    #[error("{call}: no answer within {after:?}")]
    Timeout {
        /// Name of the call.
        call: &'static str,
        /// Time waited.
        after: Duration,
    },
    /// The engine answered with an error.
    #[error("{call}: the engine answered {status}: {message}")]
    Rejected {
        /// Name of the call.
        call: &'static str,
        /// Status code.
        status: u16,
        /// Text of the engine.
        message: String,
    },
    /// The answer does not follow the protocol.
    #[error("{call}: the engine's answer makes no sense: {what}")]
    Malformed {
        /// Name of the call.
        call: &'static str,
        /// The mistake in words.
        what: String,
    },
}

/// Facts that an engine tells about itself, read once per life.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineInfo {
    /// Dialect and version, as in "sglang 0.5.23".
    pub kind: String,
    /// The model that the engine serves.
    pub model: Model,
    /// Abilities of the engine.
    pub caps: Caps,
    /// Size of the KV cache, in tokens.
    pub kv_tokens: u64,
    /// Most requests that run at once.
    pub max_running: u32,
    /// True if chunks carry only new tokens; false if each repeats all tokens from the start.
    pub incremental: bool,
    /// Directory of the start-up weights, if this host can read it.
    pub model_directory: Option<PathBuf>,
    /// Label of the present weights.
    pub weight_label: String,
}

/// Load of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Utilization {
    /// Requests that run.
    pub running: u32,
    /// Requests in the engine's queue.
    pub waiting: u32,
    /// Share of the KV cache in use, 0 to 1.
    pub kv_used: f32,
}

// === impl Chunk ===

impl Chunk {
    /// Empties the chunk; label and usage stay.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.logprobs.clear();
        self.spans.clear();
        self.finish = None;
    }
}

// === impl EngineError ===

impl EngineError {
    /// True if the process is gone; false if it answered no, or not in time.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, EngineError::Unreachable { .. })
    }
}
