//! The call `/generate`: turns the request's JSON into a checked [`Request`], and the engine's frames into a response.
//! Also the health probe, which is a one-token generate as in SGLang.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{App, error, json_text, text};
use crate::driver::{Command, Frame, SINK_FRAMES, Sink};
use crate::model::Sampling;
use crate::sse;
use crate::step::Request;

/// Longest wait for a health probe: the default of `SGLANG_HEALTH_CHECK_TIMEOUT`.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(20);
const DEFAULT_MAX_NEW_TOKENS: i64 = 128;

#[derive(Deserialize)]
struct GenerateBody {
    rid: Option<Value>,
    input_ids: Option<Vec<i64>>,
    text: Option<Value>,
    #[serde(default)]
    sampling_params: Option<Params>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    return_logprob: Option<bool>,
    /// True to add the oracle's extra column as `meta_info.output_extra`; not in SGLang's dialect.
    #[serde(default)]
    return_extra: Option<bool>,
}

#[derive(Deserialize, Default)]
struct Params {
    max_new_tokens: Option<i64>,
    min_new_tokens: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    stop_token_ids: Option<Vec<i64>>,
    ignore_eos: Option<bool>,
    sampling_seed: Option<Value>,
    stream_interval: Option<i64>,
    n: Option<i64>,
    stop: Option<Value>,
    stop_regex: Option<Value>,
    json_schema: Option<Value>,
    regex: Option<Value>,
    ebnf: Option<Value>,
    logit_bias: Option<Value>,
    frequency_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    repetition_penalty: Option<f64>,
}

pub(super) async fn generate(
    State(app): State<Arc<App>>,
    Extension(connection): Extension<CancellationToken>,
    body: Bytes,
) -> Response {
    match parse(&app, &body) {
        Ok(request) => run(&app, request, connection, false).await,
        Err(Wrong::Shape(message)) => error(StatusCode::BAD_REQUEST, &message),
        Err(Wrong::Value { message, stream: true }) => {
            event_stream(sse::error_event(&message, 400))
        }
        Err(Wrong::Value { message, stream: false }) => error(StatusCode::BAD_REQUEST, &message),
    }
}

pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let sampling = Sampling {
        max_new_tokens: 1,
        ..check_sampling(&Params::default(), 0).expect("defaults are valid")
    };
    let request = Request {
        rid: fresh_rid("HEALTH_CHECK"),
        prompt: vec![0],
        sampling: Arc::new(sampling),
        stream: false,
        return_logprob: false,
        return_extra: false,
        interval: 1,
    };
    let run = run(&app, request, CancellationToken::new(), true);
    match tokio::time::timeout(HEALTH_TIMEOUT, run).await {
        Ok(response) if response.status() == StatusCode::OK => text(StatusCode::OK, Body::empty()),
        Ok(response) => response,
        Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, Body::empty()),
    }
}

async fn run(app: &App, request: Request, connection: CancellationToken, probe: bool) -> Response {
    let (frames, mut answers) = mpsc::channel(SINK_FRAMES);
    let stream = request.stream;
    if let Err(response) = app.tell(Command::Generate(request, Sink { frames, connection, probe }))
    {
        return response;
    }
    if stream {
        let events = ReceiverStream::new(answers).map(|frame| match frame {
            Frame::Data(bytes) | Frame::Error { body: bytes, .. } => Ok::<_, io::Error>(bytes),
        });
        return event_stream(Body::from_stream(events));
    }
    match answers.recv().await {
        Some(Frame::Data(body)) => json_text(StatusCode::OK, body),
        Some(Frame::Error { status, body }) => {
            json_text(StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST), body)
        }
        None => error(StatusCode::INTERNAL_SERVER_ERROR, "the engine dropped the request"),
    }
}

