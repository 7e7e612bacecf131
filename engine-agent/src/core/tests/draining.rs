//! Leaving: by order or by signal.

use super::*;

#[test]
fn a_drain_waits_for_every_terminal_chunk_and_every_acknowledgement() {
    let mut world = World::ready();
    let (quick, slow) = (world.start(0, 1), world.start(1, 1));
    world.drain_order(4000);
    world.order_start(2, 1);
    world.tokens(quick, &[3]);
    world.finish(quick, Finish::Length);
    world.pass(Duration::from_millis(2900));
    assert!(world.aborted.is_empty(), "samples may finish until shortly before the deadline");
    assert_eq!(world.ends(), [(2, Why::Busy, 0), (0, Why::Length, 1)]);
    world.say(to_agent::Kind::BeatAck(pb::BeatAck { seq: 1 }));
    world.pass(Duration::from_millis(200));
    assert_eq!(world.aborted, [slow]);
    world.tokens(slow, &[4, 4]);
    world.ack();
    assert_eq!((world.mode_done(), &world.exit), (None, &None), "its terminal chunk is not here");
    world.finish(slow, Finish::Aborted);
    assert_eq!(world.ends().last(), Some(&(1, Why::Aborted, 2)), "sent without waiting for a tick");
    assert_eq!(world.exit, None, "the last tick is not acknowledged");
    world.ack();
    assert!(world.mode_done().is_some_and(|done| done.drained && done.order == 50));
    assert_eq!(world.exit, Some(ExitReason::Drained));
}

#[test]
fn a_drain_whose_engine_is_stuck_ends_a_while_after_its_deadline() {
    let mut world = World::ready();
    world.start(0, 1);
    world.drain_order(1000);
    for _ in 0..6 {
        world.pass(Duration::from_secs(1));
        if world.exit.is_none() {
            world.say(to_agent::Kind::BeatAck(pb::BeatAck { seq: 1 }));
        }
    }
    assert!(
        matches!(world.exit, Some(ExitReason::DrainCut { running: 1, .. })),
        "{:?}",
        world.exit
    );
    assert!(world.mode_done().is_some_and(|done| !done.ok));
}

#[test]
fn a_sigterm_before_any_manager_was_found_just_ends() {
    let mut world = World::new(1 << 20);
    let within = Duration::from_secs(30);
    world.handle(Event::LeaveAsked { why: "SIGTERM".into(), within });
    assert_eq!(world.exit, Some(ExitReason::Drained));
}
