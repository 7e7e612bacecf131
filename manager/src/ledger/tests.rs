use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, EngineId, Incarnation, Root, SampleId, SessionId, Version, tokens};
use anabranch_runtime::clock::Now;

use super::*;

const EOS: u32 = 2;
const SESSION: SessionId = SessionId(1);
const NOW: Now = Now::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(5);

fn sample() -> SampleId {
    SampleId::new(7, 0)
}

fn maker(name: &str) -> Arc<Maker> {
    Arc::new(Maker {
        session: SESSION,
        engine: EngineId::new(name),
        incarnation: Incarnation(1),
        by_trainer: false,
        numerics: "test".into(),
    })
}

fn opened(max_tokens: u32) -> Ledger {
    let ledger = Ledger::new(3, PATIENCE);
    let rules = StopRules { max_tokens, stop_ids: vec![EOS], vocab: 100, ..StopRules::default() };
    ledger.open(sample(), Arc::new(rules));
    assert_eq!(ledger.begin(NOW, sample(), Attempt(1), maker("a")), Begun::Kept(Bytes::new()));
    ledger
}

fn take(ledger: &Ledger, tick: &pb::Tick) -> Vec<Fact> {
    ledger.apply(NOW, SESSION, tick).expect("well formed").facts
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
    let grew = take(&ledger, &tick(1, 0, &[5, 6, 7]));
    assert!(matches!(grew[..], [Fact::Grew { kept: 3, oldest: 3, .. }]));
    assert_eq!(take(&ledger, &tick(1, 0, &[5, 6, 7])), []);
    take(&ledger, &tick(1, 2, &[7, 8]));
    assert_eq!(kept(&ledger), [5, 6, 7, 8]);
    assert_eq!(ledger.stats().repeated_tokens, 4);
}

#[test]
fn a_gap_ends_the_attempt_and_keeps_what_was_there() {
    let ledger = opened(50);
    take(&ledger, &tick(1, 0, &[5]));
    let facts = take(&ledger, &tick(1, 2, &[9]));
    assert!(matches!(&facts[..], [Fact::Ended { kept: 1, why: Ended::Broken(_), .. }]));
    assert_eq!(take(&ledger, &tick(1, 1, &[6])), [], "the attempt is over");
    assert_eq!(kept(&ledger), [5]);
}

#[test]
fn a_new_attempt_continues_with_the_kept_tokens_and_fences_the_old_one() {
    let ledger = opened(50);
    take(&ledger, &tick(1, 0, &[5, 6]));
    let begun = ledger.begin(NOW, sample(), Attempt(2), maker("b"));
    assert_eq!(begun, Begun::Kept(tokens::encode_ids(&[5, 6])));
    assert_eq!(take(&ledger, &tick(1, 2, &[77])), []);
    take(&ledger, &tick(2, 2, &[8, 9]));
    let view = ledger.view(sample()).expect("it is open");
    let spans: Vec<_> =
        view.spans.iter().map(|s| (s.start, s.len, s.maker.engine.as_str())).collect();
    assert_eq!(spans, [(0, 2, "a"), (2, 2, "b")]);
    assert_eq!(ledger.stats().stale_tokens, 1);
}

#[test]
fn a_finish_lost_after_eos_does_not_run_on() {
    let ledger = opened(50);
    let facts = take(&ledger, &tick(1, 0, &[5, EOS, 9, 9]));
    assert!(matches!(facts[..], [Fact::Finished { kept: 2, running: true, .. }]));
    assert_eq!(kept(&ledger), [5, EOS]);
    assert_eq!(ledger.begin(NOW, sample(), Attempt(2), maker("b")), Begun::AlreadyFinished);
    let late = pb::Tick { ends: vec![end(1, 2, Why::Lost)], seq: 2, ..Default::default() };
    assert_eq!(take(&ledger, &late), []);
    assert_eq!(ledger.stats().past_stop_tokens, 2);
}

