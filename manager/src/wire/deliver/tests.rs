use anabranch_proto::tokens::{encode_ids, encode_logprobs};
use std::time::Duration;

use anabranch_proto::{Attempt, BatchSeq, EngineId, Finish, Incarnation, SessionId, Step, Version};
use anabranch_runtime::Now;

use super::*;
use crate::ledger::StopRules;

fn sample(index: u32) -> SampleId {
    SampleId::new(1, index)
}

/// A ledger with `n` finished samples of `len` tokens each.
fn ledger(n: u32, len: u32) -> Ledger {
    let ledger = Ledger::new(2, Duration::from_secs(5));
    let rules = Arc::new(StopRules { max_tokens: len, ..StopRules::default() });
    let maker = Arc::new(Maker {
        session: SessionId(1),
        engine: EngineId::new("e1"),
        incarnation: Incarnation(3),
        by_trainer: false,
        numerics: "synthetic".into(),
    });
    for index in 0..n {
        ledger.open(sample(index), rules.clone());
        ledger.begin(Now::ZERO, sample(index), Attempt(1), maker.clone());
        let ids: Vec<u32> = (0..len).collect();
        let tick = pb::Tick {
            seq: 1,
            segs: vec![pb::Seg { group: 1, index, attempt: 1, count: len, ..pb::Seg::default() }],
            tokens: encode_ids(&ids),
            logprobs: encode_logprobs(&vec![-0.5; len as usize]),
            versions: vec![Version::base(0).into()],
            ..pb::Tick::default()
        };
        ledger.apply(Now::ZERO, SessionId(1), &tick).expect("well formed");
    }
    ledger
}

fn batch(n: u32, len: u32) -> Batch {
    let one = |index| BatchSample {
        sample: sample(index),
        key: "k".into(),
        meta: bytes::Bytes::from_static(b"m"),
        seed: 5,
        attempts: 1,
        finish: Finish::Length,
        offered_at: Version::base(0),
        discarded_tokens: 0,
        tokens: len,
    };
    let samples = (0..n).map(one).collect();
    Batch { seq: BatchSeq(4), step: Step(2), last_of_step: true, samples }
}

#[test]
fn a_batch_is_cut_into_parts_of_about_a_mebibyte_in_order() {
    // 64 KiB a sample: 16 fill a part.
    let (n, len) = (40, 8 * 1024);
    let (ledger, batch) = (ledger(n, len), batch(n, len));
    let all: Vec<usize> = (0..n as usize).collect();
    let parts: Vec<pb::Part> =
        Parts::new(&ledger, &batch, &all).collect::<Result<_, _>>().expect("all there");
    let sizes: Vec<usize> = parts.iter().map(|part| part.trajectories.len()).collect();
    assert_eq!(sizes, [16, 16, 8]);
    assert_eq!(parts.iter().map(|part| part.last_part).collect::<Vec<_>>(), [false, false, true]);
    assert!(parts.iter().all(|part| part.last_of_step && part.seq == 4 && part.batch_samples == n));
    let indices = parts.iter().flat_map(|part| part.trajectories.iter().map(|t| t.index));
    assert!(indices.eq(0..n));
    let first = &parts[0].trajectories[0];
    assert_eq!((first.spans.len(), first.spans[0].len), (1, len));
    assert_eq!(first.spans[0].attested_by(), pb::AttestedBy::Engine);
    assert_eq!(first.numerics, ["synthetic"]);
}

#[test]
fn a_shard_without_samples_still_gets_its_batch() {
    let (ledger, batch) = (ledger(1, 8), batch(1, 8));
    let parts: Vec<_> = Parts::new(&ledger, &batch, &[]).map(|part| part.expect("made")).collect();
    assert_eq!(parts.len(), 1);
    assert!(parts[0].last_part && parts[0].trajectories.is_empty());
}

#[test]
fn a_forgotten_sample_ends_the_batch_with_its_name() {
    let (ledger, batch) = (ledger(2, 8), batch(2, 8));
    ledger.forget(&[sample(1)]);
    let parts: Vec<_> = Parts::new(&ledger, &batch, &[0, 1]).collect();
    assert_eq!(parts.len(), 1);
    let error = parts[0].as_ref().expect_err("gone").to_string();
    assert!(error.contains("g1/1"), "{error}");
}
