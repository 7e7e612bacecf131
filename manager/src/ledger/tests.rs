use std::sync::Arc;

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, EngineId, Incarnation, Root, SampleId, Version, tokens};

use super::*;

const EOS: u32 = 2;

fn sample() -> SampleId {
    SampleId::new(7, 0)
}

fn maker(name: &str) -> Arc<Maker> {
    Arc::new(Maker {
        engine: EngineId::new(name),
        incarnation: Incarnation(1),
        by_trainer: false,
        numerics: "test".into(),
    })
}

fn opened(max_tokens: u32) -> Ledger {
    let ledger = Ledger::new(3);
    let rules = StopRules { max_tokens, stop_ids: vec![EOS], vocab: 100, ..StopRules::default() };
    ledger.open(sample(), Arc::new(rules));
    assert_eq!(ledger.begin(sample(), Attempt(1), maker("a")), Begun::Kept(Bytes::new()));
    ledger
}

fn version(number: u64) -> Version {
    Version { epoch: 0, number, root: Root([number as u8; 32]) }
}

fn seg(attempt: u32, offset: u32, count: usize) -> pb::Seg {
    pb::Seg { group: 7, index: 0, attempt, offset, count: count as u32, ..Default::default() }
}

fn tick(attempt: u32, offset: u32, ids: &[u32]) -> pb::Tick {
    let logprobs: Vec<f32> = ids.iter().map(|id| -(*id as f32)).collect();
    pb::Tick {
        seq: 1,
        segs: vec![seg(attempt, offset, ids.len())],
        tokens: tokens::encode_ids(ids),
        logprobs: tokens::encode_logprobs(&logprobs),
        versions: vec![version(3).into()],
        ..Default::default()
    }
}

fn end(attempt: u32, at: u32, why: Why) -> pb::End {
    let sample = Some(sample().into());
    pb::End { sample, attempt, at, why: why as i32, ..Default::default() }
}

fn kept(ledger: &Ledger) -> Vec<u32> {
    tokens::ids(&ledger.view(sample()).expect("it is open").tokens).collect()
}

#[test]
fn a_tick_that_comes_twice_counts_once() {
    let ledger = opened(50);
    let grew = ledger.apply(&tick(1, 0, &[5, 6, 7])).expect("well formed");
    assert!(matches!(grew[..], [Fact::Grew { kept: 3, oldest: 3, .. }]));
    assert_eq!(ledger.apply(&tick(1, 0, &[5, 6, 7])).expect("well formed"), []);
    ledger.apply(&tick(1, 2, &[7, 8])).expect("well formed");
    assert_eq!(kept(&ledger), [5, 6, 7, 8]);
    assert_eq!(ledger.stats().repeated_tokens, 4);
}

#[test]
fn a_gap_ends_the_attempt_and_keeps_what_was_there() {
    let ledger = opened(50);
    ledger.apply(&tick(1, 0, &[5])).expect("well formed");
    let facts = ledger.apply(&tick(1, 2, &[9])).expect("well formed");
    assert!(matches!(&facts[..], [Fact::Ended { kept: 1, why: Ended::Broken(_), .. }]));
    assert_eq!(ledger.apply(&tick(1, 1, &[6])).expect("well formed"), [], "the attempt is over");
    assert_eq!(kept(&ledger), [5]);
}

#[test]
fn a_new_attempt_continues_with_the_kept_tokens_and_fences_the_old_one() {
    let ledger = opened(50);
    ledger.apply(&tick(1, 0, &[5, 6])).expect("well formed");
    let begun = ledger.begin(sample(), Attempt(2), maker("b"));
    assert_eq!(begun, Begun::Kept(tokens::encode_ids(&[5, 6])));
    assert_eq!(ledger.apply(&tick(1, 2, &[77])).expect("well formed"), []);
    ledger.apply(&tick(2, 2, &[8, 9])).expect("well formed");
    let view = ledger.view(sample()).expect("it is open");
    let spans: Vec<_> =
        view.spans.iter().map(|s| (s.start, s.len, s.maker.engine.as_str())).collect();
    assert_eq!(spans, [(0, 2, "a"), (2, 2, "b")]);
    assert_eq!(ledger.stats().stale_tokens, 1);
}

#[test]
fn a_finish_lost_after_eos_does_not_run_on() {
    let ledger = opened(50);
    let facts = ledger.apply(&tick(1, 0, &[5, EOS, 9, 9])).expect("well formed");
    assert!(matches!(facts[..], [Fact::Finished { kept: 2, running: true, .. }]));
    assert_eq!(kept(&ledger), [5, EOS]);
    assert_eq!(ledger.begin(sample(), Attempt(2), maker("b")), Begun::AlreadyFinished);
    let late = pb::Tick { ends: vec![end(1, 2, Why::Lost)], seq: 2, ..Default::default() };
    assert_eq!(ledger.apply(&late).expect("well formed"), []);
    assert_eq!(ledger.stats().past_stop_tokens, 2);
}

