//! The engine over real HTTP: streams, control, updates, faults; every token compared with the oracle.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::path::Path;
use std::time::Duration;

use anabranch_engine::synthetic::base_digest;
use anabranch_engine::{EngineConfig, EngineError, Server, content_digest};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use support::{Engine, Event, PARAMS, body, ids, logprobs, oracle};

/// Runs a test on one thread with local tasks, so that engine and client live in the test.
macro_rules! engine_tests {
    ($($name:ident => $body:block)*) => { $(
        #[test]
        fn $name() {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let test = async { tokio::time::timeout(Duration::from_secs(60), async $body).await.expect("in time") };
            tokio::task::LocalSet::new().block_on(&runtime, test);
        }
    )* };
}

fn write_weights(dir: &Path, value: f32) {
    let data: Vec<u8> = [value; 4].iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![2, 2], &data).unwrap();
    safetensors::serialize_to_file([("w", view)], None, &dir.join("model.safetensors")).unwrap();
}

fn spans(chunk: &Value) -> Vec<(String, u64, u64)> {
    let of = |span: &Value| {
        (
            span["version"].as_str().unwrap().to_owned(),
            span["start"].as_u64().unwrap(),
            span["end"].as_u64().unwrap(),
        )
    };
    chunk["meta_info"]["weight_versions"].as_array().unwrap().iter().map(of).collect()
}