#[test]
fn the_budget_ends_a_sample_and_the_engines_own_word_is_heard() {
    let ledger = opened(3);
    let mut last = tick(1, 0, &[5, 6, 7]);
    last.ends.push(end(1, 3, Why::Length));
    let facts = take(&ledger, &last);
    let length = Finished::Length;
    assert!(
        matches!(&facts[..], [Fact::Finished { kept: 3, running: false, how, .. }] if *how == length)
    );
}

#[test]
fn min_tokens_lets_an_early_eos_pass() {
    let ledger = Ledger::new(1, PATIENCE);
    let rules =
        StopRules { max_tokens: 9, min_tokens: 3, stop_ids: vec![EOS], ..StopRules::default() };
    ledger.open(sample(), Arc::new(rules));
    ledger.begin(NOW, sample(), Attempt(1), maker("a"));
    let facts = take(&ledger, &tick(1, 0, &[EOS, 5, EOS, 8]));
    assert!(matches!(facts[..], [Fact::Finished { kept: 3, .. }]));
}

#[test]
fn a_finish_that_names_another_number_of_tokens_is_no_finish() {
    let ledger = opened(50);
    let mut wrong = tick(1, 0, &[5, 6]);
    wrong.ends.push(end(1, 3, Why::StopId));
    let facts = take(&ledger, &wrong);
    assert!(matches!(&facts[..], [Fact::Ended { kept: 2, why: Ended::Broken(_), .. }]));
}

#[test]
fn foreign_tokens_and_numbers_that_are_none_are_refused() {
    let ledger = opened(50);
    let facts = take(&ledger, &tick(1, 0, &[5, 100]));
    assert!(matches!(&facts[..], [Fact::Ended { kept: 0, why: Ended::Broken(_), .. }]));
    let ledger = opened(50);
    let mut nan = tick(1, 0, &[5]);
    nan.logprobs = tokens::encode_logprobs(&[f32::NAN]);
    assert!(matches!(&take(&ledger, &nan)[..], [Fact::Ended { .. }]));
}

#[test]
fn a_version_change_begins_a_new_span_and_a_pin_refuses_it() {
    let ledger = opened(50);
    take(&ledger, &tick(1, 0, &[5]));
    let mut next = tick(1, 1, &[6]);
    next.versions = vec![version(4).into()];
    take(&ledger, &next);
    let view = ledger.view(sample()).expect("it is open");
    assert_eq!(view.spans.iter().map(|s| s.version.number).collect::<Vec<_>>(), [3, 4]);

    let ledger = Ledger::new(1, PATIENCE);
    let pin = Some(version(3));
    ledger.open(sample(), Arc::new(StopRules { max_tokens: 9, pin, ..StopRules::default() }));
    ledger.begin(NOW, sample(), Attempt(1), maker("a"));
    let facts = take(&ledger, &next_at(0));
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
    assert!(matches!(ledger.apply(NOW, SESSION, &short), Err(BadTick::Columns { .. })));
    let mut version = tick(1, 0, &[5, 6]);
    version.versions.clear();
    assert!(matches!(ledger.apply(NOW, SESSION, &version), Err(BadTick::VersionIndex { .. })));
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
    take(&ledger, &with(0, &[5, 6], &[50, 60]));
    take(&ledger, &tick(1, 2, &[7]));
    take(&ledger, &with(3, &[8], &[80]));
    let view = ledger.view(sample()).expect("it is open");
    assert_eq!(view.columns[0].data, [50, 60, 0, 80], "the lost row is zero");
    assert!(!view.columns[0].complete);
}

#[test]
fn a_restart_forgets_the_tokens_and_says_how_many() {
    let ledger = opened(50);
    take(&ledger, &tick(1, 0, &[5, 6]));
    assert_eq!(ledger.clear(sample()), Some(2));
    assert_eq!(ledger.begin(NOW, sample(), Attempt(2), maker("b")), Begun::Kept(Bytes::new()));
    assert_eq!(ledger.stats().cleared_tokens, 2);
    ledger.forget(&[sample()]);
    assert_eq!(ledger.begin(NOW, sample(), Attempt(3), maker("b")), Begun::Unknown);
    assert_eq!(ledger.stats().pages, 0);
}

