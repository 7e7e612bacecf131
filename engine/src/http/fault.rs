//! `POST /fault`: the ways to break this engine on purpose, for chaos runs and tests. Not served unless asked for.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde_json::json;

use super::{App, error, json, parse};
use crate::driver::{Command, Fault};

#[derive(Deserialize)]
struct FaultBody {
    kind: Kind,
    factor: Option<f64>,
    ms: Option<u64>,
    count: Option<usize>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Die,
    Stall,
    Slow,
    EndEarly,
    LoseFinish,
    Corrupt,
    Reset,
    Clear,
}

pub(super) async fn fault(State(app): State<Arc<App>>, body: Bytes) -> Response {
    let body: FaultBody = match parse(&body) {
        Ok(body) => body,
        Err(response) => return response,
    };
    // A count of streams to come is one unless said otherwise, a count of running streams is all.
    let (next, running) = (body.count.unwrap_or(1), body.count.unwrap_or(usize::MAX));
    let fault = match body.kind {
        Kind::Die => std::process::abort(),
        Kind::Stall => Fault::Stall(body.ms.map(Duration::from_millis)),
        Kind::Slow => match body.factor {
            Some(factor) if (1.0..=1e6).contains(&factor) => Fault::Slow(factor),
            _ => {
                return error(
                    StatusCode::BAD_REQUEST,
                    "slow needs a factor in [1, 1e6] to divide the rate by",
                );
            }
        },
        Kind::EndEarly => Fault::EndEarly(running),
        Kind::Reset => Fault::Reset(running),
        Kind::LoseFinish => Fault::LoseFinish(next),
        Kind::Corrupt => Fault::Corrupt(next),
        Kind::Clear => Fault::Clear,
    };
    match app.ask(|done| Command::Fault(fault, done)).await {
        Ok(affected) => json(&json!({"ok": true, "affected": affected})),
        Err(response) => response,
    }
}
