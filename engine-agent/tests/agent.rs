//! The whole agent against the embedded engine and a scripted manager: real HTTP, real gRPC, and every
//! token recomputed by the oracle.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_agent::AgentError;
use anabranch_proto::SampleId;
use anabranch_proto::pb::end::Why;
use anabranch_proto::pb::load_state::Stage;
use anabranch_proto::pb::{self, data_to_agent, from_agent, to_agent};
use anabranch_transfer::directory::{ReadOptions, index_directory};
use common::*;

fn samples(count: u32) -> Vec<SampleId> {
    (0..count).map(|index| SampleId::new(5, index)).collect()
}

async fn start_all(agent: &Attached, samples: &[SampleId], prompt: &[u32], max_tokens: u32) {
    let digest = agent.prompt(prompt).await;
    for sample in samples {
        agent.start(*sample, digest, max_tokens, u64::from(sample.index)).await;
    }
}

fn verify_all(ledger: &Ledger, prompt: &[u32], digests: &BTreeMap<u64, [u8; 32]>) {
    for (sample, row) in &ledger.samples {
        verify(row, prompt, u64::from(sample.index), digests);
    }
}

fn stage(kind: &from_agent::Kind, wanted: &[Stage]) -> Option<pb::LoadState> {
    match kind {
        from_agent::Kind::LoadState(state) if wanted.contains(&state.stage()) => {
            Some(state.clone())
        }
        _ => None,
    }
}

fn load(
    order: u64,
    number: u64,
    directory: &std::path::Path,
    on_running: pb::OnRunning,
) -> to_agent::Kind {
    // A directory that cannot be read is asked for as well.
    let indexed = index_directory(directory, &ReadOptions::default());
    let root = indexed.map_or([number as u8; 32], |indexed| indexed.root.0).to_vec().into();
    to_agent::Kind::Load(pb::Load {
        order,
        version: Some(pb::Version { epoch: 1, number, root }),
        on_running: on_running.into(),
        directory: directory.to_str().expect("utf-8").into(),
        ..Default::default()
    })
}

#[tokio::test]
async fn samples_run_to_their_end_and_every_token_is_the_oracles() {
    logs();
    let engine = TestEngine::start(|_| {}).await;
    let mut manager = TestManager::start().await;
    let agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let hello = &attached.hello;
    assert_eq!(hello.model.as_ref().expect("model").vocab, 1000);
    assert_eq!(
        hello.caps.as_ref().expect("caps").seed_keying(),
        pb::caps::SeedKeying::AbsolutePosition
    );
    let mut ledger = Ledger::default();
    let samples = samples(16);
    start_all(&attached, &samples, &[1, 2, 3], 100).await;
    attached.until(&mut ledger, |ledger| ledger.ended() == 16).await;
    verify_all(&ledger, &[1, 2, 3], &base());
    assert!(samples.iter().all(|sample| ledger.why(*sample) == Why::Length));
    assert_eq!(ledger.tokens(), 1600);
    agent.stop.cancel();
    attached.rest(&mut ledger).await;
    agent.ended().await.expect("drained");
}

#[tokio::test]
async fn a_cumulative_server_gives_the_same_tokens() {
    let engine = TestEngine::start(|config| config.incremental = false).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    start_all(&attached, &samples(4), &[9], 300).await;
    attached.until(&mut ledger, |ledger| ledger.ended() == 4).await;
    verify_all(&ledger, &[9], &base());
    assert_eq!(ledger.tokens(), 1200);
}

