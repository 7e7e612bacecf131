//! The SGLang dialect: `/generate` as server-sent events and the control calls, as an unmodified
//! server (0.5.x) and the embedded engine serve them. Owns the connection pool; decides nothing.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anabranch_proto::LogprobsMode;
use bytes::Bytes;
use hyper::Method;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use self::http::{HttpError, Pool, Reply};
use super::{
    Chunk, Engine, EngineError, EngineInfo, Generate, StreamError, TokenStream, Utilization,
};
use crate::config::EngineUrl;

/// Chunks of a stream.
pub mod chunk;
/// HTTP/1.1 to one engine.
pub mod http;
mod info;
mod request;
mod stream;

pub use stream::SglangStream;

/// One SGLang server.
pub struct Sglang {
    pool: Pool,
    logprobs_mode: Option<LogprobsMode>,
    /// True if chunks carry only new tokens; known after [`Engine::info`].
    incremental: AtomicBool,
}

impl Sglang {
    /// A client for the server at `url`.
    pub fn new(
        url: &EngineUrl,
        api_key: Option<String>,
        logprobs_mode: Option<LogprobsMode>,
    ) -> Sglang {
        Sglang {
            pool: Pool::new(url.authority(), api_key),
            logprobs_mode,
            incremental: AtomicBool::new(true),
        }
    }

    async fn get(&self, call: &'static str, path: &str) -> Result<Bytes, EngineError> {
        self.call(call, Method::GET, path, Bytes::new(), QUICK).await
    }

    async fn post<T: Serialize + Sync>(
        &self,
        call: &'static str,
        path: &str,
        body: &T,
        patience: Duration,
    ) -> Result<Bytes, EngineError> {
        let body = serde_json::to_vec(body).expect("plain structs serialise");
        self.call(call, Method::POST, path, body.into(), patience).await
    }

    async fn call(
        &self,
        call: &'static str,
        method: Method,
        path: &str,
        body: Bytes,
        patience: Duration,
    ) -> Result<Bytes, EngineError> {
        let exchange = async {
            let reply = self.pool.send(method, path, body).await?;
            let status = reply.status();
            Ok((status, reply.bytes(MAX_ANSWER_BYTES).await?))
        };
        let answered: Result<_, HttpError> = timeout(patience, exchange)
            .await
            .map_err(|_| EngineError::Timeout { call, after: patience })?;
        let (status, body) =
            answered.map_err(|error| EngineError::Unreachable { call, why: chain(&error) })?;
        if status.is_success() {
            return Ok(body);
        }
        Err(EngineError::Rejected { call, status: status.as_u16(), message: message(&body) })
    }
}

/// Time for calls that only read or flip a switch.
const QUICK: Duration = Duration::from_secs(5);
/// Time for calls that wait for the engine: a pause waits for the step under way, a flush for the
/// scheduler.
const SLOW: Duration = Duration::from_secs(60);
/// Time for a load: reading a large checkpoint.
const LOAD: Duration = Duration::from_secs(1800);
/// Largest answer that is read; `/server_info` is about 30 KB.
const MAX_ANSWER_BYTES: usize = 8 << 20;

impl Engine for Sglang {
    type Stream = SglangStream;

    async fn info(&self) -> Result<EngineInfo, EngineError> {
        let model = self.get("model_info", "/model_info").await?;
        let server = self.get("server_info", "/server_info").await?;
        // Older servers do not have this call.
        let loads = self.get("v1/loads", "/v1/loads?include=core").await.ok();
        let info = info::parse(&model, &server, loads.as_deref(), self.logprobs_mode)?;
        self.incremental.store(info.incremental, Ordering::Relaxed);
        Ok(info)
    }

    /// Asks `/model_info`. `/health` would generate a token, take a second, and fail while paused.
    async fn alive(&self) -> Result<String, EngineError> {
        info::parse_label(&self.get("model_info", "/model_info").await?)
    }

    async fn utilization(&self) -> Result<Utilization, EngineError> {
        info::parse_utilization(&self.get("v1/loads", "/v1/loads?include=core").await?)
    }

    async fn generate(&self, request: &Generate) -> Result<SglangStream, StreamError> {
        let incremental = self.incremental.load(Ordering::Relaxed);
        let body = request::body(request, incremental);
        let reply = self.pool.send(Method::POST, "/generate", body).await.map_err(lost)?;
        if reply.status().is_success() {
            return Ok(SglangStream::new(reply));
        }
        let code = reply.status().as_u16();
        let body = reply.bytes(MAX_ANSWER_BYTES).await.map_err(lost)?;
        Err(chunk::by_code(code, message(&body).into()))
    }

