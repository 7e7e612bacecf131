//! The HTTP face in SGLang's dialect: routes, errors, the API key. Owns no sequence; every change goes to the
//! engine thread as a [`Command`].

#![allow(
    clippy::result_large_err,
    reason = "the error of a handler is the response to give instead"
)]

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, post};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use crate::config::EngineConfig;
use crate::driver::{Command, Shared};
use crate::sse;

mod control;
mod fault;
mod generate;
mod info;

/// Largest body: a prompt of a million tokens is about 8 MB of JSON.
const BODY_LIMIT_BYTES: usize = 64 << 20;

/// Facts and senders that a handler may use.
pub(crate) struct App {
    pub config: EngineConfig,
    pub commands: SyncSender<Command>,
    pub shared: Arc<Shared>,
    pub model: ModelFacts,
    pub started: std::time::Instant,
}

/// Facts of the model that do not change while the process lives.
#[derive(Clone, Debug)]
pub(crate) struct ModelFacts {
    pub name: String,
    pub kind: String,
    pub architecture: String,
    pub vocab: u32,
    pub eos_ids: Vec<u32>,
}

pub(crate) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new()
        .route("/generate", post(generate::generate))
        .route("/abort_request", post(control::abort_request))
        .route("/pause_generation", post(control::pause_generation))
        .route("/continue_generation", post(control::continue_generation))
        .route("/flush_cache", get(control::flush_cache).post(control::flush_cache))
        .route("/update_weights_from_disk", post(control::update_weights_from_disk))
        .route("/update_weight_version", post(control::update_weight_version))
        .route(
            "/release_memory_occupation",
            post(control::release_memory).get(control::release_memory),
        )
        .route(
            "/resume_memory_occupation",
            post(control::resume_memory).get(control::resume_memory),
        )
        .route("/model_info", get(info::model_info))
        .route("/get_model_info", get(info::model_info))
        .route("/server_info", get(info::server_info))
        .route("/get_server_info", get(info::server_info))
        .route("/v1/models", get(info::models))
        .route("/v1/loads", get(info::loads));
    if app.config.faults {
        router = router.route("/fault", post(fault::fault));
    }
    router
        .layer(from_fn_with_state(app.clone(), check_key))
        .route("/health", get(generate::health))
        .route("/health_generate", get(generate::health))
        .route("/ready", get(info::ready))
        .route("/metrics", get(info::metrics))
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .with_state(app)
}

impl App {
    /// Sends a command and waits for its answer; `Err` is the response to give instead.
    async fn ask<T>(
        &self,
        make: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Response> {
        let (done, answer) = oneshot::channel();
        self.tell(make(done))?;
        answer
            .await
            .map_err(|_| error(StatusCode::SERVICE_UNAVAILABLE, "the engine is shutting down"))
    }

    fn tell(&self, command: Command) -> Result<(), Response> {
        self.commands.try_send(command).map_err(|refused| {
            let why = match refused {
                TrySendError::Full(_) => "the engine's command queue is full; try again",
                TrySendError::Disconnected(_) => "the engine is shutting down",
            };
            error(StatusCode::SERVICE_UNAVAILABLE, why)
        })
    }
}

pub(crate) fn error(status: StatusCode, message: &str) -> Response {
    json_text(status, sse::error_json(message, status.as_u16()))
}

fn json_text(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn json(value: &serde_json::Value) -> Response {
    json_text(StatusCode::OK, value.to_string())
}

fn text(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response
}

/// Parses a body. SGLang wants JSON on every control call, even an empty object.
fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Response> {
    serde_json::from_slice(body).map_err(|why| {
        error(
            StatusCode::BAD_REQUEST,
            &format!("the body is not the JSON object that this call takes: {why}"),
        )
    })
}

async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if let Some(key) = &app.config.api_key {
        let given =
            request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        if given.and_then(|value| value.strip_prefix("Bearer ")) != Some(key.as_str()) {
            return error(
                StatusCode::UNAUTHORIZED,
                "Unauthorized: send `Authorization: Bearer <api key>`",
            );
        }
    }
    next.run(request).await
}