fn event_stream(body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    let headers = response.headers_mut();
    headers
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

enum Wrong {
    /// The schema refuses the body: a plain 400, also for a stream.
    Shape(String),
    /// A value is refused: a stream is told in the stream.
    Value { message: String, stream: bool },
}

fn parse(app: &App, body: &Bytes) -> Result<Request, Wrong> {
    let body: GenerateBody =
        serde_json::from_slice(body).map_err(|why| Wrong::Shape(explain(body, &why)))?;
    let rid = match body.rid {
        None | Some(Value::Null) => fresh_rid("anabranch"),
        Some(Value::String(rid)) if !rid.is_empty() => rid,
        Some(_) => {
            return Err(Wrong::Shape(
                "rid must be one non-empty string: this engine takes single requests".into(),
            ));
        }
    };
    if body.text.is_some_and(|text| !text.is_null()) {
        return Err(Wrong::Shape(
            "this engine has no tokenizer: send input_ids instead of text".into(),
        ));
    }
    let Some(ids) = body.input_ids else {
        return Err(Wrong::Shape("input_ids is required: a flat list of token ids".into()));
    };
    let params = body.sampling_params.unwrap_or_default();
    check_supported(&params).map_err(Wrong::Shape)?;
    let stream = body.stream.unwrap_or(false);
    let in_stream = |message| Wrong::Value { message, stream };
    let prompt = check_ids(&ids, app.model.vocab).map_err(in_stream)?;
    let sampling = check_sampling(&params, app.model.vocab).map_err(in_stream)?;
    let interval =
        params.stream_interval.map_or(app.config.chunk, |n| n.clamp(1, i64::from(u32::MAX)) as u32);
    Ok(Request {
        rid,
        prompt,
        sampling: Arc::new(sampling),
        stream,
        return_logprob: body.return_logprob.unwrap_or(false),
        return_extra: body.return_extra.unwrap_or(false),
        interval,
    })
}

/// Says what is wrong with a body. The commonest wrong body is a batch, which is named instead of quoting the parser.
fn explain(body: &Bytes, why: &serde_json::Error) -> String {
    let nested = |value: &Value| {
        value["input_ids"].as_array().is_some_and(|ids| ids.iter().any(Value::is_array))
    };
    match serde_json::from_slice::<Value>(body) {
        Ok(value) if nested(&value) => {
            "input_ids is a batch: this engine takes single requests, send one request for each"
                .to_owned()
        }
        _ => format!("the body is no /generate request: {why}"),
    }
}

fn check_supported(params: &Params) -> Result<(), String> {
    if params.n.is_some_and(|n| n != 1) {
        return Err(
            "sampling_params.n must be 1: send n requests, each with its own rid and sampling_seed"
                .into(),
        );
    }
    let given = |value: &Option<Value>| match value {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(items)) => !items.is_empty(),
        Some(_) => true,
    };
    let by_name = [
        ("stop", given(&params.stop)),
        ("stop_regex", given(&params.stop_regex)),
        ("json_schema", given(&params.json_schema)),
        ("regex", given(&params.regex)),
        ("ebnf", given(&params.ebnf)),
        ("logit_bias", given(&params.logit_bias)),
        ("frequency_penalty", params.frequency_penalty.is_some_and(|p| p != 0.0)),
        ("presence_penalty", params.presence_penalty.is_some_and(|p| p != 0.0)),
        ("repetition_penalty", params.repetition_penalty.is_some_and(|p| p != 1.0)),
    ];
    match by_name.iter().find(|(_, set)| *set) {
        Some((name, _)) => Err(format!("sampling_params.{name} is not supported by this engine")),
        None => Ok(()),
    }
}

fn check_ids(ids: &[i64], vocab: u32) -> Result<Vec<u32>, String> {
    let fit = |(at, &id): (usize, &i64)| match u32::try_from(id) {
        Ok(id) if id < vocab => Ok(id),
        _ => Err(format!(
            "Token id {id} at position {at} of input_ids is out of vocabulary: vocab_size is {vocab}."
        )),
    };
    ids.iter().enumerate().map(fit).collect()
}

fn check_sampling(params: &Params, vocab: u32) -> Result<Sampling, String> {
    let max_new = params.max_new_tokens.unwrap_or(DEFAULT_MAX_NEW_TOKENS);
    let min_new = params.min_new_tokens.unwrap_or(0);
    let temperature = params.temperature.unwrap_or(1.0);
    let top_p = params.top_p.unwrap_or(1.0);
    let top_k = params.top_k.unwrap_or(-1);
    let min_p = params.min_p.unwrap_or(0.0);
    if !(0..=i64::from(u32::MAX)).contains(&max_new) {
        return Err(format!("max_new_tokens must be at least 0, got {max_new}."));
    }
    if !(0..=max_new).contains(&min_new) {
        return Err(format!(
            "min_new_tokens must be in [0, max_new_tokens({max_new})], got {min_new}."
        ));
    }
    if !(temperature >= 0.0 && temperature.is_finite()) {
        return Err(format!("temperature must be non-negative, got {temperature}."));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(format!("top_p must be in (0, 1], got {top_p}."));
    }
    if !(0.0..=1.0).contains(&min_p) {
        return Err(format!("min_p must be in [0, 1], got {min_p}."));
    }
    if top_k < -1 || top_k == 0 {
        return Err(format!("top_k must be -1 (disable), or at least 1, got {top_k}."));
    }
    let stop_token_ids = check_ids(params.stop_token_ids.as_deref().unwrap_or(&[]), vocab)
        .map_err(|why| why.replace("input_ids", "stop_token_ids"))?;
    Ok(Sampling {
        max_new_tokens: max_new as u32,
        min_new_tokens: min_new as u32,
        temperature: temperature as f32,
        top_p: top_p as f32,
        top_k: u32::try_from(top_k).unwrap_or(if top_k < 0 { 0 } else { u32::MAX }),
        min_p: min_p as f32,
        stop_token_ids,
        ignore_eos: params.ignore_eos.unwrap_or(false),
        seed: check_seed(params.sampling_seed.as_ref())?,
    })
}

fn check_seed(seed: Option<&Value>) -> Result<Option<u64>, String> {
    match seed {
        None | Some(Value::Null) => Ok(None),
        Some(seed) => match (seed.as_u64(), seed.as_i64()) {
            (Some(seed), _) => Ok(Some(seed)),
            (None, Some(seed)) => Ok(Some(seed as u64)),
            (None, None) => {
                Err(format!("sampling_seed must be an integer of 64 bits, got {seed}."))
            }
        },
    }
}

fn fresh_rid(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{prefix}-{}", NEXT.fetch_add(1, Relaxed))
}
