//! Loads of new weights: what becomes of running samples, probes, and the versions that tokens
//! carry.

use super::*;

#[test]
fn a_load_cuts_running_samples_and_continues_them_with_all_their_tokens() {
    let mut world = World::ready();
    let attempt = world.start(0, 1);
    world.tokens(attempt, &[3, 4]);
    world.order_load(1, pb::OnRunning::Continue, 0);
    world.tokens(attempt, &[5]);
    world.staged(1);
    assert_eq!(world.aborted, [attempt]);
    assert!(
        !world.other.iter().any(|action| action.contains("PauseForLoad")),
        "it has not ended yet"
    );
    world.tokens(attempt, &[6]);
    world.finish(attempt, Finish::Aborted);
    assert!(world.other.iter().any(|action| action.contains("PauseForLoad")));
    world.load_through(-0.7);
    let again = world.generated.last().expect("continued").clone();
    assert_eq!(
        (again.attempt, again.tail.as_slice(), again.max_tokens),
        (attempt, &[3, 4, 5, 6][..], 36)
    );
    assert_ne!(again.rid, world.generated[0].rid);
    world.tokens(attempt, &[7]);
    world.finish(attempt, Finish::StopId);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![3, 4, 5, 6]), (0, 1, vec![7])]);
    assert_eq!(world.ends(), [(0, Why::StopId, 5)], "no end of the cut in between");
    use Stage::{Active, Fetching, Loading, Probing, Quiescing, Staged};
    assert_eq!(world.stages(), [Fetching, Staged, Quiescing, Loading, Probing, Active]);
    assert_eq!(world.last_load().probe.expect("probe").verdict(), pb::probe::Verdict::First);
}

#[test]
fn starts_that_come_during_a_load_run_after_it() {
    let mut world = World::ready();
    world.order_load(1, pb::OnRunning::Continue, 0);
    world.start(0, 1);
    world.staged(1);
    let before = world.generated.len();
    world.order_start(1, 1);
    assert_eq!(world.generated.len(), before, "held");
    let cut = world.aborted[0];
    world.finish(cut, Finish::Aborted);
    world.load_through(-0.7);
    assert_eq!(world.generated.len(), before + 2, "the held and the cut one");
}

#[test]
fn a_load_that_the_engine_refuses_leaves_the_old_version_serving() {
    let mut world = World::ready();
    let attempt = world.start(0, 1);
    world.order_load(1, pb::OnRunning::Continue, 0);
    world.staged(1);
    world.finish(attempt, Finish::Aborted);
    world.called(Call::PauseForLoad, Ok(()));
    world.called(Call::Load, Err("400: no such file".into()));
    assert_ne!(world.last_load().stage(), Stage::Failed, "first the engine must go on");
    world.called(Call::ContinueAfterLoad, Ok(()));
    assert_eq!(world.last_load().stage(), Stage::Failed);
    assert!(world.last_load().error.contains("no such file"));
    world.tokens(attempt, &[3]);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![3])], "under the old version");
}

#[test]
fn a_fetch_that_fails_or_is_late_never_disturbs_a_sample() {
    let mut world = World::ready();
    let attempt = world.start(0, 1);
    world.order_load(1, pb::OnRunning::Abort, 0);
    world.handle(Event::Fetched { order: 1, result: Err("chunk 3 is wrong".into()) });
    assert_eq!(world.last_load().error, "chunk 3 is wrong");
    world.order_load(2, pb::OnRunning::Abort, 500);
    world.pass(Duration::from_millis(600));
    assert_eq!((world.last_load().order, world.last_load().stage()), (2, Stage::Failed));
    assert!(world.last_load().error.contains("500 ms"));
    world.staged(2);
    assert_eq!(world.last_load().stage(), Stage::Failed, "too late is too late");
    world.order_load(3, pb::OnRunning::Abort, 0);
    world.order_load(4, pb::OnRunning::Abort, 0);
    let superseded: Vec<u64> = world
        .control
        .iter()
        .filter_map(|kind| match kind {
            from_agent::Kind::LoadState(state) if state.error.contains("superseded") => {
                Some(state.order)
            }
            _ => None,
        })
        .collect();
    assert_eq!(superseded, [3]);
    assert!(world.aborted.is_empty());
    world.tokens(attempt, &[3]);
}

#[test]
fn a_probe_that_disagrees_brings_the_old_weights_back_and_no_token_of_the_new_ones_leaves() {
    let mut world = World::ready();
    let attempt = world.start(0, 1);
    // Not to be cut, so it is paused and goes on before the probe.
    world.order_start_with_stop_string(1);
    let paused = world.generated.last().expect("started").attempt;
    world.tokens(paused, &[3]);
    world.finish(attempt, Finish::Length);
    world.say(to_agent::Kind::Load(pb::Load {
        order: 1,
        version: Some(pb::Version { epoch: 1, number: 1, root: vec![7; 32].into() }),
        on_running: pb::OnRunning::Continue.into(),
        reference: Some(pb::Probe { ids: vec![1, 2], logprobs: vec![-1.0, -0.4], verdict: 0 }),
        ..Default::default()
    }));
    world.staged(1);
    world.called(Call::PauseForLoad, Ok(()));
    world.called(Call::Load, Ok(()));
    world.tokens(paused, &[66]);
    world.called(Call::ContinueAfterLoad, Ok(()));
    world.tokens(paused, &[67]);
    world.handle(Event::Probed { result: Ok(probe(-0.7)) });
    assert!(
        world
            .other
            .iter()
            .any(|action| action.contains("LoadWeights") && action.contains("/model"))
    );
    world.called(Call::Load, Ok(()));
    world.called(Call::ContinueAfterLoad, Ok(()));
    assert_eq!(world.last_load().stage(), Stage::Failed);
    world.pass(TICK);
    assert_eq!(world.segs(), [(1, 0, vec![3])]);
    assert!(
        world.ends().contains(&(1, Why::Aborted, 1)),
        "continues elsewhere: {:?}",
        world.ends()
    );
    assert_eq!(world.exit, None);
}

