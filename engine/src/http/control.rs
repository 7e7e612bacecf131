//! The control calls, with SGLang's bodies and answers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde_json::json;

use super::{App, error, json, json_text, parse, text};
use crate::driver::Command;
use crate::step::{PauseMode, Update, UpdateReply};

#[derive(Deserialize)]
struct Abort {
    #[serde(default)]
    rid: Option<String>,
    #[serde(default)]
    abort_all: bool,
}

/// Answers 200 with an empty body in any case: the outcome shows on the stream of the request itself.
pub(super) async fn abort_request(State(app): State<Arc<App>>, body: Bytes) -> Response {
    let abort: Abort = match parse(&body) {
        Ok(abort) => abort,
        Err(response) => return response,
    };
    let command = match abort.rid {
        _ if abort.abort_all => Command::AbortAll,
        Some(rid) if !rid.is_empty() => Command::Abort { rid },
        _ => return text(StatusCode::OK, Body::empty()),
    };
    match app.tell(command) {
        Ok(()) => text(StatusCode::OK, Body::empty()),
        Err(response) => response,
    }
}

#[derive(Deserialize)]
struct Pause {
    #[serde(default)]
    mode: Option<String>,
}

pub(super) async fn pause_generation(State(app): State<Arc<App>>, body: Bytes) -> Response {
    let pause: Pause = match parse(&body) {
        Ok(pause) => pause,
        Err(response) => return response,
    };
    let mode = match pause.mode.as_deref().unwrap_or("abort") {
        "abort" => PauseMode::Abort,
        "retract" => PauseMode::Retract,
        "in_place" => PauseMode::InPlace,
        other => {
            let message = format!("mode is {other:?}; it must be abort, retract or in_place");
            return error(StatusCode::BAD_REQUEST, &message);
        }
    };
    match app.ask(|done| Command::Pause(mode, done)).await {
        Ok(()) => json(&json!({"message": "Generation paused successfully.", "status": "ok"})),
        Err(response) => response,
    }
}

pub(super) async fn continue_generation(State(app): State<Arc<App>>, body: Bytes) -> Response {
    if let Err(response) = parse::<serde_json::Map<String, serde_json::Value>>(&body) {
        return response;
    }
    match app.ask(Command::Continue).await {
        Ok(()) => json(&json!({"message": "Generation continued successfully.", "status": "ok"})),
        Err(response) => response,
    }
}

#[derive(Deserialize)]
pub(super) struct FlushQuery {
    #[serde(default)]
    timeout: Option<f64>,
}

pub(super) async fn flush_cache(
    State(app): State<Arc<App>>,
    Query(query): Query<FlushQuery>,
) -> Response {
    let timeout = Duration::try_from_secs_f64(query.timeout.unwrap_or(0.0).clamp(0.0, 3600.0))
        .unwrap_or_default();
    match app.ask(|done| Command::Flush { timeout, done }).await {
        Ok(true) => {
            text(StatusCode::OK, "Cache flushed.\nPlease check backend logs for more details.\n")
        }
        Ok(false) => text(StatusCode::BAD_REQUEST, "Flush cache failed.\n"),
        Err(response) => response,
    }
}

#[derive(Deserialize)]
struct UpdateBody {
    model_path: PathBuf,
    #[serde(default)]
    abort_all_requests: bool,
    #[serde(default)]
    weight_version: Option<String>,
    #[serde(default)]
    flush_cache: Option<bool>,
}

pub(super) async fn update_weights_from_disk(State(app): State<Arc<App>>, body: Bytes) -> Response {
    let body: UpdateBody = match parse(&body) {
        Ok(body) => body,
        Err(response) => return response,
    };
    let update = Update {
        path: body.model_path,
        version: body.weight_version,
        abort_all: body.abort_all_requests,
        flush: body.flush_cache.unwrap_or(true),
        ticket: 0,
    };
    match app.ask(|done| Command::Update(update, done)).await {
        Ok(UpdateReply { success, message }) => {
            let status = if success { StatusCode::OK } else { StatusCode::BAD_REQUEST };
            let body = json!({"success": success, "message": message, "num_paused_requests": 0});
            json_text(status, body.to_string())
        }
        Err(response) => response,
    }
}

#[derive(Deserialize)]
struct VersionBody {
    new_version: String,
    #[serde(default)]
    abort_all_requests: Option<bool>,
}

pub(super) async fn update_weight_version(State(app): State<Arc<App>>, body: Bytes) -> Response {
    let body: VersionBody = match parse(&body) {
        Ok(body) => body,
        Err(response) => return response,
    };
    let version = body.new_version.clone();
    let abort_all = body.abort_all_requests.unwrap_or(true);
    match app.ask(|done| Command::SetVersion { version, abort_all, done }).await {
        Ok(()) => {
            let message = format!("Weight version updated to {}", body.new_version);
            json(&json!({"success": true, "message": message, "new_version": body.new_version}))
        }
        Err(response) => response,
    }
}

#[derive(Deserialize, Default)]
struct MemoryBody {
    #[serde(default)]
    tags: Option<Vec<String>>,
}

impl MemoryBody {
    /// Parts that the tags name, as (weights, kv_cache); no tags name both.
    fn parts(body: &Bytes) -> Result<(bool, bool), Response> {
        let body: Self = if body.is_empty() { Self::default() } else { parse(body)? };
        let Some(tags) = body.tags else { return Ok((true, true)) };
        if let Some(tag) =
            tags.iter().find(|tag| !["weights", "kv_cache", "cuda_graph"].contains(&tag.as_str()))
        {
            let message =
                format!("unknown memory tag {tag:?}; known are weights, kv_cache, cuda_graph");
            return Err(error(StatusCode::BAD_REQUEST, &message));
        }
        let has = |name: &str| tags.iter().any(|tag| tag == name);
        Ok((has("weights"), has("kv_cache")))
    }
}

pub(super) async fn release_memory(State(app): State<Arc<App>>, body: Bytes) -> Response {
    let (weights, kv) = match MemoryBody::parts(&body) {
        Ok(parts) => parts,
        Err(response) => return response,
    };
    match app.ask(|done| Command::Release { weights, kv, done }).await {
        Ok(Ok(())) => json_text(StatusCode::OK, "null"),
        Ok(Err(message)) => error(StatusCode::BAD_REQUEST, &message),
        Err(response) => response,
    }
}

pub(super) async fn resume_memory(State(app): State<Arc<App>>, body: Bytes) -> Response {
    let (weights, kv) = match MemoryBody::parts(&body) {
        Ok(parts) => parts,
        Err(response) => return response,
    };
    match app.ask(|done| Command::ResumeMemory { weights, kv, done }).await {
        Ok(()) => json_text(StatusCode::OK, "null"),
        Err(response) => response,
    }
}