#[test]
fn the_budget_ends_a_sample_and_the_engines_own_word_is_heard() {
    let ledger = opened(3);
    let mut last = tick(1, 0, &[5, 6, 7]);
    last.ends.push(end(1, 3, Why::Length));
    let facts = ledger.apply(&last).expect("well formed");
    let length = Finished::Length;
    assert!(
        matches!(&facts[..], [Fact::Finished { kept: 3, running: false, how, .. }] if *how == length)
    );
}

#[test]
fn min_tokens_lets_an_early_eos_pass() {
    let ledger = Ledger::new(1);
    let rules =
        StopRules { max_tokens: 9, min_tokens: 3, stop_ids: vec![EOS], ..StopRules::default() };
    ledger.open(sample(), Arc::new(rules));
    ledger.begin(sample(), Attempt(1), maker("a"));
    let facts = ledger.apply(&tick(1, 0, &[EOS, 5, EOS, 8])).expect("well formed");
    assert!(matches!(facts[..], [Fact::Finished { kept: 3, .. }]));
}

#[test]
fn a_finish_that_names_another_number_of_tokens_is_no_finish() {
    let ledger = opened(50);
    let mut wrong = tick(1, 0, &[5, 6]);
    wrong.ends.push(end(1, 3, Why::StopId));
    let facts = ledger.apply(&wrong).expect("well formed");
    assert!(matches!(&facts[..], [Fact::Ended { kept: 2, why: Ended::Broken(_), .. }]));
}

#[test]
fn foreign_tokens_and_numbers_that_are_none_are_refused() {
    let ledger = opened(50);
    let facts = ledger.apply(&tick(1, 0, &[5, 100])).expect("well formed");
    assert!(matches!(&facts[..], [Fact::Ended { kept: 0, why: Ended::Broken(_), .. }]));
    let ledger = opened(50);
    let mut nan = tick(1, 0, &[5]);
    nan.logprobs = tokens::encode_logprobs(&[f32::NAN]);
    assert!(matches!(&ledger.apply(&nan).expect("well formed")[..], [Fact::Ended { .. }]));
}

#[test]
fn a_version_change_begins_a_new_span_and_a_pin_refuses_it() {
    let ledger = opened(50);
    ledger.apply(&tick(1, 0, &[5])).expect("well formed");
    let mut next = tick(1, 1, &[6]);
    next.versions = vec![version(4).into()];
    ledger.apply(&next).expect("well formed");
    let view = ledger.view(sample()).expect("it is open");
    assert_eq!(view.spans.iter().map(|s| s.version.number).collect::<Vec<_>>(), [3, 4]);

    let ledger = Ledger::new(1);
    let pin = Some(version(3));
    ledger.open(sample(), Arc::new(StopRules { max_tokens: 9, pin, ..StopRules::default() }));
    ledger.begin(sample(), Attempt(1), maker("a"));
    let facts = ledger.apply(&next_at(0)).expect("well formed");
    assert!(matches!(&facts[..], [Fact::Ended { kept: 0, why: Ended::Lost(_), .. }]));
}

fn next_at(offset: u32) -> pb::Tick {
    pb::Tick { versions: vec![version(4).into()], ..tick(1, offset, &[6]) }
}

#[test]
fn columns_that_do_not_match_take_nothing_in() {
    let ledger = opened(50);
    let mut short = tick(1, 0, &[5, 6]);
    short.logprobs = tokens::encode_logprobs(&[-1.0]);
    assert!(matches!(ledger.apply(&short), Err(BadTick::Columns { .. })));
    let mut version = tick(1, 0, &[5, 6]);
    version.versions.clear();
    assert!(matches!(ledger.apply(&version), Err(BadTick::VersionIndex { .. })));
    assert_eq!(ledger.kept(sample()), Some(0));
}

#[test]
fn rows_of_an_extra_column_stay_with_their_tokens() {
    let ledger = opened(50);
    let with = |offset: u32, ids: &[u32], rows: &[u8]| {
        let column = pb::Column {
            name: "expert".into(),
            dtype: "u8".into(),
            width: 1,
            data: Bytes::copy_from_slice(rows),
            complete: true,
        };
        pb::Tick { columns: vec![column], ..tick(1, offset, ids) }
    };
    ledger.apply(&with(0, &[5, 6], &[50, 60])).expect("well formed");
    ledger.apply(&tick(1, 2, &[7])).expect("well formed");
    ledger.apply(&with(3, &[8], &[80])).expect("well formed");
    let view = ledger.view(sample()).expect("it is open");
    assert_eq!(view.columns[0].data, [50, 60, 0, 80], "the lost row is zero");
    assert!(!view.columns[0].complete);
}

#[test]
fn a_restart_forgets_the_tokens_and_says_how_many() {
    let ledger = opened(50);
    ledger.apply(&tick(1, 0, &[5, 6])).expect("well formed");
    ledger.clear(sample());
    assert_eq!(ledger.begin(sample(), Attempt(2), maker("b")), Begun::Kept(Bytes::new()));
    assert_eq!(ledger.stats().cleared_tokens, 2);
    ledger.forget(&[sample()]);
    assert_eq!(ledger.begin(sample(), Attempt(3), maker("b")), Begun::Unknown);
    assert_eq!(ledger.stats().pages, 0);
}