#[test]
fn a_probe_within_the_tolerance_agrees_and_an_unchanged_one_is_inconclusive() {
    for (reference, logprob, wanted) in [
        (Some(-0.70004), -0.7, pb::probe::Verdict::Agrees),
        (None, 0.0, pb::probe::Verdict::Inconclusive),
        (None, -0.7, pb::probe::Verdict::First),
    ] {
        let mut world = World::ready();
        world.say(to_agent::Kind::Load(pb::Load {
            order: 1,
            version: Some(pb::Version { epoch: 1, number: 1, root: vec![7; 32].into() }),
            reference: reference.map(|logprob| pb::Probe {
                ids: vec![1, 2],
                logprobs: vec![-1.0, logprob],
                verdict: 0,
            }),
            ..Default::default()
        }));
        world.staged(1);
        world.load_through(logprob);
        assert_eq!(world.last_load().probe.expect("probe").verdict(), wanted);
    }
}

#[test]
fn the_engines_spans_place_a_boundary_that_a_pause_blurred() {
    let mut world = World::ready();
    world.order_start_with_stop_string(0);
    let attempt = world.generated.last().expect("started").attempt;
    world.tokens(attempt, &[3, 4]);
    world.order_load(1, pb::OnRunning::Continue, 0);
    world.staged(1);
    world.load_through(-0.7);
    let span = |label: &str, start, end| LabelSpan { label: label.into(), start, end };
    let chunk = Chunk {
        tokens: vec![5, 6, 7],
        logprobs: vec![-1.0; 3],
        spans: vec![span("default", 0, 3), span("v1@1", 3, 5)],
        finish: Some(Finish::Length),
        ..Default::default()
    };
    world.core.tokens(world.now, attempt, &chunk);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![3, 4, 5]), (0, 1, vec![6, 7])]);
    assert!(world.ticks.iter().flat_map(|tick| &tick.segs).all(|seg| !seg.inexact));
}

#[test]
fn tokens_of_weights_that_nobody_loaded_here_are_not_taken() {
    let mut world = World::ready();
    let attempt = world.start(0, 1);
    let mut chunk = Chunk { tokens: vec![3], logprobs: vec![-1.0], ..Default::default() };
    chunk.label = "somebody else's".into();
    assert_eq!(world.core.tokens(world.now, attempt, &chunk), AfterChunk::Close);
    world.pass(TICK);
    assert!(world.segs().is_empty());
    assert_eq!(world.ends(), [(0, Why::Lost, 0)]);
    assert!(world.other.iter().any(|action| action.contains("CheckEngine")));
}

#[test]
fn a_version_outside_the_samples_window_is_not_served() {
    let mut world = World::ready();
    let ids = tokens::encode_ids(&[1]);
    let digest = tokens::prompt_digest(&ids);
    world.data(data_to_agent::Kind::Prompt(pb::PromptPart { digest, at: 0, ids, last: true }));
    let version = |number| Some(pb::Version { epoch: 1, number, root: vec![7; 32].into() });
    world.data(data_to_agent::Kind::Start(pb::Start {
        sample: Some(SampleId::new(1, 0).into()),
        attempt: 1,
        prompt: digest,
        sampling: Some(pb::Sampling { max_tokens: 4, ..Default::default() }),
        min_version: version(3),
        ..Default::default()
    }));
    world.pass(TICK);
    assert_eq!(world.ends(), [(0, Why::Busy, 0)]);
    assert!(world.ticks[0].ends[0].matched.contains("needs v3@1"));
}

#[test]
fn tokens_of_an_engine_that_the_trainer_loads_carry_the_version_it_attested() {
    let mut world = World::new(1 << 20);
    world.core.config.weights_by_trainer = true;
    let mut world = world.begun();
    let ids = tokens::encode_ids(&[1, 2]);
    let digest = tokens::prompt_digest(&ids);
    world.data(data_to_agent::Kind::Prompt(pb::PromptPart { digest, at: 0, ids, last: true }));
    for (index, number) in [(0, 3), (1, 4)] {
        world.data(data_to_agent::Kind::Start(pb::Start {
            sample: Some(SampleId::new(1, index).into()),
            attempt: 1,
            prompt: digest,
            sampling: Some(pb::Sampling { max_tokens: 40, ..Default::default() }),
            min_version: Some(pb::Version { epoch: 1, number, root: vec![7; 32].into() }),
            ..Default::default()
        }));
        let attempt = world.generated.last().expect("it was started").attempt;
        world.tokens(attempt, &[5]);
    }
    world.pass(Duration::from_millis(20));
    assert_eq!(world.segs(), [(0, 3, vec![5]), (1, 4, vec![5])]);
}
