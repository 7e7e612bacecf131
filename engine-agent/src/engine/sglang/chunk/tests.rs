use super::*;

/// A chunk as SGLang 0.5.23 sends it, with the fields that we do not read.
fn chunk(ids: &[u32], logprob_ids: &[u32], total: u32, finish: &str, more: &str) -> String {
    let entries: Vec<String> = logprob_ids.iter().map(|id| format!("[-0.5,{id},null]")).collect();
    format!(
        r#"{{"text":"a \"b\"\n","output_ids":{ids:?},"meta_info":{{"id":"a2","finish_reason":{finish},"prompt_tokens":4,"weight_version":"default","num_retractions":0,"input_token_logprobs":[],"output_token_logprobs":[{}],"output_token_logprobs_length":{total},"reasoning_tokens":0,"completion_tokens":{total},"cached_tokens":3,"cached_tokens_details":{{"device":3,"host":0}},"dp_rank":null{more}}},"index":0}}"#,
        entries.join(",")
    )
}

fn decode(decoder: &mut Decoder, json: &str) -> Result<Chunk, StreamError> {
    let mut chunk = Chunk::default();
    decoder.decode(json.as_bytes(), &mut chunk).map(|()| chunk)
}

#[test]
fn deltas_and_repeats_from_the_start_give_the_same_tokens() {
    let incremental = [chunk(&[1], &[1], 1, "null", ""), chunk(&[2, 3], &[2, 3], 3, "null", "")];
    let cumulative =
        [chunk(&[1], &[1], 1, "null", ""), chunk(&[1, 2, 3], &[1, 2, 3], 3, "null", "")];
    for stream in [incremental, cumulative] {
        let mut decoder = Decoder::default();
        let first = decode(&mut decoder, &stream[0]).expect("first");
        let second = decode(&mut decoder, &stream[1]).expect("second");
        assert_eq!((first.tokens, second.tokens), (vec![1], vec![2, 3]));
        assert_eq!(second.logprobs, [-0.5, -0.5]);
        assert_eq!((second.usage.prompt_tokens, second.usage.cached_tokens), (4, 3));
        assert_eq!((second.label.as_str(), second.finish), ("default", None));
    }
}

#[test]
fn an_abort_in_the_queue_repeats_its_last_token_and_adds_nothing() {
    let mut decoder = Decoder::default();
    decode(&mut decoder, &chunk(&[1, 2, 3], &[1, 2, 3], 3, "null", "")).expect("tokens");
    let abort = r#"{"type":"abort","message":"Abort in waiting queue"}"#;
    let last = decode(&mut decoder, &chunk(&[3], &[1, 2, 3], 3, abort, "")).expect("end");
    assert_eq!((last.tokens.len(), last.logprobs.len()), (0, 0));
    assert_eq!(last.finish, Some(Finish::Aborted));
}

#[test]
fn an_abort_in_the_queue_still_brings_what_was_made_but_never_sent() {
    let mut decoder = Decoder::default();
    decode(&mut decoder, &chunk(&[1], &[1], 1, "null", "")).expect("tokens");
    let abort = r#"{"type":"abort","message":"Abort in waiting queue"}"#;
    let last = decode(&mut decoder, &chunk(&[4], &[1, 2, 3, 4], 4, abort, "")).expect("end");
    assert_eq!(last.tokens, [2, 3, 4]);
}

