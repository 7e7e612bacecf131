//! The link to the manager: what goes out and when, and what a re-attach or a new session keeps.

use super::*;

#[test]
fn tokens_go_out_once_a_tick_with_their_offsets_and_then_the_end() {
    let mut world = World::ready();
    let attempt = world.start(0, 1);
    world.tokens(attempt, &[3, 4]);
    assert!(world.ticks.is_empty(), "not before the tick");
    world.tokens(attempt, &[5]);
    world.pass(TICK);
    world.tokens(attempt, &[6]);
    world.finish(attempt, Finish::StopId);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![3, 4, 5]), (0, 0, vec![6])]);
    assert_eq!(world.ticks[1].segs[0].offset, 3);
    assert_eq!(world.ends(), [(0, Why::StopId, 4)]);
}

#[test]
fn a_re_attach_keeps_and_drops_exactly_and_sends_the_unacknowledged_again() {
    let mut world = World::ready();
    let (kept, dropped, ended) = (world.start(0, 1), world.start(1, 1), world.start(2, 1));
    world.tokens(kept, &[3]);
    world.pass(TICK);
    world.ack();
    world.tokens(ended, &[4, 4]);
    world.finish(ended, Finish::Length);
    world.pass(TICK);
    world.lose_link();
    world.tokens(kept, &[5]);
    world.tokens(dropped, &[6]);
    world.pass(Duration::from_secs(1));
    let hello = world.hellos.last().expect("dialled again").clone();
    assert_eq!(hello.resume_session, 1);
    let held: Vec<(u32, u32)> =
        hello.held.iter().map(|held| (held.sample.expect("s").index, held.upto)).collect();
    assert_eq!(held, [(0, 2), (1, 1), (2, 2)], "running ones, and one whose end may be lost");
    world.ticks.clear();
    let keep = vec![hello.held[0], hello.held[2]];
    world.attach(pb::Welcome { keep, acked_tick: 1, ..welcome(1) });
    assert_eq!(world.ticks.first().map(|tick| tick.seq), Some(2), "from the first unacknowledged");
    assert_eq!(world.ends(), [(2, Why::Length, 2)]);
    assert_eq!(world.aborted, [dropped]);
    world.tokens(dropped, &[7]);
    world.tokens(kept, &[8]);
    world.finish(dropped, Finish::Aborted);
    world.pass(TICK);
    assert_eq!(world.segs().last(), Some(&(0, 0, vec![8])), "nothing more of the dropped one");
}

#[test]
fn a_new_session_drops_everything_of_the_old_one() {
    let mut world = World::ready();
    let attempt = world.start(0, 1);
    world.tokens(attempt, &[3]);
    world.lose_link();
    world.pass(Duration::from_secs(1));
    world.attach(pb::Welcome { manager_epoch: 2, ..welcome(1) });
    assert_eq!(world.aborted, [attempt]);
    world.tokens(attempt, &[4]);
    world.finish(attempt, Finish::Aborted);
    world.pass(TICK);
    assert!(world.ticks.is_empty());
    let next = world.start(0, 2);
    world.tokens(next, &[5]);
    world.pass(TICK);
    assert_eq!(world.ticks[0].seq, 1, "ticks count from 1 in each session");
}

#[test]
fn a_silent_manager_is_left_after_a_lease_and_dialled_again_ever_more_slowly() {
    let mut world = World::ready();
    world.pass(Duration::from_millis(2900));
    assert_eq!(world.hellos.len(), 1);
    world.pass(Duration::from_millis(400));
    assert_eq!(world.hellos.len(), 2, "the lease is 3 s");
    for _ in 0..3 {
        world.lose_link();
        world.pass(Duration::from_millis(100));
        assert!(world.link.is_none(), "backs off");
        world.pass(Duration::from_secs(5));
        assert!(world.link.is_some(), "but not for ever");
    }
}

#[test]
fn beats_go_out_three_times_a_lease() {
    let mut world = World::ready();
    for _ in 0..3 {
        world.pass(Duration::from_secs(1));
        world.say(to_agent::Kind::BeatAck(pb::BeatAck { seq: 1 }));
    }
    let beats = world.control.iter().filter(|kind| matches!(kind, from_agent::Kind::Beat(_)));
    assert_eq!(beats.count(), 3);
}

#[test]
fn a_full_buffer_gives_back_the_newest_samples_and_takes_no_new_ones() {
    let mut world = World::ready_with(400);
    let attempts: Vec<AttemptId> = (0..4).map(|index| world.start(index, 1)).collect();
    world.lose_link();
    for round in 0..8u32 {
        for attempt in &attempts {
            world.tokens(*attempt, &[round + 10; 4]);
        }
        world.pass(TICK);
    }
    assert_eq!(world.aborted.first(), Some(&attempts[3]), "the newest first");
    world.pass(Duration::from_secs(1));
    let held = world.hellos.last().expect("dialled").held.clone();
    world.attach(pb::Welcome { keep: held, ..welcome(1) });
    world.order_start(9, 1);
    world.pass(TICK);
    let ends = world.ends();
    assert!(ends.iter().any(|(index, why, _)| (*index, *why) == (3, Why::Busy)), "{ends:?}");
    assert!(ends.iter().any(|(index, why, _)| (*index, *why) == (9, Why::Busy)), "{ends:?}");
    world.ack();
    world.start(10, 1);
}
