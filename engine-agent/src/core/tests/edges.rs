//! State times event: which state follows, for the load, the attempt, the link, the memory and the
//! drain.

use super::super::attempts::AttemptState;
use super::super::drain::{DrainOrder, DrainPhase};
use super::super::link::LinkState;
use super::super::load::LoadState;
use super::super::memory::Memory;
use super::*;

type Step = (&'static str, fn(&mut World));

/// Ways into every state of a load, each from a fresh world; the last column is the state itself.
const LOAD_STATES: [Step; 9] = [
    ("Active", |_| {}),
    ("Fetching", |world| world.order_load(1, pb::OnRunning::Finish, 500)),
    ("Quiescing", |world| {
        world.start(0, 1);
        world.order_load(1, pb::OnRunning::Finish, 500);
        world.staged(1);
    }),
    ("Pausing", pausing),
    ("Loading", |world| {
        pausing(world);
        world.called(Call::PauseForLoad, Ok(()));
    }),
    ("Continuing", continuing),
    ("Probing", |world| {
        continuing(world);
        world.called(Call::ContinueAfterLoad, Ok(()));
    }),
    ("Restoring", |world| {
        pausing(world);
        world.called(Call::PauseForLoad, Err("no".into()));
    }),
    ("Reloading", |world| {
        continuing(world);
        world.called(Call::ContinueAfterLoad, Ok(()));
        world.handle(Event::Probed { result: Err("no".into()) });
    }),
];

fn pausing(world: &mut World) {
    world.order_load(1, pb::OnRunning::Finish, 500);
    world.staged(1);
}

fn continuing(world: &mut World) {
    pausing(world);
    world.called(Call::PauseForLoad, Ok(()));
    world.called(Call::Load, Ok(()));
}

const LOAD_EVENTS: [Step; 15] = [
    ("fetched", |world| world.staged(1)),
    ("fetch failed", |world| {
        world.handle(Event::Fetched { order: 1, result: Err("no".into()) });
    }),
    ("paused", |world| world.called(Call::PauseForLoad, Ok(()))),
    ("pause failed", |world| world.called(Call::PauseForLoad, Err("no".into()))),
    ("loaded", |world| world.called(Call::Load, Ok(()))),
    ("load failed", |world| world.called(Call::Load, Err("no".into()))),
    ("continued", |world| world.called(Call::ContinueAfterLoad, Ok(()))),
    ("continue failed", |world| world.called(Call::ContinueAfterLoad, Err("no".into()))),
    ("probe agrees", |world| world.handle(Event::Probed { result: Ok(probe(-0.7)) })),
    ("probe failed", |world| world.handle(Event::Probed { result: Err("no".into()) })),
    ("cancel", |world| {
        world.say(to_agent::Kind::Load(pb::Load { order: 1, cancel: true, ..Default::default() }));
    }),
    ("newer order", |world| world.order_load(2, pb::OnRunning::Finish, 0)),
    ("deadline", |world| world.pass(Duration::from_millis(600))),
    ("engine died", |world| {
        world.handle(Event::EngineDown { why: "killed".into(), will_restart: true });
    }),
    ("drain", |world| world.drain_order(4000)),
];

fn load_state(world: &World) -> &'static str {
    match world.core.loader.state() {
        _ if world.exit.is_some() => "exit",
        LoadState::Active => "Active",
        LoadState::Fetching(order) if order.id == 2 => "Fetching 2",
        LoadState::Fetching(_) => "Fetching",
        LoadState::Quiescing(..) => "Quiescing",
        LoadState::Pausing(..) => "Pausing",
        LoadState::Loading(..) => "Loading",
        LoadState::Continuing(..) => "Continuing",
        LoadState::Probing(..) => "Probing",
        LoadState::Restoring { reload: true, .. } => "Reloading",
        LoadState::Restoring { reload: false, .. } => "Restoring",
    }
}

