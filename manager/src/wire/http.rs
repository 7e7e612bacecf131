//! The same port over HTTP: health, metrics, state, events, and a small page that shows them. Reads only.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use anabranch_runtime::Role;
use anabranch_views::{LedgerView, StateAnswer, StatePage};
use axum::Router;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event as Sse, KeepAlive};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use futures_util::{Stream, StreamExt, stream};
use serde::Deserialize;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;

use crate::ledger::LedgerStats;
use crate::view::notices::Told;
use crate::wire::gate::Gate;

const PAGE: &str = include_str!("http/page.html");
const KEEP_ALIVE: Duration = Duration::from_secs(5);

pub(crate) fn router(gate: Arc<Gate>) -> Router {
    let guarded = Router::new()
        .route("/metrics", get(metrics))
        .route("/state", get(state))
        .route("/events", get(events))
        .route_layer(middleware::from_fn_with_state(gate.clone(), admit));
    Router::new()
        .route("/", get(page))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .merge(guarded)
        .with_state(gate)
}

/// A page of the state as JSON text: the core's view, with what only the driver knows.
pub(crate) async fn state_json(gate: &Gate, page: StatePage) -> Result<String, String> {
    let stopping = |_| "the manager is shutting down".to_owned();
    let answer = StateAnswer {
        anabranch: env!("CARGO_PKG_VERSION").into(),
        manager_epoch: gate.life.epoch,
        state: gate.inbox.state(page).await.map_err(stopping)?,
        ledger: ledger_view(gate.ledger.stats()),
    };
    serde_json::to_string(&answer).map_err(|error| format!("the state cannot be shown: {error}"))
}

fn ledger_view(stats: LedgerStats) -> LedgerView {
    let LedgerStats {
        tokens,
        repeated_tokens,
        stale_tokens,
        foreign_tokens,
        past_stop_tokens,
        cleared_tokens,
        resumed_tokens,
        broken,
        pages,
    } = stats;
    LedgerView {
        tokens,
        repeated_tokens,
        stale_tokens,
        foreign_tokens,
        past_stop_tokens,
        cleared_tokens,
        resumed_tokens,
        broken,
        pages,
    }
}

/// The page holds no data; it asks for the token itself where one is needed.
async fn page() -> Html<&'static str> {
    Html(PAGE)
}

async fn readyz(State(gate): State<Arc<Gate>>) -> (StatusCode, &'static str) {
    if gate.pulse.is_alive(&gate.clock) && !gate.drain.is_cancelled() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready: starting, stopping or stuck\n")
    }
}

async fn metrics(State(gate): State<Arc<Gate>>) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], gate.metrics.render()).into_response()
}

/// Page of `/state`. Without any of it: the first 256 engines.
#[derive(Deserialize)]
struct Asked {
    /// Session that the page begins with.
    #[serde(default)]
    from: u64,
    /// Most engines on the page; 0: 256.
    #[serde(default)]
    limit: u32,
}

async fn state(State(gate): State<Arc<Gate>>, Query(asked): Query<Asked>) -> Response {
    let page = match StatePage::new(asked.from, asked.limit) {
        Ok(page) => page,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    };
    match state_json(&gate, page).await {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why).into_response(),
    }
}

/// Told apart, since gRPC clients read a status that HTTP does not have.
pub(crate) async fn nothing_here(request: Request) -> Response {
    let kind = request.headers().get(header::CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        return tonic::Status::unimplemented("no such call; is the client of another version?")
            .into_http();
    }
    let text = "nothing here; try /, /livez, /readyz, /metrics, /state or /events\n";
    (StatusCode::NOT_FOUND, text).into_response()
}

#[derive(Deserialize)]
struct Since {
    /// Id of the last event that was seen.
    #[serde(default)]
    since: u64,
}

async fn events(
    State(gate): State<Arc<Gate>>,
    Query(Since { since }): Query<Since>,
    headers: HeaderMap,
) -> Response {
    let resumed = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let stream = notices(&gate, resumed.unwrap_or(since));
    axum::response::Sse::new(stream)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response()
}

/// Replay, then live, until the manager stops.
fn notices(gate: &Gate, since: u64) -> impl Stream<Item = Result<Sse, Infallible>> + use<> {
    let heard = gate.notices.listen(since);
    let live = BroadcastStream::new(heard.live).map(|told| match told {
        Ok(told) => sse(&told),
        Err(BroadcastStreamRecvError::Lagged(missed)) => {
            Sse::default().event("missed").data(missed.to_string())
        }
    });
    let replay: Vec<Sse> = heard.replay.iter().map(|told| sse(told)).collect();
    let drain = gate.drain.clone();
    stream::iter(replay).chain(live).take_until(async move { drain.cancelled().await }).map(Ok)
}

fn sse(told: &Told) -> Sse {
    Sse::default().id(told.id.to_string()).event(&told.name).data(&told.json)
}

/// With tokens on: `Authorization: Bearer ab1....` of the role admin or trainer.
async fn admit(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    let token = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    match gate.auth.check(token, &[Role::Admin, Role::Trainer]) {
        Ok(()) => next.run(request).await,
        Err(why) => {
            let ask = [(header::WWW_AUTHENTICATE, "Bearer")];
            (StatusCode::UNAUTHORIZED, ask, why + "\n").into_response()
        }
    }
}