#[tokio::test]
async fn a_load_in_mid_flight_puts_the_version_boundary_on_the_right_token() {
    logs();
    let dir = tempfile::tempdir().expect("dir");
    let v1 = checkpoint(&dir.path().join("v1"), 1, 4);
    let v2 = checkpoint(&dir.path().join("v2"), 2, 4);
    let engine = TestEngine::start(|config| config.rate = Some(400.0)).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let samples = samples(12);
    start_all(&attached, &samples, &[4, 5], 900).await;
    for (order, number) in [(11, 1), (12, 2)] {
        let before = ledger.tokens();
        attached.until(&mut ledger, |ledger| ledger.tokens() > before + 600).await;
        let path = dir.path().join(format!("v{number}"));
        attached.control(load(order, number, &path, pb::OnRunning::Continue)).await;
        let done = attached
            .until_said(&mut ledger, |kind| stage(kind, &[Stage::Active, Stage::Failed]))
            .await;
        assert_eq!((done.stage(), done.error.as_str()), (Stage::Active, ""));
        assert_eq!(done.probe.expect("probe").verdict(), pb::probe::Verdict::First);
    }
    attached.until(&mut ledger, |ledger| ledger.ended() == 12).await;
    let mut digests = base();
    digests.extend([(1, v1), (2, v2)]);
    verify_all(&ledger, &[4, 5], &digests);
    for row in ledger.samples.values() {
        let mut seen = row.versions.clone();
        assert!(seen.is_sorted());
        seen.dedup();
        assert_eq!((seen, row.inexact, row.tokens.len()), (vec![0, 1, 2], 0, 900));
    }
}

#[tokio::test]
async fn what_cannot_be_cut_is_paused_and_its_boundary_is_marked() {
    let dir = tempfile::tempdir().expect("dir");
    let v1 = checkpoint(dir.path(), 1, 4);
    let engine = TestEngine::start(|config| config.rate = Some(400.0)).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let digest = attached.prompt(&[4]).await;
    // Nobody knows what an extra parameter keeps inside of the engine.
    let extra = [("not_known_to_us".to_owned(), "1".to_owned())].into();
    let sampling = pb::Sampling { max_tokens: 800, extra, ..Default::default() };
    attached.start_with(SampleId::new(5, 0), digest, 0, &[], sampling).await;
    attached.until(&mut ledger, |ledger| ledger.tokens() > 100).await;
    attached.control(load(1, 1, dir.path(), pb::OnRunning::Continue)).await;
    attached.until_said(&mut ledger, |kind| stage(kind, &[Stage::Active])).await;
    attached.until(&mut ledger, |ledger| ledger.ended() == 1).await;
    let row = &ledger.samples[&SampleId::new(5, 0)];
    assert_eq!(row.tokens.len(), 800);
    assert!((1..=16).contains(&row.inexact), "one chunk: {}", row.inexact);
    // Beyond the chunk that straddles the load, every token is the labelled version's.
    let digests = BTreeMap::from([(0, anabranch_engine::synthetic::base_digest()), (1, v1)]);
    let first_new = row.versions.iter().position(|v| *v == 1).expect("some");
    let head = Row {
        tokens: row.tokens[..first_new].to_vec(),
        logprobs: row.logprobs[..first_new].to_vec(),
        versions: row.versions[..first_new].to_vec(),
        ..Default::default()
    };
    verify(&head, &[4], 0, &digests);
}

#[tokio::test]
async fn a_directory_that_does_not_fit_is_refused_and_the_old_version_goes_on() {
    let dir = tempfile::tempdir().expect("dir");
    let v1 = checkpoint(&dir.path().join("v1"), 1, 4);
    checkpoint(&dir.path().join("bad"), 1, 5);
    let engine = TestEngine::start(|config| config.rate = Some(400.0)).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    attached.control(load(1, 1, &dir.path().join("v1"), pb::OnRunning::Finish)).await;
    attached.until_said(&mut ledger, |kind| stage(kind, &[Stage::Active])).await;
    start_all(&attached, &samples(2), &[4, 5], 400).await;
    for (order, path) in [(2, dir.path().join("bad")), (3, dir.path().join("none"))] {
        attached.control(load(order, 2, &path, pb::OnRunning::Continue)).await;
        let failed = attached
            .until_said(&mut ledger, |kind| stage(kind, &[Stage::Active, Stage::Failed]))
            .await;
        assert_eq!(failed.stage(), Stage::Failed);
        assert!(
            failed.error.contains("[5, 8]") || failed.error.contains("none"),
            "{}",
            failed.error
        );
    }
    attached.until(&mut ledger, |ledger| ledger.ended() == 2).await;
    verify_all(&ledger, &[4, 5], &BTreeMap::from([(1, v1)]));
}