engine_tests! {
    a_stream_is_the_oracles_in_chunks_of_one_then_eight => {
        let engine = Engine::synthetic(|config| config.rate = Some(200.0)).await;
        let mut stream = engine.stream(body("a", &[5, 6, 7], 3, 20)).await;
        let (chunks, end) = stream.rest().await;
        assert_eq!(end, Event::Done);
        assert_eq!(stream.next().await, Event::End);
        assert_eq!(ids(&chunks[..1]).len(), 1);
        let truth = oracle(PARAMS, 3, &[5, 6, 7], &[base_digest(); 20]);
        assert_eq!(logprobs(&chunks), truth);
        assert_eq!(ids(&chunks), truth.iter().map(|t| t.1).collect::<Vec<_>>());
        let last = &chunks.last().unwrap()["meta_info"];
        assert_eq!(last["finish_reason"], json!({"type": "length", "length": 20}));
        assert_eq!((&last["completion_tokens"], &last["prompt_tokens"]), (&json!(20), &json!(3)));
        assert_eq!(last["output_token_logprobs_length"], 20);
        assert_eq!(spans(chunks.last().unwrap()), [("default".to_owned(), 0, 20)]);
        assert!(chunks[0]["meta_info"].get("weight_versions").is_none());
        assert_eq!((&chunks[0]["meta_info"]["id"], &chunks[0]["index"]), (&json!("a"), &json!(0)));
        assert_eq!(engine.load().await["generated_tokens_total"], 20);
        engine.stop().await;
    }

    a_stream_resumed_elsewhere_from_prompt_and_kept_tokens_goes_on_the_same => {
        let engine = Engine::synthetic(|_| {}).await;
        let other = Engine::synthetic(|_| {}).await;
        let whole = ids(&engine.stream(body("a", &[5, 6], 3, 30)).await.rest().await.0);
        let kept: Vec<u32> = [&[5, 6], &whole[..11]].concat();
        let rest = ids(&other.stream(body("b", &kept, 3, 19)).await.rest().await.0);
        assert_eq!(rest, whole[11..]);
        engine.stop().await;
        other.stop().await;
    }

    cumulative_mode_repeats_everything_in_each_chunk => {
        let engine = Engine::synthetic(|config| (config.incremental, config.rate) = (false, Some(400.0))).await;
        let (chunks, _) = engine.stream(body("a", &[5], 3, 30)).await.rest().await;
        assert!(chunks.len() >= 3, "{}", chunks.len());
        let truth = oracle(PARAMS, 3, &[5], &[base_digest(); 30]);
        for chunk in &chunks {
            let total = chunk["meta_info"]["completion_tokens"].as_u64().unwrap() as usize;
            assert_eq!(logprobs(std::slice::from_ref(chunk)), truth[..total]);
            assert_eq!(ids(std::slice::from_ref(chunk)).len(), total);
        }
        assert_eq!(engine.get("/server_info").await.1["incremental_streaming_output"], false);
        engine.stop().await;
    }

    a_request_without_stream_gets_one_object => {
        let engine = Engine::synthetic(|_| {}).await;
        let mut request = body("a", &[5], 3, 10);
        request["stream"] = json!(false);
        request["return_extra"] = json!(true);
        let (status, answer) = engine.post("/generate", request).await;
        assert_eq!((status, ids(std::slice::from_ref(&answer)).len()), (200, 10));
        assert_eq!(answer["meta_info"]["output_extra"].as_array().unwrap().len(), 10);
        assert_eq!(answer["meta_info"]["finish_reason"]["type"], "length");
        engine.stop().await;
    }

    eos_and_stop_tokens_end_a_sample_and_are_part_of_it => {
        let params = anabranch_engine::synthetic::SyntheticParams { mean_len: Some(10), ..PARAMS };
        let engine = Engine::start(EngineConfig::synthetic(params)).await;
        let truth = |seed| oracle(params, seed, &[5], &[base_digest(); 4]);
        let seed = (0..).find(|&seed| truth(seed).iter().all(|made| made.1 != 2)).unwrap();
        let (chunks, _) = engine.stream(body("a", &[5], seed, 5000)).await.rest().await;
        let tokens = ids(&chunks);
        assert_eq!(chunks.last().unwrap()["meta_info"]["finish_reason"], json!({"type": "stop", "matched": 2}));
        assert_eq!(tokens.iter().position(|&t| t == 2), Some(tokens.len() - 1));
        let mut request = body("b", &[5], seed, 5000);
        request["sampling_params"]["ignore_eos"] = json!(true);
        request["sampling_params"]["stop_token_ids"] = json!([tokens[1]]);
        let (chunks, _) = engine.stream(request.clone()).await.rest().await;
        assert_eq!(ids(&chunks), tokens[..2]);
        request["rid"] = json!("c");
        request["sampling_params"]["stop_token_ids"] = json!([]);
        let (chunks, _) = engine.stream(request).await.rest().await;
        assert_eq!(ids(&chunks).len(), 5000);
        assert!(!ids(&chunks).contains(&2));
        engine.stop().await;
    }

    an_abort_ends_the_stream_with_its_reason_and_nothing_else => {
        let engine = Engine::synthetic(|config| config.rate = Some(100.0)).await;
        let mut stream = engine.stream(body("a", &[5], 3, 5000)).await;
        stream.chunk().await;
        assert_eq!(engine.post("/abort_request", json!({"rid": "a1"})).await.0, 200);
        assert_eq!(engine.post("/abort_request", json!({"rid": "a"})).await, (200, json!("")));
        let (chunks, end) = stream.rest().await;
        let reason = &chunks.last().unwrap()["meta_info"]["finish_reason"];
        assert_eq!(*reason, json!({"type": "abort", "message": "Aborted", "status_code": null, "err_type": null}));
        assert_eq!(end, Event::Done);
        engine.wait_for("the sequence is gone", |load| load["num_running_reqs"] == 0).await;
        engine.stop().await;
    }

    a_client_that_leaves_frees_its_sequence => {
        let engine = Engine::synthetic(|config| config.rate = Some(20.0)).await;
        let mut stream = engine.stream(body("a", &[5], 3, 5000)).await;
        stream.chunk().await;
        drop(stream);
        engine.wait_for("the sequence is gone", |load| load["num_running_reqs"] == 0).await;
        engine.post("/pause_generation", json!({"mode": "retract"})).await;
        let waiting = engine.stream(body("b", &[5], 3, 5000)).await;
        engine.wait_for("one waits", |load| load["num_waiting_reqs"] == 1).await;
        drop(waiting);
        engine.wait_for("none waits", |load| load["num_waiting_reqs"] == 0).await;
        engine.stop().await;
    }

    a_retract_pause_and_an_update_give_spans_that_the_oracle_confirms => {
        let dir = tempfile::tempdir().unwrap();
        write_weights(dir.path(), 1.5);
        let digest = content_digest(dir.path()).unwrap();
        let engine = Engine::synthetic(|config| config.rate = Some(100.0)).await;
        let mut stream = engine.stream(body("a", &[5, 6], 3, 60)).await;
        let mut chunks = vec![stream.chunk().await, stream.chunk().await];
        let paused = engine.post("/pause_generation", json!({"mode": "retract"})).await;
        assert_eq!(paused, (200, json!({"message": "Generation paused successfully.", "status": "ok"})));
        assert_eq!(engine.get("/ready").await.0, 503);
        let update = json!({"model_path": dir.path(), "weight_version": "7", "flush_cache": true});
        let (status, reply) = engine.post("/update_weights_from_disk", update).await;
        assert_eq!((status, &reply["success"], &reply["num_paused_requests"]), (200, &json!(true), &json!(0)));
        assert_eq!(engine.get("/flush_cache").await.0, 200);
        assert_eq!(engine.get("/model_info").await.1["weight_version"], "7");
        assert_eq!(engine.get("/server_info").await.1["weights_content_digest"], hex::encode(digest));
        let resumed = engine.post("/continue_generation", json!({})).await;
        assert_eq!(resumed.1["message"], "Generation continued successfully.");
        assert_eq!(engine.get("/ready").await.0, 200);
        let (rest, end) = stream.rest().await;
        chunks.extend(rest);
        assert_eq!(end, Event::Done);
        let last = chunks.last().unwrap();
        let spans = spans(last);
        let cut = spans[0].2 as usize;
        assert_eq!(spans, [("default".to_owned(), 0, cut as u64), ("7".to_owned(), cut as u64, 60)]);
        assert!((9..50).contains(&cut), "{cut}");
        assert_eq!((&last["meta_info"]["num_retractions"], &last["meta_info"]["weight_version"]), (&json!(1), &json!("7")));
        let digests: Vec<_> = (0..60).map(|i| if i < cut { base_digest() } else { digest }).collect();
        assert_eq!(logprobs(&chunks), oracle(PARAMS, 3, &[5, 6], &digests));
        engine.stop().await;
    }

    an_update_without_a_pause_waits_for_the_requests_in_flight => {
        let dir = tempfile::tempdir().unwrap();
        write_weights(dir.path(), 2.5);
        let engine = Engine::synthetic(|config| config.rate = Some(100.0)).await;
        let mut old = engine.stream(body("old", &[5], 3, 40)).await;
        old.chunk().await;
        let update = engine.post("/update_weights_from_disk", json!({"model_path": dir.path(), "weight_version": "w"}));
        let ((status, reply), (chunks, end)) = tokio::join!(update, old.rest());
        assert_eq!((status, &reply["success"], end), (200, &json!(true), Event::Done));
        assert_eq!(spans(chunks.last().unwrap()), [("default".to_owned(), 0, 40)]);
        let (chunks, _) = engine.stream(body("new", &[5], 3, 4)).await.rest().await;
        assert_eq!(spans(chunks.last().unwrap()), [("w".to_owned(), 0, 4)]);
        engine.stop().await;
    }

    bad_checkpoints_are_refused_and_the_old_weights_keep_serving => {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::synthetic(|_| {}).await;
        let update = |path: &Path| engine.post("/update_weights_from_disk", json!({"model_path": path, "weight_version": "x"}));
        for case in ["missing", "empty", "truncated", "garbage"] {
            let path = dir.path().join(case);
            if case != "missing" {
                std::fs::create_dir(&path).unwrap();
            }
            if case == "truncated" {
                write_weights(&path, 1.0);
                let file = std::fs::OpenOptions::new().write(true).open(path.join("model.safetensors")).unwrap();
                file.set_len(file.metadata().unwrap().len() - 3).unwrap();
            } else if case == "garbage" {
                std::fs::write(path.join("model.safetensors"), b"no").unwrap();
            }
            let (status, reply) = update(&path).await;
            assert_eq!((status, &reply["success"]), (400, &json!(false)), "{case}: {reply}");
            assert!(reply["message"].as_str().unwrap().contains(case), "{reply}");
        }
        assert_eq!(engine.get("/model_info").await.1["weight_version"], "default");
        let (chunks, _) = engine.stream(body("a", &[5], 3, 4)).await.rest().await;
        assert_eq!(logprobs(&chunks), oracle(PARAMS, 3, &[5], &[base_digest(); 4]));
        engine.stop().await;
    }

    requests_hang_through_a_pause_and_an_abort_in_the_queue_has_sglangs_odd_shape => {
        let engine = Engine::synthetic(|config| config.rate = Some(100.0)).await;
        let mut stream = engine.stream(body("a", &[5], 3, 500)).await;
        let first = stream.chunk().await;
        let second = stream.chunk().await;
        let sent = ids(&[first, second]);
        engine.post("/pause_generation", json!({"mode": "retract"})).await;
        let mut fresh = engine.stream(body("b", &[5], 3, 3)).await;
        engine.wait_for("both wait", |load| load["num_waiting_reqs"] == 2).await;
        engine.post("/abort_request", json!({"rid": "a"})).await;
        let last = stream.chunk().await;
        let meta = &last["meta_info"];
        assert_eq!(meta["finish_reason"], json!({"type": "abort", "message": "Abort in waiting queue"}));
        let total = meta["completion_tokens"].as_u64().unwrap() as usize;
        let all = logprobs(std::slice::from_ref(&last));
        assert!(total >= sent.len() && all.len() == total, "all {total} log-probabilities come again");
        assert_eq!(ids(std::slice::from_ref(&last)), [all[total - 1].1], "the last token comes again");
        assert!(meta.get("prompt_tokens").is_none());
        engine.post("/continue_generation", json!({})).await;
        assert_eq!(ids(&fresh.rest().await.0).len(), 3);
        engine.stop().await;
    }

    an_abort_pause_ends_everything_and_holds_what_comes_after => {
        let engine = Engine::synthetic(|config| config.rate = Some(100.0)).await;
        let mut stream = engine.stream(body("a", &[5], 3, 500)).await;
        stream.chunk().await;
        engine.post("/pause_generation", json!({})).await;
        let (chunks, end) = stream.rest().await;
        assert_eq!((chunks.last().unwrap()["meta_info"]["finish_reason"]["type"].as_str(), end), (Some("abort"), Event::Done));
        engine.post("/continue_generation", json!({})).await;
        let version = engine.post("/update_weight_version", json!({"new_version": "z9"})).await.1;
        assert_eq!((&version["success"], &version["new_version"]), (&json!(true), &json!("z9")));
        engine.stop().await;
    }

    wrong_values_are_told_in_the_stream_and_wrong_shapes_by_a_400 => {
        let engine = Engine::synthetic(|config| config.context_capacity = 100).await;
        let in_stream = [
            (body("a", &[], 1, 1), "empty"),
            (body("a", &[32_000], 1, 1), "out of vocabulary"),
            (body("a", &[1; 100], 1, 1), "The input (100 tokens) is longer than the model's context length (100 tokens)."),
            (body("a", &[1; 60], 1, 41), "Requested token count exceeds"),
        ];
        for (mut request, want) in in_stream {
            let mut stream = engine.stream(request.clone()).await;
            let error = stream.chunk().await["error"].clone();
            assert!(error["message"].as_str().unwrap().contains(want), "{error}");
            assert_eq!((&error["code"], &error["type"]), (&json!(400), &json!("invalid_request_error")));
            assert_eq!((stream.next().await, stream.next().await), (Event::Done, Event::End));
            request["stream"] = json!(false);
            let (status, answer) = engine.post("/generate", request).await;
            assert!(status == 400 && answer["error"]["message"].as_str().unwrap().contains(want), "{answer}");
        }
        let plain = [
            (json!({"text": "hello", "stream": true}), "input_ids instead of text"),
            (json!({"input_ids": [[1], [2]], "stream": true}), "batch"),
            (json!({"input_ids": [1], "sampling_params": {"n": 2}}), "n must be 1"),
            (json!({"input_ids": [1], "sampling_params": {"stop": ["x"]}}), "stop is not supported"),
            (json!({"stream": true}), "input_ids is required"),
        ];
        for (request, want) in plain {
            let (status, answer) = engine.post("/generate", request).await;
            assert!(status == 400 && answer["error"]["message"].as_str().unwrap().contains(want), "{answer}");
        }
        engine.stop().await;
    }

    two_requests_of_one_rid_cannot_live_together => {
        let engine = Engine::synthetic(|config| config.rate = Some(50.0)).await;
        let mut stream = engine.stream(body("a", &[5], 3, 500)).await;
        stream.chunk().await;
        let error = engine.stream(body("a", &[5], 3, 500)).await.chunk().await;
        assert!(error["error"]["message"].as_str().unwrap().contains("Duplicate request ID"), "{error}");
        engine.stop().await;
    }

    health_generates_and_says_503_while_memory_is_released => {
        let dir = tempfile::tempdir().unwrap();
        write_weights(dir.path(), 1.0);
        let engine = Engine::synthetic(|_| {}).await;
        assert_eq!(engine.get("/health_generate").await.0, 200);
        assert_eq!(engine.post("/release_memory_occupation", json!({})).await, (200, json!(null)));
        assert_eq!(engine.get("/health").await.0, 503);
        let refused = engine.stream(body("a", &[5], 3, 5)).await.chunk().await;
        assert_eq!(refused["error"]["code"], 503);
        engine.post("/resume_memory_occupation", json!({"tags": ["weights", "kv_cache"]})).await;
        assert_eq!(engine.get("/health").await.0, 503, "weights that were not loaded again do not serve");
        assert_eq!(engine.post("/update_weights_from_disk", json!({"model_path": dir.path()})).await.0, 200);
        assert_eq!(engine.get("/health").await.0, 200);
        assert_eq!(engine.get("/v1/models").await.1["data"][0]["id"], "synthetic");
        assert!(engine.get("/metrics").await.1.as_str().unwrap().contains("sglang:num_running_reqs 0"));
        engine.stop().await;
    }

    the_api_key_guards_all_but_health_and_metrics => {
        let engine = Engine::synthetic(|config| config.api_key = Some("k".to_owned())).await;
        assert_eq!(engine.get("/model_info").await.0, 401);
        assert_eq!(engine.get("/health").await.0, 200);
        let keyed = engine.client.get(format!("{}/model_info", engine.url)).bearer_auth("k").send().await.unwrap();
        assert_eq!(keyed.status(), 200);
        engine.stop().await;
    }

    a_taken_port_is_a_clear_error => {
        let engine = Engine::synthetic(|_| {}).await;
        let mut config = EngineConfig::synthetic(PARAMS);
        config.listen = engine.url.strip_prefix("http://").unwrap().parse().unwrap();
        let Err(error) = Server::bind(config).await else { panic!("two servers on one port") };
        assert!(matches!(error, EngineError::Listen { .. }) && error.to_string().contains("cannot listen on 127.0.0.1:"));
        engine.stop().await;
    }

    fault_end_early_closes_streams_cleanly_without_a_finish => {
        let engine = Engine::synthetic(|config| config.rate = Some(50.0)).await;
        let mut one = engine.stream(body("a", &[5], 3, 500)).await;
        let mut two = engine.stream(body("b", &[5], 3, 500)).await;
        one.chunk().await;
        two.chunk().await;
        let fault = engine.post("/fault", json!({"kind": "end_early", "count": 1})).await;
        assert_eq!(fault, (200, json!({"ok": true, "affected": 1})));
        let (chunks, end) = one.rest().await;
        assert_eq!(end, Event::End);
        assert!(chunks.iter().all(|chunk| chunk["meta_info"]["finish_reason"].is_null()));
        two.chunk().await;
        engine.stop().await;
    }

    fault_reset_breaks_the_connection => {
        let engine = Engine::synthetic(|config| config.rate = Some(50.0)).await;
        let mut stream = engine.stream(body("a", &[5], 3, 500)).await;
        stream.chunk().await;
        engine.post("/fault", json!({"kind": "reset"})).await;
        assert_eq!(stream.rest().await.1, Event::Broken);
        assert_eq!(engine.get("/health").await.0, 200);
        engine.stop().await;
    }

    fault_lose_finish_sends_the_last_token_and_no_finish => {
        let engine = Engine::synthetic(|_| {}).await;
        engine.post("/fault", json!({"kind": "lose_finish"})).await;
        let (chunks, end) = engine.stream(body("a", &[5], 3, 20)).await.rest().await;
        assert_eq!((ids(&chunks).len(), end), (20, Event::End));
        assert!(chunks.last().unwrap()["meta_info"]["finish_reason"].is_null());
        let (_, end) = engine.stream(body("b", &[5], 3, 20)).await.rest().await;
        assert_eq!(end, Event::Done);
        engine.stop().await;
    }

    fault_corrupt_makes_one_chunk_malformed => {
        let engine = Engine::synthetic(|config| config.rate = Some(100.0)).await;
        let mut stream = engine.stream(body("a", &[5], 3, 50)).await;
        stream.chunk().await;
        engine.post("/fault", json!({"kind": "corrupt"})).await;
        assert!(matches!(stream.rest().await.1, Event::Malformed(_)));
        assert_eq!(stream.rest().await.1, Event::Done);
        engine.stop().await;
    }

    fault_stall_stops_tokens_for_its_time_and_slow_divides_the_rate => {
        let engine = Engine::synthetic(|config| config.rate = Some(1000.0)).await;
        engine.post("/fault", json!({"kind": "stall", "ms": 300})).await;
        let begun = std::time::Instant::now();
        let (chunks, _) = engine.stream(body("a", &[5], 3, 5)).await.rest().await;
        assert!(begun.elapsed() >= Duration::from_millis(280), "{:?}", begun.elapsed());
        assert_eq!(logprobs(&chunks), oracle(PARAMS, 3, &[5], &[base_digest(); 5]));
        engine.post("/fault", json!({"kind": "stall"})).await;
        let stalled = engine.stream(body("b", &[5], 3, 5)).await;
        assert_eq!(engine.get("/model_info").await.0, 200);
        drop(stalled);
        engine.post("/fault", json!({"kind": "clear"})).await;
        engine.post("/fault", json!({"kind": "slow", "factor": 50.0})).await;
        let begun = std::time::Instant::now();
        engine.stream(body("c", &[5], 3, 6)).await.rest().await;
        assert!(begun.elapsed() >= Duration::from_millis(240), "{:?}", begun.elapsed());
        engine.stop().await;
    }

    faults_are_not_served_unless_asked_for => {
        let engine = Engine::synthetic(|config| config.faults = false).await;
        assert_eq!(engine.post("/fault", json!({"kind": "die"})).await.0, 404);
        engine.stop().await;
    }

    many_samples_at_once_are_all_the_oracles => {
        let engine = Engine::synthetic(|config| config.max_running = 64).await;
        let streams = (0..200u32).map(|i| {
            let engine = &engine;
            async move {
                let (chunks, end) = engine.stream(body(&format!("r{i:04}"), &[i], u64::from(i), 50)).await.rest().await;
                assert_eq!(end, Event::Done);
                assert_eq!(logprobs(&chunks), oracle(PARAMS, u64::from(i), &[i], &[base_digest(); 50]));
            }
        });
        futures_util::future::join_all(streams).await;
        engine.stop().await;
    }
}