/// Every event in every state of a load: one line a state, only the events that change it.
#[test]
fn each_event_moves_a_load_only_along_the_graph() {
    let mut lines = Vec::new();
    for (state, enter) in LOAD_STATES {
        let mut moves = Vec::new();
        for (event, happen) in LOAD_EVENTS {
            let mut world = World::ready();
            enter(&mut world);
            assert_eq!(load_state(&world), state);
            happen(&mut world);
            let next = load_state(&world);
            if next != state {
                moves.push(format!("{event} -> {next}"));
            }
        }
        lines.push(format!("{state}: {}", moves.join(", ")));
    }
    assert_eq!(lines.join("\n"), LOAD_MOVES.trim());
}

const LOAD_MOVES: &str = "
Active: newer order -> Fetching 2, drain -> exit
Fetching: fetched -> Pausing, fetch failed -> Active, cancel -> Active, \
newer order -> Fetching 2, deadline -> Active, engine died -> Active, drain -> exit
Quiescing: cancel -> Active, engine died -> Active, drain -> Active
Pausing: paused -> Loading, pause failed -> Restoring, load failed -> Restoring, \
engine died -> Active
Loading: pause failed -> Restoring, loaded -> Continuing, load failed -> Restoring, \
engine died -> Active
Continuing: continued -> Probing, continue failed -> exit, engine died -> Active
Probing: probe agrees -> Active, probe failed -> Reloading, engine died -> Active
Restoring: pause failed -> exit, load failed -> exit, continued -> Active, \
continue failed -> exit, engine died -> Active
Reloading: pause failed -> exit, loaded -> Restoring, load failed -> exit, \
continue failed -> exit, engine died -> Active
";

/// Nothing of a load is left where the engine died in it: the next life can load.
#[test]
fn a_load_that_the_engine_died_in_is_reported_and_the_next_life_loads_again() {
    for (state, enter) in LOAD_STATES.into_iter().skip(1) {
        let mut world = World::ready();
        enter(&mut world);
        world.handle(Event::EngineDown { why: "killed".into(), will_restart: true });
        assert_eq!(world.last_load().stage(), Stage::Failed, "{state}");
        assert!(world.last_load().error.contains("the engine died"), "{state}");
        assert_eq!(world.core.expected_label(), None, "{state}");
        world.handle(Event::EngineUp { info: Box::new(info()), probe: None });
        world.pass(Duration::from_secs(2));
        world.attach(welcome(2));
        world.order_load(7, pb::OnRunning::Finish, 0);
        world.staged(7);
        world.load_through(-0.7);
        assert_eq!((world.last_load().order, world.last_load().stage()), (7, Stage::Active));
    }
}

const ATTEMPT_STATES: [AttemptState; 6] = [
    AttemptState::Waiting,
    AttemptState::Running,
    AttemptState::Stopping,
    AttemptState::Discarding,
    AttemptState::Cutting,
    AttemptState::Cut,
];

#[test]
fn an_attempt_never_leaves_a_state_that_only_its_terminal_chunk_ends() {
    let edges = |from: AttemptState| -> Vec<AttemptState> {
        ATTEMPT_STATES.into_iter().filter(|next| from.may_become(*next)).collect()
    };
    use AttemptState::{Cut, Cutting, Discarding, Running, Stopping, Waiting};
    assert_eq!(edges(Waiting), [Running]);
    assert_eq!(edges(Running), [Stopping, Discarding, Cutting]);
    assert_eq!(edges(Stopping), [Discarding]);
    assert_eq!(edges(Discarding), []);
    assert_eq!(edges(Cutting), [Stopping, Discarding, Cut]);
    assert_eq!(edges(Cut), [Running]);
}