#[test]
fn every_finish_is_told_apart() {
    let finish = |json: &str| decode(&mut Decoder::default(), &chunk(&[1], &[1], 1, json, ""));
    assert_eq!(
        finish(r#"{"type":"stop","matched":286}"#).expect("ok").finish,
        Some(Finish::StopId)
    );
    let text = finish(r#"{"type":"stop","matched":"E\"nd"}"#).expect("ok").finish;
    assert_eq!(text, Some(Finish::StopString("E\"nd".into())));
    assert_eq!(finish(r#"{"type":"length","length":3}"#).expect("ok").finish, Some(Finish::Length));
    let running = r#"{"type":"abort","message":"Aborted","status_code":null,"err_type":null}"#;
    assert_eq!(finish(running).expect("ok").finish, Some(Finish::Aborted));
    let refused =
        finish(r#"{"type":"abort","message":"too long","status_code":400,"err_type":"x"}"#);
    assert_eq!(
        refused.expect_err("error"),
        StreamError::Refused { code: 400, message: "too long".into() }
    );
    let failed = finish(r#"{"type":"abort","message":"oom","status_code":500,"err_type":null}"#);
    assert!(matches!(failed.expect_err("error"), StreamError::Failed { code: 500, .. }));
    assert!(matches!(finish(r#"{"type":"new"}"#), Err(StreamError::Malformed { .. })));
}

#[test]
fn the_engines_own_version_spans_come_with_the_finish() {
    let spans = r#","weight_versions":[{"version":"w0","start":0,"end":135},{"version":"w1","start":135,"end":500}]"#;
    let json = chunk(&[1], &[1], 1, r#"{"type":"length","length":1}"#, spans);
    let last = decode(&mut Decoder::default(), &json).expect("end");
    let wanted = [("w0", 0, 135), ("w1", 135, 500)].map(|(label, start, end)| LabelSpan {
        label: label.into(),
        start,
        end,
    });
    assert_eq!(last.spans, wanted);
}

#[test]
fn an_error_in_the_stream_is_the_requests_or_the_engines_fault_by_its_code() {
    let error = |code: &str| {
        let json =
            format!(r#"{{"error":{{"message":"m","type":"t","code":{code},"retryable":false}}}}"#);
        decode(&mut Decoder::default(), &json).expect_err("an error")
    };
    assert_eq!(error("400"), StreamError::Refused { code: 400, message: "m".into() });
    for code in ["500", "503", "429"] {
        assert!(matches!(error(code), StreamError::Failed { .. }), "{code}");
    }
}

#[test]
fn what_makes_no_sense_is_an_error_and_never_a_token() {
    let cases = [
        ("truncated", chunk(&[1], &[1], 1, "null", "")[..90].to_owned()),
        ("not json", "!!".to_owned()),
        ("no meta_info", r#"{"output_ids":[1]}"#.to_owned()),
        ("too few ids", chunk(&[3], &[3], 3, "null", "")),
        ("no log-probabilities", chunk(&[1], &[], 1, "null", "")),
        ("another token's log-probability", chunk(&[1, 2], &[1, 3], 2, "null", "")),
        ("a token below zero", chunk(&[1], &[1], 1, "null", "").replace("[1]", "[-1]")),
    ];
    for (what, json) in cases {
        let mut decoder = Decoder::default();
        let mut chunk = Chunk::default();
        let result = decoder.decode(json.as_bytes(), &mut chunk);
        assert!(matches!(result, Err(StreamError::Malformed { .. })), "{what}: {result:?}");
        assert!(chunk.tokens.is_empty(), "{what}");
    }
    let mut decoder = Decoder::default();
    decode(&mut decoder, &chunk(&[1, 2], &[1, 2], 2, "null", "")).expect("tokens");
    let fell = decode(&mut decoder, &chunk(&[1], &[1], 1, "null", ""));
    assert!(matches!(fell, Err(StreamError::Malformed { .. })), "a count that falls");
}

#[test]
fn events_are_found_however_the_bytes_are_cut() {
    let text = "data: {\"a\":1}\n\n: comment\nevent: x\ndata:{\"b\":2}\n\ndata: [DONE]\n\n";
    for size in 1..text.len() {
        let mut sse = Sse::default();
        let mut seen = Vec::new();
        for piece in text.as_bytes().chunks(size) {
            let fed: Result<(), SseError<()>> = sse.feed(piece, |payload| {
                seen.push(String::from_utf8_lossy(payload).into_owned());
                Ok(())
            });
            assert!(fed.is_ok());
        }
        assert_eq!(seen, ["{\"a\":1}", "{\"b\":2}", "[DONE]"], "in pieces of {size}");
    }
}

#[test]
#[ignore = "prints a figure: cargo test --release -p anabranch-agent --lib decode_cost -- --ignored --nocapture"]
fn decode_cost() {
    let ids = [151_643, 220, 16, 488, 9707, 11, 1879, 0];
    let line = format!("data: {}\n\n", chunk(&ids, &ids, 8, "null", ""));
    let rounds = 200_000u32;
    let mut out = Chunk::default();
    let began = std::time::Instant::now();
    for _ in 0..rounds {
        let (mut sse, mut decoder) = (Sse::default(), Decoder::default());
        out.clear();
        sse.feed(line.as_bytes(), |payload| decoder.decode(payload, &mut out)).expect("good");
    }
    let per_chunk = began.elapsed() / rounds;
    println!("decode: {per_chunk:?} per chunk of 8 tokens, {} bytes", line.len());
}
