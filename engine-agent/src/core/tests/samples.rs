//! Runs on the engine: how they end, and how its death ends them.

use super::*;

#[test]
fn a_dead_engine_loses_its_samples_and_the_next_life_is_a_new_session() {
    let mut world = World::ready();
    let attempt = world.start(0, 1);
    world.tokens(attempt, &[3]);
    world.order_load(1, pb::OnRunning::Continue, 0);
    world.handle(Event::EngineDown { why: "killed".into(), will_restart: true });
    assert_eq!(world.segs(), [(0, 0, vec![3])], "what it made is not lost");
    assert_eq!(world.ends(), [(0, Why::Lost, 1)]);
    assert_eq!(world.last_load().stage(), Stage::Failed);
    world.order_start(1, 1);
    world.pass(TICK);
    assert_eq!(world.ends().last(), Some(&(1, Why::Busy, 0)));
    assert_eq!(
        (world.ticks[0].ends.len(), world.ticks[1].ends.len()),
        (0, 1),
        "tokens, death, ends"
    );
    world.handle(Event::EngineUp { info: Box::new(info()), probe: None });
    assert_eq!(world.hellos.len(), 1, "the manager takes the rest first");
    world.ack();
    let hello = world.hellos.last().expect("dialled");
    assert_eq!((hello.resume_session, hello.engine.as_ref().expect("e").incarnation), (0, 11));
}

#[test]
fn an_engine_that_dies_while_the_link_is_down_is_spoken_for_in_its_own_session() {
    let mut world = World::ready();
    let attempt = world.start(0, 1);
    world.lose_link();
    world.tokens(attempt, &[3]);
    world.handle(Event::EngineDown { why: "killed".into(), will_restart: true });
    world.handle(Event::EngineUp { info: Box::new(info()), probe: None });
    world.pass(Duration::from_secs(1));
    let hello = world.hellos.last().expect("dialled").clone();
    let incarnation = |hello: &pb::Hello| hello.engine.as_ref().expect("e").incarnation;
    assert_eq!((hello.resume_session, incarnation(&hello), hello.kv_tokens), (1, 10, 1000));
    world.attach(pb::Welcome { keep: hello.held, ..welcome(1) });
    assert_eq!(world.segs(), [(0, 0, vec![3])]);
    assert!(world.control.iter().any(|kind| matches!(kind, from_agent::Kind::EngineDown(_))));
    world.order_start(1, 1);
    world.pass(TICK);
    assert_eq!(world.ends().last(), Some(&(1, Why::Busy, 0)), "not in the old session");
    world.ack();
    let hello = world.hellos.last().expect("dialled");
    assert_eq!((hello.resume_session, incarnation(hello)), (0, 11));
}

#[test]
fn memory_is_given_back_only_when_nothing_runs() {
    let mut world = World::ready();
    let attempt = world.start(0, 1);
    let kind = pb::mode::Kind::ReleaseMemory.into();
    world.say(to_agent::Kind::Mode(pb::Mode {
        order: 3,
        kind,
        deadline_ms: 1000,
        why: String::new(),
    }));
    assert_eq!(world.aborted, [attempt]);
    assert!(!world.other.iter().any(|action| action.contains("ReleaseMemory")));
    world.finish(attempt, Finish::Aborted);
    assert!(world.other.iter().any(|action| action.contains("ReleaseMemory")));
    world.called(Call::ReleaseMemory, Ok(()));
    let done = world.mode_done().expect("answered");
    assert!(done.ok && done.drained && done.memory_released);
    world.order_start(1, 1);
    world.pass(TICK);
    assert_eq!(world.ends().last(), Some(&(1, Why::Busy, 0)));
}

#[test]
fn an_engine_that_ignores_stop_ids_is_stopped_at_the_first_one() {
    let mut world = World::ready();
    let ids = tokens::encode_ids(&[1, 2]);
    let digest = tokens::prompt_digest(&ids);
    world.data(data_to_agent::Kind::Prompt(pb::PromptPart { digest, at: 0, ids, last: true }));
    let sampling =
        pb::Sampling { max_tokens: 40, min_tokens: 3, ignore_eos: true, ..Default::default() };
    world.data(data_to_agent::Kind::Start(pb::Start {
        sample: Some(SampleId::new(1, 0).into()),
        attempt: 1,
        prompt: digest,
        sampling: Some(sampling),
        stop_ids: vec![9],
        ..Default::default()
    }));
    let attempt = world.generated[0].attempt;
    world.tokens(attempt, &[9, 4]);
    world.tokens(attempt, &[5, 9, 6]);
    world.tokens(attempt, &[7]);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![9, 4, 5, 9])]);
    assert_eq!(world.ends(), [(0, Why::StopId, 4)]);
    assert_eq!(world.aborted, [attempt]);
}

#[test]
fn an_abort_that_nobody_asked_for_and_a_broken_stream_are_lost_samples() {
    let mut world = World::ready();
    let (aborted, broken) = (world.start(0, 1), world.start(1, 1));
    world.finish(aborted, Finish::Aborted);
    let error = StreamError::Broken { why: "reset".into() };
    world.handle(Event::RequestEnded { attempt: broken, end: RequestEnd::Failed(error) });
    world.pass(TICK);
    assert_eq!(world.ends(), [(0, Why::Lost, 0), (1, Why::Lost, 0)]);
    assert!(world.other.iter().any(|action| action.contains("CheckEngine")));
}

#[test]
fn a_newer_attempt_silences_the_older_one() {
    let mut world = World::ready();
    let old = world.start(0, 1);
    world.tokens(old, &[3]);
    let new = world.start(0, 2);
    assert_eq!(world.aborted, [old]);
    world.tokens(old, &[4]);
    world.finish(old, Finish::Aborted);
    world.tokens(new, &[5]);
    world.order_start(0, 1);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![3]), (0, 0, vec![5])]);
    assert_eq!(world.ticks[0].segs[1].attempt, 2);
    assert!(world.ends().is_empty());
}
