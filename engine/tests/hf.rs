//! A real checkpoint behind the same HTTP dialect.
#![cfg(feature = "candle")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anabranch_engine::{EngineConfig, EngineError, ModelSpec, Server, content_digest};
use serde_json::{Value, json};
use support::{Engine, Event, body, ids, logprobs};

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn local<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let test =
        async { tokio::time::timeout(Duration::from_secs(60), test).await.expect("in time") };
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

async fn engine(name: &str, change: impl FnOnce(&mut EngineConfig)) -> Engine {
    let mut config =
        EngineConfig::new(ModelSpec::Hf(testdata(name)), "127.0.0.1:0".parse().unwrap());
    change(&mut config);
    Engine::start(config).await
}

fn greedy(rid: &str, case: &Value, new: usize) -> Value {
    let prompt: Vec<u32> = serde_json::from_value(case["prompt"].clone()).unwrap();
    let mut request = body(rid, &prompt, 1, new as u32);
    request["sampling_params"]["temperature"] = json!(0.0);
    request["sampling_params"]["ignore_eos"] = json!(true);
    request
}

/// The same weights with every value of one tensor moved.
fn write_shifted(from: &str, to: &Path) {
    let bytes = std::fs::read(testdata(from).join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let reversed: Vec<u8> = tensors
        .tensor("model.norm.weight")
        .unwrap()
        .data()
        .chunks(2)
        .rev()
        .flatten()
        .copied()
        .collect();
    let views = tensors.iter().map(|(name, view)| match name {
        "model.norm.weight" => (
            name,
            safetensors::tensor::TensorView::new(view.dtype(), view.shape().to_vec(), &reversed)
                .unwrap(),
        ),
        _ => (name, view),
    });
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &to.join("m.safetensors"))
        .unwrap();
}

#[test]
fn a_greedy_stream_is_hugging_faces_over_http() {
    local(async {
        for name in ["qwen2", "llama", "qwen3"] {
            let engine = engine(name, |_| {}).await;
            let reference = std::fs::read(testdata(name).join("reference.json")).unwrap();
            let reference: Value = serde_json::from_slice(&reference).unwrap();
            for (i, case) in reference["greedy"].as_array().unwrap().iter().enumerate() {
                let (chunks, end) =
                    engine.stream(greedy(&format!("r{i}"), case, 24)).await.rest().await;
                assert_eq!(end, Event::Done);
                assert_eq!(json!(ids(&chunks)), case["ids"], "{name}");
                for (got, want) in
                    logprobs(&chunks).iter().zip(case["logprobs"].as_array().unwrap())
                {
                    assert!((f64::from(got.0) - want.as_f64().unwrap()).abs() < 5e-4);
                }
            }
            let info = engine.get("/server_info").await.1;
            assert_eq!(
                info["weights_content_digest"],
                hex::encode(content_digest(&testdata(name)).unwrap())
            );
            assert_eq!((&info["vocab_size"], &info["context_length"]), (&json!(128), &json!(256)));
            assert_eq!(info["eos_token_ids"], json!([0]));
            assert_eq!(engine.get("/health_generate").await.0, 200);
            engine.stop().await;
        }
    });
}

#[test]
fn a_sampled_stream_resumes_on_another_engine_and_survives_a_retraction() {
    local(async {
        let engine_a = engine("qwen3", |config| config.rate = Some(400.0)).await;
        let engine_b = engine("qwen3", |_| {}).await;
        let request = |rid: &str, prompt: &[u32], new| {
            let mut request = body(rid, prompt, 77, new);
            request["sampling_params"]["ignore_eos"] = json!(true);
            request
        };
        let whole = logprobs(&engine_b.stream(request("w", &[5, 6, 7], 60)).await.rest().await.0);
        let mut stream = engine_a.stream(request("a", &[5, 6, 7], 60)).await;
        let mut chunks = vec![stream.chunk().await, stream.chunk().await];
        engine_a.post("/pause_generation", json!({"mode": "retract"})).await;
        engine_a.post("/continue_generation", json!({})).await;
        chunks.extend(stream.rest().await.0);
        assert_eq!(chunks.last().unwrap()["meta_info"]["num_retractions"], 1);
        assert_eq!(logprobs(&chunks), whole, "a retraction changes nothing");
        let mut kept = vec![5, 6, 7];
        kept.extend(whole[..23].iter().map(|made| made.1));
        let rest = logprobs(&engine_b.stream(request("r", &kept, 37)).await.rest().await.0);
        assert_eq!(rest, whole[23..], "nor does a resume elsewhere");
        engine_a.stop().await;
        engine_b.stop().await;
    });
}

#[test]
fn new_weights_change_tokens_and_bad_ones_change_nothing() {
    local(async {
        let dir = tempfile::tempdir().unwrap();
        write_shifted("qwen2", dir.path());
        let engine = engine("qwen2", |_| {}).await;
        let case = json!({"prompt": [17, 3, 99, 4]});
        let before = ids(&engine.stream(greedy("a", &case, 24)).await.rest().await.0);
        let update = |path: PathBuf| {
            engine.post(
                "/update_weights_from_disk",
                json!({"model_path": path, "weight_version": "2"}),
            )
        };
        let (status, reply) = update(testdata("llama")).await;
        assert_eq!((status, &reply["success"]), (400, &json!(false)));
        assert!(reply["message"].as_str().unwrap().contains("tensors are missing"), "{reply}");
        assert_eq!(ids(&engine.stream(greedy("b", &case, 24)).await.rest().await.0), before);
        assert_eq!(update(dir.path().to_owned()).await.0, 200);
        assert_ne!(ids(&engine.stream(greedy("c", &case, 24)).await.rest().await.0), before);
        assert_eq!(update(testdata("qwen2")).await.0, 200);
        assert_eq!(ids(&engine.stream(greedy("d", &case, 24)).await.rest().await.0), before);
        engine.post("/release_memory_occupation", json!({"tags": ["weights", "kv_cache"]})).await;
        assert_eq!(engine.get("/health").await.0, 503);
        engine.post("/resume_memory_occupation", json!({"tags": ["weights", "kv_cache"]})).await;
        assert_eq!(update(testdata("qwen2")).await.0, 200);
        assert_eq!(ids(&engine.stream(greedy("e", &case, 24)).await.rest().await.0), before);
        engine.stop().await;
    });
}

#[test]
fn a_directory_without_a_model_is_a_clear_error() {
    local(async {
        let dir = tempfile::tempdir().unwrap();
        let config =
            EngineConfig::new(ModelSpec::Hf(dir.path().to_owned()), "127.0.0.1:0".parse().unwrap());
        let Err(error) = Server::bind(config).await else { panic!("there is no model") };
        assert!(
            matches!(&error, EngineError::Model { .. })
                && error.to_string().contains("config.json"),
            "{error}"
        );
    });
}
