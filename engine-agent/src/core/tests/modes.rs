//! Orders beside loads: pause and continue, memory given back and taken again, outcomes across a
//! lost link.

use super::*;

fn order(world: &mut World, order: u64, kind: pb::mode::Kind) {
    let kind = kind.into();
    world.say(to_agent::Kind::Mode(pb::Mode { order, kind, deadline_ms: 1000, why: "t".into() }));
}

fn made(world: &World, action: &str) -> usize {
    world.other.iter().filter(|made| made.contains(action)).count()
}

#[test]
fn a_pause_is_answered_with_what_the_engine_said_and_shows_in_the_beats() {
    let mut world = World::ready();
    order(&mut world, 5, pb::mode::Kind::Pause);
    world.called(Call::Pause, Ok(()));
    let done = world.mode_done().expect("answered");
    assert_eq!((done.order, done.ok), (5, true));
    world.pass(Duration::from_millis(1100));
    let last = world.control.iter().rev().find_map(|kind| match kind {
        from_agent::Kind::Beat(beat) => Some(beat.phase()),
        _ => None,
    });
    assert_eq!(last, Some(pb::beat::Phase::Paused));
    order(&mut world, 6, pb::mode::Kind::Resume);
    world.called(Call::Continue, Err("500: busy".into()));
    let done = world.mode_done().expect("answered");
    assert_eq!((done.order, done.ok, done.error.as_str()), (6, false, "500: busy"));
}

#[test]
fn memory_comes_back_empty_so_the_engine_takes_samples_only_after_a_load() {
    let mut world = World::ready();
    order(&mut world, 1, pb::mode::Kind::ReleaseMemory);
    assert_eq!(made(&world, "ReleaseMemory"), 1, "at once: nothing runs");
    world.called(Call::ReleaseMemory, Ok(()));
    order(&mut world, 2, pb::mode::Kind::ReleaseMemory);
    assert_eq!(made(&world, "ReleaseMemory"), 1, "not twice");
    let done = world.mode_done().expect("answered");
    assert!((done.order, done.memory_released) == (2, true));
    order(&mut world, 3, pb::mode::Kind::ResumeMemory);
    order(&mut world, 4, pb::mode::Kind::ResumeMemory);
    assert!(world.mode_done().expect("answered").error.contains("under way"));
    world.called(Call::ResumeMemory, Ok(()));
    let done = world.mode_done().expect("answered");
    assert_eq!((done.order, done.ok), (3, true));
    world.order_start(0, 1);
    world.pass(TICK);
    assert_eq!(world.ends(), [(0, Why::Busy, 0)], "it has no weights");
    world.order_load(9, pb::OnRunning::Finish, 0);
    world.staged(9);
    world.load_through(-0.7);
    world.start(1, 1);
}

#[test]
fn memory_that_cannot_be_released_or_taken_again_is_answered_with_the_reason() {
    let mut world = World::ready();
    order(&mut world, 1, pb::mode::Kind::ReleaseMemory);
    world.called(Call::ReleaseMemory, Err("no saver".into()));
    assert_eq!(world.mode_done().expect("answered").error, "no saver");
    world.start(0, 1);
    order(&mut world, 2, pb::mode::Kind::ReleaseMemory);
    world.pass(Duration::from_millis(1100));
    assert!(world.mode_done().expect("answered").error.contains("1 streams still open"));
    order(&mut world, 3, pb::mode::Kind::Unspecified);
    assert!(world.mode_done().expect("answered").error.contains("older than the manager"));
}

#[test]
fn an_outcome_that_no_link_could_take_goes_out_after_the_next_attach_of_the_session() {
    let mut world = World::ready();
    world.order_load(1, pb::OnRunning::Finish, 0);
    world.lose_link();
    world.handle(Event::Fetched { order: 1, result: Err("chunk 3 is wrong".into()) });
    world.pass(Duration::from_secs(1));
    world.control.clear();
    world.attach(welcome(1));
    assert_eq!(world.last_load().error, "chunk 3 is wrong");
    world.lose_link();
    world.pass(Duration::from_secs(1));
    world.control.clear();
    world.attach(welcome(1));
    assert_eq!(world.last_load().error, "chunk 3 is wrong", "the last word is repeated");
}

#[test]
fn a_refusal_that_may_pass_is_waited_out_and_a_final_one_ends_the_agent() {
    let mut world = World::new(1 << 20);
    world.handle(Event::EngineUp { info: Box::new(info()), probe: None });
    let refused = |retry| {
        let why = "full".to_owned();
        to_agent::Kind::Refused(pb::Refused { why, retry, retry_after_ms: 3000 })
    };
    world.say(refused(true));
    world.pass(Duration::from_millis(2900));
    assert_eq!(world.hellos.len(), 1, "as long as it was told");
    world.pass(Duration::from_millis(200));
    assert_eq!(world.hellos.len(), 2);
    world.say(refused(false));
    assert_eq!(world.exit, Some(ExitReason::Refused { why: "full".into() }));
}

#[test]
fn words_of_a_former_link_change_nothing() {
    let mut world = World::ready();
    let former = world.link.expect("dialled");
    world.lose_link();
    world.pass(Duration::from_secs(1));
    world.attach(welcome(1));
    let kind = to_agent::Kind::Refused(pb::Refused { why: "old".into(), ..Default::default() });
    world.handle(Event::ManagerSaid { link: former, kind });
    world.handle(Event::LinkLost { link: former, why: "old".into(), fatal: true });
    assert_eq!(world.exit, None);
    world.start(0, 1);
}

#[test]
fn agents_of_one_fleet_dial_a_restarted_manager_at_different_times() {
    let redial = |id: &str| {
        let mut backoff = super::super::link::redial_backoff(id, 1);
        (0..4).map(|_| backoff.next_delay()).collect::<Vec<_>>()
    };
    assert_eq!(redial("a"), redial("a"), "a simulation reproduces");
    assert_ne!(redial("a"), redial("b"));
    assert!(redial("a")[0] >= Duration::from_millis(100));
}