#[test]
fn growth_is_told_at_the_first_token_when_doubled_and_when_an_older_version_comes() {
    let ledger = opened(1_000);
    let mut told = Vec::new();
    for at in 0..100 {
        for fact in take(&ledger, &tick(1, at, &[5])) {
            let Fact::Grew { kept, .. } = fact else { panic!("{fact:?}") };
            told.push(kept);
        }
    }
    assert_eq!(told, [1, 2, 4, 8, 16, 32, 64]);
    let older = pb::Tick { versions: vec![version(2).into()], ..tick(1, 100, &[5]) };
    assert!(matches!(take(&ledger, &older)[..], [Fact::Grew { kept: 101, oldest: 2, .. }]));
    ledger.begin(NOW, sample(), Attempt(2), maker("b"));
    assert!(matches!(take(&ledger, &tick(2, 101, &[5]))[..], [Fact::Grew { kept: 102, .. }]));
}

#[test]
fn a_session_that_does_not_run_a_sample_adds_nothing_to_it_and_ends_nothing() {
    let ledger = opened(50);
    let other = SessionId(2);
    let mut foreign = tick(1, 0, &[5, 6]);
    foreign.ends.push(end(1, 0, Why::Lost));
    assert_eq!(ledger.apply(NOW, other, &foreign).expect("well formed"), Taken::default());
    assert_eq!((kept(&ledger).len(), ledger.stats().foreign_tokens), (0, 2));
    assert_eq!(take(&ledger, &tick(1, 0, &[5])).len(), 1, "the attempt goes on");
}

#[test]
fn silence_is_found_once_it_is_long_enough_and_told_again_while_it_lasts() {
    let ledger = opened(50);
    let at = |ms: u64| NOW + Duration::from_millis(ms);
    let since = |ms: u64| ledger.sweep(at(ms)).remove(&SESSION).map(|silent| silent[0].since);
    assert_eq!(since(4_999), None);
    assert_eq!(since(5_000), Some(NOW));
    assert_eq!(since(5_001), None, "not at every sweep");
    assert_eq!(since(6_250), Some(NOW));
    ledger.apply(at(6_300), SESSION, &tick(1, 0, &[5])).expect("well formed");
    assert_eq!(since(11_299), None);
    ledger.resumed(at(11_299));
    assert_eq!(since(12_000), None, "the manager itself was stopped");
    assert_eq!(since(16_300), Some(at(11_299)));
    take(&ledger, &tick(1, 1, &[EOS]));
    assert_eq!(since(60_000), None);
    assert_eq!(since(70_000), None);
}

#[test]
fn a_frozen_sample_ends_with_what_it_has_unless_it_had_finished() {
    let ledger = opened(50);
    take(&ledger, &tick(1, 0, &[5, 6]));
    assert_eq!(ledger.freeze(sample()), Some((2, 3)));
    assert_eq!(take(&ledger, &tick(1, 2, &[7])), []);
    assert_eq!(ledger.begin(NOW, sample(), Attempt(2), maker("b")), Begun::AlreadyFinished);
    let ledger = opened(50);
    take(&ledger, &tick(1, 0, &[5, EOS]));
    assert_eq!(ledger.freeze(sample()), None, "it is finished, not cancelled");
}

#[test]
fn an_attempt_that_was_taken_off_adds_nothing_and_is_not_silent() {
    let ledger = opened(50);
    take(&ledger, &tick(1, 0, &[5]));
    ledger.end(sample(), Attempt(1));
    assert_eq!(take(&ledger, &tick(1, 1, &[6])), []);
    assert_eq!((kept(&ledger).len(), ledger.stats().stale_tokens), (1, 1));
    assert!(ledger.sweep(NOW + Duration::from_secs(60)).is_empty());
    ledger.begin(NOW, sample(), Attempt(2), maker("b"));
    ledger.end(sample(), Attempt(1));
    assert_eq!(take(&ledger, &tick(2, 1, &[6])).len(), 1, "a late end of an older attempt");
}

#[test]
fn a_finished_sample_is_not_cleared() {
    let ledger = opened(50);
    take(&ledger, &tick(1, 0, &[5, EOS]));
    assert_eq!(ledger.clear(sample()), None);
    assert_eq!(kept(&ledger), [5, EOS]);
}
