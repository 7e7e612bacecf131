//! The calls that describe the engine. They read shared counters only, so they answer while the engine loads or stalls.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use super::{App, json, text};

pub(crate) const VERSION: &str = concat!("anabranch-engine ", env!("CARGO_PKG_VERSION"));

pub(super) async fn ready(State(app): State<Arc<App>>) -> Response {
    let paused = app.shared.paused.load(Relaxed);
    text(if paused { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }, Body::empty())
}

pub(super) async fn model_info(State(app): State<Arc<App>>) -> Response {
    let labels = app.shared.labels();
    json(&json!({
        "model_path": labels.model_path,
        "served_model_name": app.model.name,
        "tokenizer_path": labels.model_path,
        "is_generation": true,
        "preferred_sampling_params": null,
        "weight_version": &*labels.weight_version,
        "load_format": "auto",
        "model_type": app.model.kind,
        "architectures": [app.model.architecture],
        "vocab_size": app.model.vocab,
        "context_length": app.config.context_capacity,
    }))
}

pub(super) async fn server_info(State(app): State<Arc<App>>) -> Response {
    let labels = app.shared.labels();
    json(&json!({
        "version": VERSION,
        "status": "ready",
        "model_path": labels.model_path,
        "served_model_name": app.model.name,
        "model_type": app.model.kind,
        "weight_version": &*labels.weight_version,
        "weights_content_digest": hex::encode(labels.digest),
        "vocab_size": app.model.vocab,
        "eos_token_ids": app.model.eos_ids,
        "context_length": app.config.context_capacity,
        "max_total_num_tokens": app.config.kv_tokens,
        "max_running_requests": app.config.max_running,
        "incremental_streaming_output": app.config.incremental,
        "stream_interval": app.config.chunk,
        "return_original_logprob": app.config.return_original_logprob,
        "rate_tokens_per_s": app.config.rate,
        "faults": app.config.faults,
        "tp_size": 1,
        "dp_size": 1,
        "pp_size": 1,
        "device": "cpu",
        "enable_memory_saver": true,
        "internal_states": [load(&app)],
    }))
}

pub(super) async fn models(State(app): State<Arc<App>>) -> Response {
    let root = app.shared.labels().model_path;
    json(&json!({"object": "list", "data": [{
        "id": app.model.name, "object": "model", "owned_by": "anabranch", "root": root,
        "max_model_len": app.config.context_capacity,
    }]}))
}

pub(super) async fn loads(State(app): State<Arc<App>>) -> Response {
    json(&json!({
        "timestamp": seconds_now(),
        "version": VERSION,
        "accelerator": "cpu",
        "num_accelerators": 1,
        "loads": [load(&app)],
    }))
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    use std::fmt::Write;
    let counters = app.shared.counters();
    let usage = counters.used_tokens as f64 / app.config.kv_tokens as f64;
    let mut out = String::new();
    let rows: [(&str, &str, f64); 9] = [
        ("num_running_reqs", "gauge", counters.running as f64),
        ("num_queue_reqs", "gauge", counters.waiting as f64),
        ("num_used_tokens", "gauge", counters.used_tokens as f64),
        ("max_total_num_tokens", "gauge", app.config.kv_tokens as f64),
        ("token_usage", "gauge", usage),
        ("generation_tokens_total", "counter", counters.generated_total as f64),
        ("prompt_tokens_total", "counter", counters.prefilled_total as f64),
        ("num_aborted_requests_total", "counter", counters.aborted_total as f64),
        ("num_retracted_reqs_total", "counter", counters.retracted_total as f64),
    ];
    for (name, kind, value) in rows {
        let _ = writeln!(out, "# TYPE sglang:{name} {kind}\nsglang:{name} {value}");
    }
    text(StatusCode::OK, out)
}

fn load(app: &App) -> Value {
    let counters = app.shared.counters();
    let capacity = app.config.kv_tokens as f64;
    let running = counters.running as f64 / f64::from(app.config.max_running);
    let elapsed = app.started.elapsed().as_secs_f64().max(1e-3);
    json!({
        "timestamp": seconds_now(),
        "dp_rank": 0,
        "num_running_reqs": counters.running,
        "num_waiting_reqs": counters.waiting,
        "num_waiting_uncached_tokens": counters.total_tokens - counters.used_tokens,
        "num_used_tokens": counters.used_tokens,
        "num_total_tokens": counters.total_tokens,
        "num_active_tokens": counters.used_tokens,
        "max_total_num_tokens": app.config.kv_tokens,
        "max_running_requests": app.config.max_running,
        "token_usage": counters.used_tokens as f64 / capacity,
        // Over the life of the process: a rate of the moment is the difference of two totals.
        "gen_throughput": counters.generated_total as f64 / elapsed,
        "cache_hit_rate": 0.0,
        "utilization": running,
        "total_prefill_uncached_tokens": counters.prefilled_total,
        "generated_tokens_total": counters.generated_total,
        "aborted_requests_total": counters.aborted_total,
        "retracted_requests_total": counters.retracted_total,
        "engine_steps_total": app.shared.steps.load(Relaxed),
        "is_paused": app.shared.paused.load(Relaxed),
    })
}

fn seconds_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