#[tokio::test]
async fn every_way_a_stream_can_break_is_a_lost_sample_whose_tokens_so_far_are_good() {
    logs();
    let engine = TestEngine::start(|config| config.rate = Some(500.0)).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let faults = ["end_early", "reset", "corrupt", "lose_finish"];
    for (group, fault) in (0..).zip(faults) {
        let sample = SampleId::new(group, 0);
        let digest = attached.prompt(&[3]).await;
        if matches!(fault, "corrupt" | "lose_finish") {
            engine.fault(&format!(r#"{{"kind":"{fault}"}}"#)).await;
        }
        attached.start(sample, digest, 60, 0).await;
        if matches!(fault, "end_early" | "reset") {
            let has_some =
                |l: &Ledger| l.samples.get(&sample).is_some_and(|row| !row.tokens.is_empty());
            attached.until(&mut ledger, has_some).await;
            engine.fault(&format!(r#"{{"kind":"{fault}"}}"#)).await;
        }
        let wanted = group as usize + 1;
        attached.until(&mut ledger, |ledger| ledger.ended() == wanted).await;
        assert_eq!(ledger.why(sample), Why::Lost, "{fault}");
        verify(&ledger.samples[&sample], &[3], 0, &base());
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_refused_before_the_engine_sees_it() {
    let engine = TestEngine::start(|config| config.context_capacity = 64).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let cases: [(&[u32], u32, &str); 4] = [
        (&[1, 1000], 4, "token 1000 at position 1 is outside the vocabulary of 1000"),
        (&[1; 64], 4, "64 tokens leave no room in the context of 64"),
        (&[], 4, "the prompt is empty"),
        (&[1], 0, "max_tokens: must be at least 1"),
    ];
    for (group, (prompt, max_tokens, text)) in (0..).zip(cases) {
        let sample = SampleId::new(group, 0);
        let digest = attached.prompt(prompt).await;
        attached.start(sample, digest, max_tokens, 0).await;
        attached.until(&mut ledger, |ledger| ledger.samples.contains_key(&sample)).await;
        let end = ledger.samples[&sample].end.as_ref().expect("ended");
        assert_eq!(end.why(), Why::Refused);
        assert!(end.matched.contains(text), "{}", end.matched);
    }
    // A sample that fits but asks for more than the context ends at it.
    let digest = attached.prompt(&[2; 32]).await;
    attached.start(SampleId::new(9, 0), digest, 500, 0).await;
    attached.until(&mut ledger, |ledger| ledger.ended() == 5).await;
    assert_eq!(ledger.samples[&SampleId::new(9, 0)].tokens.len(), 32);
}

#[tokio::test]
async fn an_engine_that_dies_costs_its_samples_and_comes_back_as_a_new_incarnation() {
    logs();
    let engine = TestEngine::start(|config| config.rate = Some(300.0)).await;
    let addr = engine.addr;
    let mut manager = TestManager::start().await;
    let agent = TestAgent::start(manager.addr, addr, |_| {});
    let mut first = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    start_all(&first, &samples(4), &[1, 2], 5000).await;
    first.until(&mut ledger, |ledger| ledger.tokens() > 200).await;
    engine.kill().await;
    first
        .until_said(&mut ledger, |kind| {
            matches!(kind, from_agent::Kind::EngineDown(_)).then_some(())
        })
        .await;
    first.until(&mut ledger, |ledger| ledger.ended() == 4).await;
    assert!(samples(4).iter().all(|sample| ledger.why(*sample) == Why::Lost));
    verify_all(&ledger, &[1, 2], &base());
    let _engine = TestEngine::start(|config| config.listen = addr).await;
    let second = manager.attach(|_| welcome(2)).await;
    let incarnation = |hello: &pb::Hello| hello.engine.as_ref().expect("engine").incarnation;
    assert!(incarnation(&second.hello) > incarnation(&first.hello));
    assert_eq!((second.hello.resume_session, second.hello.held.len()), (0, 0));
    let mut second = second;
    let mut fresh = Ledger::default();
    start_all(&second, &samples(2), &[1, 2], 50).await;
    second.until(&mut fresh, |ledger| ledger.ended() == 2).await;
    verify_all(&fresh, &[1, 2], &base());
    agent.stop.cancel();
}

#[tokio::test]
async fn a_lost_link_costs_nothing_that_the_manager_wants_to_keep() {
    logs();
    let engine = TestEngine::start(|config| config.rate = Some(500.0)).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut first = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let samples = samples(4);
    start_all(&first, &samples, &[8], 1000).await;
    first.until(&mut ledger, |ledger| ledger.tokens() > 400).await;
    drop(first);
    let (acked, have) = (ledger.last_seq, ledger.tokens());
    let mut second = manager
        .attach(|hello| {
            assert_eq!(hello.resume_session, 1);
            assert_eq!(hello.held.len(), 4);
            let (drop, keep): (Vec<_>, Vec<_>) = hello
                .held
                .iter()
                .cloned()
                .partition(|held| held.sample.expect("sample").index == 3);
            pb::Welcome { keep, drop, acked_tick: acked, ..welcome(1) }
        })
        .await;
    second.until(&mut ledger, |ledger| ledger.ended() == 3).await;
    assert!(ledger.tokens() > have);
    for sample in &samples[..3] {
        let row = &ledger.samples[sample];
        assert_eq!((row.tokens.len(), ledger.why(*sample)), (1000, Why::Length));
        verify(row, &[8], u64::from(sample.index), &base());
    }
    assert!(ledger.samples[&samples[3]].end.is_none(), "dropped without a word");
}

#[tokio::test]
async fn a_drain_reports_every_sample_before_the_agent_leaves() {
    logs();
    let engine = TestEngine::start(|config| config.rate = Some(300.0)).await;
    let mut manager = TestManager::start().await;
    let agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let digest = attached.prompt(&[6]).await;
    for index in 0..8 {
        // Some finish before the deadline, the rest are cut.
        let max_tokens = if index < 4 { 100 } else { 9000 };
        attached.start(SampleId::new(5, index), digest, max_tokens, u64::from(index)).await;
    }
    attached.until(&mut ledger, |ledger| ledger.tokens() > 80).await;
    let mode = pb::Mode {
        order: 77,
        kind: pb::mode::Kind::Drain.into(),
        deadline_ms: 1500,
        why: "test".into(),
    };
    attached.control(to_agent::Kind::Mode(mode)).await;
    let done = attached
        .until_said(&mut ledger, |kind| match kind {
            from_agent::Kind::ModeDone(done) => Some(done.clone()),
            _ => None,
        })
        .await;
    assert!(done.ok && done.drained && done.order == 77, "{done:?}");
    assert_eq!(ledger.ended(), 8);
    for index in 0..8 {
        let sample = SampleId::new(5, index);
        let wanted = if index < 4 { Why::Length } else { Why::Aborted };
        assert_eq!(ledger.why(sample), wanted);
    }
    verify_all(&ledger, &[6], &base());
    agent.ended().await.expect("left in order");
}

#[tokio::test]
async fn sigterm_is_announced_and_drains() {
    let engine = TestEngine::start(|config| config.rate = Some(300.0)).await;
    let mut manager = TestManager::start().await;
    let agent = TestAgent::start(manager.addr, engine.addr, |c| {
        c.drain_deadline = Duration::from_millis(600)
    });
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    start_all(&attached, &samples(3), &[6], 9000).await;
    attached.until(&mut ledger, |ledger| ledger.tokens() > 80).await;
    agent.stop.cancel();
    let notice = attached
        .until_said(&mut ledger, |kind| match kind {
            from_agent::Kind::Notice(notice) => Some(notice.preempt_in_ms),
            _ => None,
        })
        .await;
    assert_eq!(notice, 600);
    attached.until(&mut ledger, |ledger| ledger.ended() == 3).await;
    verify_all(&ledger, &[6], &base());
    agent.ended().await.expect("left in order");
}

#[tokio::test]
async fn memory_is_released_only_after_every_terminal_chunk_and_comes_back_without_weights() {
    let dir = tempfile::tempdir().expect("dir");
    let v1 = checkpoint(dir.path(), 1, 4);
    let engine = TestEngine::start(|config| config.rate = Some(300.0)).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    start_all(&attached, &samples(6), &[2], 9000).await;
    attached.until(&mut ledger, |ledger| ledger.tokens() > 100).await;
    let order = |order, kind: pb::mode::Kind| {
        to_agent::Kind::Mode(pb::Mode {
            order,
            kind: kind.into(),
            deadline_ms: 5000,
            why: String::new(),
        })
    };
    let done = |kind: &from_agent::Kind| match kind {
        from_agent::Kind::ModeDone(done) => Some(done.clone()),
        _ => None,
    };
    attached.control(order(1, pb::mode::Kind::ReleaseMemory)).await;
    let released = attached.until_said(&mut ledger, done).await;
    assert!(released.ok && released.drained && released.memory_released, "{released:?}");
    attached.until(&mut ledger, |ledger| ledger.ended() == 6).await;
    assert!(samples(6).iter().all(|sample| ledger.why(*sample) == Why::Aborted));
    verify_all(&ledger, &[2], &base());
    attached.control(order(2, pb::mode::Kind::ResumeMemory)).await;
    assert!(attached.until_said(&mut ledger, done).await.ok);
    let digest = attached.prompt(&[2]).await;
    attached.start(SampleId::new(6, 0), digest, 20, 0).await;
    attached.until(&mut ledger, |ledger| ledger.ended() == 7).await;
    assert_eq!(ledger.why(SampleId::new(6, 0)), Why::Busy, "no weights yet");
    attached.control(load(3, 1, dir.path(), pb::OnRunning::Finish)).await;
    let loaded =
        attached.until_said(&mut ledger, |kind| stage(kind, &[Stage::Active, Stage::Failed])).await;
    assert_eq!((loaded.stage(), loaded.error.as_str()), (Stage::Active, ""));
    attached.start(SampleId::new(7, 0), digest, 20, 0).await;
    attached.until(&mut ledger, |ledger| ledger.ended() == 8).await;
    verify(&ledger.samples[&SampleId::new(7, 0)], &[2], 0, &BTreeMap::from([(1, v1)]));
}

#[tokio::test]
async fn a_stop_ends_one_sample_and_a_newer_attempt_ends_the_older_silently() {
    let engine = TestEngine::start(|config| config.rate = Some(300.0)).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let samples = samples(2);
    start_all(&attached, &samples, &[2], 300).await;
    // At once: the abort may overtake its request.
    let stop = pb::Stop { sample: Some(samples[0].into()), attempt: 1, why: "test".into() };
    attached.data(data_to_agent::Kind::Stop(stop)).await;
    attached.until(&mut ledger, |ledger| ledger.ended() == 2).await;
    assert_eq!((ledger.why(samples[0]), ledger.why(samples[1])), (Why::Aborted, Why::Length));
    verify_all(&ledger, &[2], &base());
}

#[tokio::test]
async fn a_logprobs_mode_that_the_engine_cannot_give_ends_the_agent_with_the_way_out() {
    let engine = TestEngine::start(|_| {}).await;
    let mut manager = TestManager::start().await;
    let agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    manager
        .welcome_only(pb::Welcome { convention: pb::Convention::Raw.into(), ..welcome(1) })
        .await;
    let error = agent.ended().await.expect_err("refused");
    assert!(matches!(error, AgentError::LogprobsMode { .. }), "{error}");
    assert!(error.to_string().contains("--logprobs-mode"));
}

#[tokio::test]
async fn a_manager_that_refuses_for_good_ends_the_agent_and_one_that_is_busy_does_not() {
    let engine = TestEngine::start(|_| {}).await;
    let mut manager = TestManager::start().await;
    let agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    manager.refuse(pb::Refused { why: "wait".into(), retry: true, retry_after_ms: 50 }).await;
    manager
        .refuse(pb::Refused { why: "wrong model".into(), retry: false, retry_after_ms: 0 })
        .await;
    let error = agent.ended().await.expect_err("refused");
    assert!(matches!(&error, AgentError::Refused(why) if why == "wrong model"), "{error}");
}