    async fn abort(&self, rid: &str) -> Result<(), EngineError> {
        self.post("abort_request", "/abort_request", &AbortBody { rid }, QUICK).await.map(drop)
    }

    async fn pause(&self) -> Result<(), EngineError> {
        let body = PauseBody { mode: "retract" };
        self.post("pause_generation", "/pause_generation", &body, SLOW).await.map(drop)
    }

    async fn continue_generation(&self) -> Result<(), EngineError> {
        let body = ContinueBody { torch_empty_cache: false };
        self.post("continue_generation", "/continue_generation", &body, SLOW).await.map(drop)
    }

    async fn load(&self, directory: &Path, label: &str) -> Result<(), EngineError> {
        let body = UpdateBody {
            model_path: &directory.to_string_lossy(),
            weight_version: label,
            abort_all_requests: false,
            flush_cache: true,
        };
        let path = "/update_weights_from_disk";
        match self.post("update_weights_from_disk", path, &body, LOAD).await {
            Ok(body) => updated(&body),
            Err(EngineError::Rejected { message, .. }) if message.contains(HALF_DONE) => {
                self.finish_half_done(label).await
            }
            Err(error) => Err(error),
        }
    }

    async fn flush(&self) -> Result<(), EngineError> {
        let path = "/flush_cache?timeout=5";
        self.post("flush_cache", path, &Empty {}, SLOW).await.map(drop)
    }

    async fn release_memory(&self) -> Result<(), EngineError> {
        let path = "/release_memory_occupation";
        self.post("release_memory_occupation", path, &MemoryBody { tags: None }, SLOW).await?;
        Ok(())
    }

    async fn resume_memory(&self) -> Result<(), EngineError> {
        let path = "/resume_memory_occupation";
        self.post("resume_memory_occupation", path, &MemoryBody { tags: None }, SLOW).await?;
        Ok(())
    }
}

/// Text of a status 400 of SGLang that hides a success: the weights did change, only the flush and
/// the label are missing.
const HALF_DONE: &str = "Weights were updated, but";

impl Sglang {
    /// Completes a load whose weights are in: flush, then label.
    async fn finish_half_done(&self, label: &str) -> Result<(), EngineError> {
        self.flush().await?;
        let body = LabelBody { new_version: label, abort_all_requests: false };
        self.post("update_weight_version", "/update_weight_version", &body, SLOW).await.map(drop)
    }
}

fn updated(body: &[u8]) -> Result<(), EngineError> {
    let call = "update_weights_from_disk";
    let answer: UpdateAnswer = serde_json::from_slice(body)
        .map_err(|error| EngineError::Malformed { call, what: error.to_string() })?;
    match answer.success {
        true => Ok(()),
        false => Err(EngineError::Rejected { call, status: 200, message: answer.message }),
    }
}

/// Text of an error answer, in whichever of SGLang's shapes.
fn message(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<ErrorAnswer>(body) {
        Ok(ErrorAnswer { error: Some(error), .. }) => error.message,
        Ok(ErrorAnswer { message: Some(message), .. }) => message,
        _ => String::from_utf8_lossy(body).into_owned(),
    };
    text.chars().take(MAX_MESSAGE_CHARS).collect()
}

/// Longest error text that is passed on, in characters.
const MAX_MESSAGE_CHARS: usize = 600;

fn lost(error: HttpError) -> StreamError {
    match error {
        HttpError::Connect { .. } => StreamError::Unreachable { why: chain(&error) },
        _ => StreamError::Broken { why: chain(&error) },
    }
}

/// An error with all its sources: hyper's errors say what went wrong only there.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    text
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct AbortBody<'a> {
    rid: &'a str,
}

#[derive(Serialize)]
struct PauseBody {
    mode: &'static str,
}

#[derive(Serialize)]
struct ContinueBody {
    torch_empty_cache: bool,
}

#[derive(Serialize)]
struct UpdateBody<'a> {
    model_path: &'a str,
    weight_version: &'a str,
    abort_all_requests: bool,
    flush_cache: bool,
}

#[derive(Serialize)]
struct LabelBody<'a> {
    new_version: &'a str,
    abort_all_requests: bool,
}

#[derive(Serialize)]
struct MemoryBody {
    tags: Option<Vec<&'static str>>,
}

#[derive(Deserialize)]
struct UpdateAnswer {
    success: bool,
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct ErrorAnswer {
    error: Option<ErrorText>,
    message: Option<String>,
}

#[derive(Deserialize)]
struct ErrorText {
    #[serde(default)]
    message: String,
}