/// Run again by itself as the process that dies.
#[test]
fn fault_die_kills_the_process_at_once() {
    const CHILD: &str = "ANABRANCH_ENGINE_TEST_CHILD";
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    if std::env::var_os(CHILD).is_some() {
        runtime.block_on(async {
            let mut config = EngineConfig::synthetic(PARAMS);
            (config.faults, config.rate) = (true, Some(50.0));
            let server = Server::bind(config).await.unwrap();
            println!("\nlistening {}", server.local_addr());
            server.run(tokio_util::sync::CancellationToken::new()).await.unwrap();
        });
        return;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "fault_die_kills_the_process_at_once", "--nocapture"])
        .env(CHILD, "1")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let addr = lines
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("listening ").map(str::to_owned))
        .unwrap();
    let engine = Engine::at(&addr);
    runtime.block_on(async {
        let mut stream = engine.stream(body("a", &[5], 3, 500)).await;
        stream.chunk().await;
        let die = engine
            .client
            .post(format!("http://{addr}/fault"))
            .body(r#"{"kind":"die"}"#)
            .send()
            .await;
        assert!(die.is_err(), "a dead process answers nothing");
        assert_eq!(stream.rest().await.1, Event::Broken);
    });
    assert!(!child.wait().unwrap().success());
}