/// Every way to end an attempt, in every state that it can be in.
#[test]
fn a_stop_a_drop_and_a_death_end_an_attempt_in_every_state() {
    fn load(world: &mut World) {
        world.order_load(1, pb::OnRunning::Continue, 0);
        world.staged(1);
    }
    fn cut(world: &mut World) {
        world.start(0, 1);
        load(world);
        let attempt = world.generated[0].attempt;
        world.finish(attempt, Finish::Aborted);
    }
    let states: [Step; 5] = [
        ("waiting", |world| {
            load(world);
            world.order_start(0, 1);
        }),
        ("running", |world| {
            world.start(0, 1);
        }),
        ("cutting", |world| {
            world.start(0, 1);
            load(world);
        }),
        ("cut", cut),
        ("stopping", |world| {
            world.start(0, 1);
            stop(world);
        }),
    ];
    fn stop(world: &mut World) {
        let sample = Some(SampleId::new(1, 0).into());
        let stop = pb::Stop { sample, attempt: 1, why: "test".into() };
        world.data(data_to_agent::Kind::Stop(stop));
    }
    fn terminal(world: &mut World) {
        for request in world.generated.clone() {
            world.finish(request.attempt, Finish::Aborted);
        }
        world.pass(Duration::from_millis(20));
    }
    for (state, enter) in states {
        let mut world = World::ready();
        enter(&mut world);
        stop(&mut world);
        terminal(&mut world);
        assert_eq!(world.ends(), [(0, Why::Aborted, 0)], "stopped while {state}");
        assert!(world.core.attempts.is_empty(), "stopped while {state}");

        let mut world = World::ready();
        enter(&mut world);
        world.order_start(0, 2);
        terminal(&mut world);
        let first_ends = world.ticks.iter().flat_map(|tick| &tick.ends);
        assert!(first_ends.filter(|end| end.attempt == 1).count() == 0, "replaced while {state}");

        let mut world = World::ready();
        enter(&mut world);
        world.handle(Event::EngineDown { why: "killed".into(), will_restart: true });
        world.pass(Duration::from_millis(20));
        assert_eq!(world.ends().len(), 1, "died while {state}");
        assert!(world.core.attempts.is_empty(), "died while {state}");
    }
}

#[test]
fn a_link_goes_forward_with_one_id_and_back_only_to_down() {
    let (one, two, lease) = (LinkId(1), LinkId(2), Duration::from_secs(1));
    let greeting = LinkState::Greeting { link: one };
    let joined = LinkState::Joined { link: one, lease };
    let bound = LinkState::Bound { link: one, lease };
    for state in [LinkState::Down, greeting, joined, bound] {
        assert!(state.may_become(LinkState::Down));
    }
    assert!(LinkState::Down.may_become(greeting) && greeting.may_become(joined));
    assert!(joined.may_become(bound));
    assert!(!LinkState::Down.may_become(joined) && !greeting.may_become(bound));
    assert!(!greeting.may_become(LinkState::Joined { link: two, lease }), "another dial's Welcome");
    assert!(!bound.may_become(joined) && !joined.may_become(greeting));
}

#[test]
fn memory_is_released_only_after_an_order_and_comes_back_only_after_another() {
    let asked = Memory::Releasing { order: 1, called: false };
    let called = Memory::Releasing { order: 1, called: true };
    let resuming = Memory::Resuming { order: 2 };
    assert!(Memory::Resident.may_become(asked) && asked.may_become(called));
    assert!(called.may_become(Memory::Released) && Memory::Released.may_become(resuming));
    assert!(resuming.may_become(Memory::Resident) && resuming.may_become(Memory::Released));
    assert!(!Memory::Resident.may_become(Memory::Released));
    assert!(!Memory::Resident.may_become(called) && !Memory::Released.may_become(asked));
}

#[test]
fn a_drain_never_goes_back_and_its_deadline_never_gets_later() {
    let drain = |phase, ms| DrainOrder { order: None, deadline: Now::from_millis(ms), phase };
    use DrainPhase::{Aborting, Handing, Running};
    assert!(drain(Running, 9).may_become(&drain(Handing, 9)));
    assert!(drain(Aborting, 9).may_become(&drain(Aborting, 5)));
    assert!(!drain(Aborting, 9).may_become(&drain(Running, 9)));
    assert!(!drain(Running, 5).may_become(&drain(Running, 9)));
}

#[test]
#[should_panic(expected = "no edge from Resident to Released")]
fn a_state_change_that_the_graph_does_not_have_fails_a_test() {
    World::ready().core.set_memory(Memory::Released);
}
