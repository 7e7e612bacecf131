// One range is a set of chunks here, not a mistake for its members.
#![allow(clippy::single_range_in_vec_init, clippy::collapsible_match)]

use proptest::prelude::*;

use super::*;

fn rules() -> QueueRules {
    QueueRules {
        strikes: 3,
        rest: Duration::from_millis(100),
        rescue_after: Duration::from_secs(1),
        stuck_after: Duration::from_secs(4),
    }
}

fn queue(chunks: u32, sources: usize) -> ChunkQueue {
    let mut queue = ChunkQueue::new(
        rules(),
        &ChunkSet::empty(chunks),
        sources,
        &StripePlan::default(),
        Instant::now(),
    );
    for source in 0..sources {
        queue.learned_all(source);
    }
    queue
}

#[test]
fn streams_spread_over_sources_and_a_refused_source_is_left_for_good() {
    let now = Instant::now();
    let mut q = queue(10, 2);
    assert_eq!(q.assign(0, now), Assign::To(0));
    assert_eq!(q.assign(1, now), Assign::To(1));
    assert_eq!(q.assign(2, now), Assign::To(0));
    q.lost(0, now, "wrong grant", true);
    q.release(2);
    assert_eq!(q.assign(0, now), Assign::To(1));
    assert_eq!(q.dropped(), [(0, "wrong grant".to_owned())]);
    q.lost(1, now, "gone", true);
    q.release(0);
    assert_eq!(q.assign(0, now), Assign::None);
}

#[test]
fn a_failed_source_rests_longer_each_time_until_it_is_dropped() {
    let t0 = Instant::now();
    let mut q = queue(10, 1);
    for (at_ms, rest_ms) in [(0, 100), (100, 200)] {
        let now = t0 + Duration::from_millis(at_ms);
        assert_eq!(q.assign(0, now), Assign::To(0));
        q.lost(0, now, "reset", false);
        assert_eq!(q.assign(0, now), Assign::Wait(now + Duration::from_millis(rest_ms)));
    }
    let now = t0 + Duration::from_secs(1);
    assert_eq!(q.assign(0, now), Assign::To(0));
    q.lost(0, now, "reset", false);
    assert_eq!(q.assign(0, now), Assign::None);
}

#[test]
fn streams_do_not_all_wait_at_a_source_that_has_nothing_more_to_give() {
    let t0 = Instant::now();
    let mut q = queue(1, 2);
    q.assign(0, t0);
    q.assign(1, t0);
    assert_eq!(q.take(0, t0), Take::Chunk(0));
    q.bad(0, 0, t0);
    // The other source fails once: its stream finds the first one live, and waits there too.
    q.lost(1, t0, "reset", false);
    q.release(0);
    let both: Vec<Assign> = (0..2).map(|id| q.assign(id, t0)).collect();
    assert!(both.iter().all(|a| matches!(a, Assign::Wait(_))), "both rest: {both:?}");
    let later = t0 + Duration::from_secs(1);
    assert_eq!(q.assign(0, later), Assign::To(0));
    assert_eq!(q.take(0, later), Take::Leave, "the other one has it, and nobody asks there");
    assert_eq!(q.assign(1, later), Assign::To(1));
    assert_eq!(q.take(0, later), Take::Wait);
    assert_eq!(q.take(1, later), Take::Chunk(0));
}

#[test]
fn a_source_that_failed_often_is_tried_again_while_another_one_lives() {
    let t0 = Instant::now();
    let mut q = ChunkQueue::new(rules(), &ChunkSet::empty(4), 2, &StripePlan::default(), t0);
    q.learned_all(0);
    for round in 0..10 {
        let now = t0 + Duration::from_secs(10 * round);
        // The other one lives, and has nothing.
        let to = [q.assign(0, now), q.assign(1, now)];
        let failing = to.iter().position(|to| *to == Assign::To(0)).expect("it has another try");
        q.lost(failing, now, "refused by the host", false);
        q.release(1 - failing);
    }
    assert_eq!(q.dropped(), []);
    let now = t0 + Duration::from_secs(100);
    let to = [q.assign(0, now), q.assign(1, now)];
    let there = to.iter().position(|to| *to == Assign::To(0)).expect("it has another try");
    assert!(matches!(q.take(there, now), Take::Chunk(_)));
}

#[test]
fn a_wrong_chunk_is_asked_from_another_source() {
    let now = Instant::now();
    let mut q = queue(1, 2);
    q.assign(0, now);
    q.assign(1, now);
    assert_eq!(q.take(0, now), Take::Chunk(0));
    q.bad(0, 0, now);
    assert_eq!(q.take(0, now), Take::Wait);
    assert_eq!(q.take(1, now), Take::Chunk(0));
    assert!(q.verified(1, 0, now) && q.is_done());
    assert_eq!(q.stats().bad_chunks, 1);
}

#[test]
fn an_idle_stream_takes_over_from_one_that_holds_up_the_end() {
    let t0 = Instant::now();
    let mut q = queue(2, 2);
    q.assign(0, t0);
    q.assign(1, t0);
    let Take::Chunk(first) = q.take(0, t0) else { panic!("a chunk") };
    let Take::Chunk(second) = q.take(1, t0) else { panic!("a chunk") };
    let later = t0 + Duration::from_secs(1);
    assert!(q.verified(1, second, later));
    assert_eq!(q.take(1, t0 + Duration::from_millis(900)), Take::Wait);
    assert_eq!(q.take(1, later), Take::Rescue(0));
    q.release(0);
    assert_eq!(q.take(1, later), Take::Chunk(first));
    assert!(!q.verified(0, first, later), "the old owner's word no longer counts");
}

#[test]
fn a_source_that_is_still_receiving_is_asked_only_for_what_it_has() {
    let now = Instant::now();
    let mut q = ChunkQueue::new(rules(), &ChunkSet::empty(100), 1, &StripePlan::default(), now);
    q.assign(0, now);
    assert_eq!(q.take(0, now), Take::Wait);
    q.learned(0, &[7..9]);
    assert_eq!([q.take(0, now), q.take(0, now)], [Take::Chunk(7), Take::Chunk(8)]);
    assert_eq!(q.take(0, now), Take::Wait);
}

/// Sources 0 and 1 are the planned parents of two stripes, source 2 is the last resort.
fn planned(chunks: u32, now: Instant) -> ChunkQueue {
    let plan = StripePlan {
        stripe_count: 2,
        stripes: vec![vec![0], vec![1], vec![]],
        ..Default::default()
    };
    let mut queue = ChunkQueue::new(rules(), &ChunkSet::empty(chunks), 3, &plan, now);
    (0..3).for_each(|source| queue.learned_all(source));
    queue
}

#[test]
fn each_planned_parent_gives_its_stripe_and_the_last_resort_nothing() {
    let now = Instant::now();
    let mut q = planned(8, now);
    assert_eq!([q.assign(0, now), q.assign(1, now)], [Assign::To(0), Assign::To(1)]);
    assert_eq!([q.assign(2, now), q.assign(3, now)], [Assign::To(0), Assign::To(1)]);
    let mut taken = |stream| [q.take(stream, now), q.take(stream, now)];
    assert_eq!(taken(0), [Take::Chunk(0), Take::Chunk(2)]);
    assert_eq!(taken(1), [Take::Chunk(1), Take::Chunk(3)]);
    assert_eq!(taken(2), [Take::Chunk(4), Take::Chunk(6)]);
    assert_eq!(taken(3), [Take::Chunk(5), Take::Chunk(7)]);
}

#[test]
fn a_dead_parents_stripe_goes_first_to_those_that_may_stand_in_for_it() {
    let now = Instant::now();
    let plan = StripePlan {
        stripe_count: 2,
        stripes: vec![vec![0], vec![1], vec![], vec![]],
        fallbacks: vec![vec![], vec![], vec![0], vec![0, 1]],
        ..StripePlan::default()
    };
    let mut q = ChunkQueue::new(rules(), &ChunkSet::empty(8), 4, &plan, now);
    assert_eq!([q.assign(0, now), q.assign(1, now)], [Assign::To(0), Assign::To(1)]);
    q.lost(1, now, "gone", true);
    assert_eq!(q.assign(1, now), Assign::To(3), "not to one that may stand below us");
    q.lost(1, now, "gone", true);
    assert_eq!(q.assign(1, now), Assign::To(0), "nobody else is left for its stripe");
}

#[test]
fn a_source_that_cost_silence_is_not_tried_again_soon_while_another_lives() {
    let t0 = Instant::now();
    let plan = StripePlan { stripe_count: 1, stripes: vec![vec![0], vec![]], ..Default::default() };
    let mut q = ChunkQueue::new(rules(), &ChunkSet::empty(4), 2, &plan, t0);
    assert_eq!(q.assign(0, t0), Assign::To(0));
    let late = t0 + Duration::from_secs(3);
    q.lost(0, late, "no progress", false);
    assert_eq!(q.assign(0, late), Assign::To(1), "the next of the list");
    q.learned_all(1);
    assert_eq!(q.take(0, late + Duration::from_secs(1)), Take::Chunk(0), "and it keeps the stripe");
    q.lost(0, late, "refused", true);
    let soon = late + rules().rest;
    assert_eq!(q.assign(0, late), Assign::Wait(soon), "now it is needed");
    assert_eq!(q.assign(0, soon), Assign::To(0));
}

#[test]
fn a_source_in_charge_never_stays_without_a_stream_while_another_has_two() {
    let t0 = Instant::now();
    let mut q = planned(80, t0);
    assert_eq!([q.assign(0, t0), q.assign(1, t0)], [Assign::To(0), Assign::To(1)]);
    q.lost(0, t0, "reset", false);
    assert_eq!(q.assign(0, t0), Assign::To(1));
    let rested = t0 + rules().rest;
    assert_eq!(q.take(0, rested), Take::Leave, "its first parent is to be tried again");
    q.release(0);
    assert_eq!(q.assign(0, rested), Assign::To(0));
    assert!(matches!(q.take(1, rested), Take::Chunk(_)));
}

#[test]
fn a_dead_parents_stripe_goes_to_the_next_source_and_back_when_it_lives() {
    let t0 = Instant::now();
    let mut q = planned(8, t0);
    q.assign(0, t0);
    q.assign(1, t0);
    q.lost(1, t0, "reset", false);
    // Source 0 has the chunks of the other stripe as well and is nearer than the last resort.
    assert_eq!(q.assign(1, t0), Assign::To(0));
    assert_eq!([q.take(1, t0), q.take(1, t0)], [Take::Chunk(0), Take::Chunk(1)]);
    let rested = t0 + Duration::from_millis(100);
    assert_eq!(q.assign(2, rested), Assign::To(1));
    assert_eq!(q.take(1, rested), Take::Chunk(2), "of the stripe that source 0 keeps");
    assert_eq!(q.take(2, rested), Take::Chunk(3));
}

#[test]
fn a_living_parent_that_gives_nothing_loses_its_stripe_after_a_while() {
    let t0 = Instant::now();
    let plan = StripePlan { stripe_count: 1, stripes: vec![vec![0], vec![]], ..Default::default() };
    let mut q = ChunkQueue::new(rules(), &ChunkSet::empty(4), 2, &plan, t0);
    q.learned_all(1);
    assert_eq!(q.assign(0, t0), Assign::To(0));
    assert_eq!(q.take(0, t0 + Duration::from_secs(3)), Take::Wait);
    let later = t0 + Duration::from_secs(4);
    assert_eq!(q.take(0, later), Take::Leave);
    q.release(0);
    assert_eq!(q.assign(0, later), Assign::To(1));
    assert_eq!(q.take(0, later), Take::Chunk(0));
}

#[test]
fn a_parent_that_has_not_begun_is_asked_again_and_never_blamed() {
    let t0 = Instant::now();
    let mut q = queue(4, 1);
    for round in 0..20 {
        let now = t0 + Duration::from_secs(round);
        assert_eq!(q.assign(0, now), Assign::To(0));
        q.not_ready(0, now);
        assert!(matches!(q.assign(0, now), Assign::Wait(_)));
    }
    assert_eq!((q.dropped(), q.stats().lost_streams), (vec![], 0));
}

#[test]
fn a_busy_stream_of_a_dropped_source_gets_no_more_work() {
    let (mut q, now) = (queue(20, 1), Instant::now());
    assert_eq!(q.assign(0, now), Assign::To(0));
    let took: Vec<Take> = (0..4).map(|_| q.take(0, now)).collect();
    for take in &took[..3] {
        let Take::Chunk(index) = *take else { panic!("{took:?}") };
        q.bad(0, index, now);
    }
    assert!(q.is_dropped(0));
    assert_eq!(q.take(0, now), Take::Leave, "one chunk is on its way still");
}

proptest! {
    /// Whatever fails in whatever order, no chunk is lost, held twice or taken by two streams.
    #[test]
    fn chunks_are_neither_lost_nor_shared(
        ops in proptest::collection::vec((0usize..5, 0usize..4, any::<prop::sample::Index>()), 1..300),
    ) {
        let t0 = Instant::now();
        let mut q = queue(20, 3);
        let mut holds: BTreeMap<StreamId, Vec<u32>> = BTreeMap::new();
        let mut verified = BTreeSet::new();
        for (step, (op, stream, pick)) in ops.into_iter().enumerate() {
            let now = t0 + Duration::from_millis(step as u64 * 40);
            let mine = holds.entry(stream).or_default();
            match op {
                0 => { if !q.streams.contains_key(&stream) { q.assign(stream, now); } }
                1 => if let Take::Chunk(ix) = q.take(stream, now) { mine.push(ix); },
                2 if !mine.is_empty() => {
                    let ix = mine.swap_remove(pick.index(mine.len()));
                    prop_assert!(q.verified(stream, ix, now));
                    prop_assert!(verified.insert(ix));
                }
                3 if !mine.is_empty() => q.bad(stream, mine.swap_remove(pick.index(mine.len())), now),
                4 => { q.lost(stream, now, "reset", false); mine.clear(); }
                _ => {}
            }
            let held: usize = holds.values().map(Vec::len).sum();
            prop_assert_eq!(held, q.taken.len());
            prop_assert_eq!(q.missing.count() as usize + held + verified.len(), 20);
        }
    }
}

/// Senders of parts at 0 and 1, and at 2 one that has everything and may stand in.
fn senders(chunks: u32, stripes: u32) -> ChunkQueue {
    let all: Vec<u32> = (0..stripes).collect();
    let plan = StripePlan {
        stripe_count: stripes,
        stripes: vec![all.clone(), all.clone(), vec![]],
        fallbacks: vec![vec![], vec![], all],
        origins: vec!["trainer".into(), "trainer".into(), String::new()],
    };
    let mut q = ChunkQueue::new(rules(), &ChunkSet::empty(chunks), 3, &plan, Instant::now());
    q.learned(0, &[0..chunks / 2]);
    q.learned(1, &[chunks / 2..chunks]);
    q.learned_all(2);
    q
}

/// Takes chunks for the stream, each verified at once, until there is none.
fn drain(q: &mut ChunkQueue, stream: StreamId, now: Instant) -> (Vec<u32>, Take) {
    let mut got = Vec::new();
    loop {
        match q.take(stream, now) {
            Take::Chunk(index) => {
                assert!(q.verified(stream, index, now));
                got.push(index);
            }
            other => return (got, other),
        }
    }
}

#[test]
fn senders_of_one_origin_each_give_what_they_have_of_its_stripes() {
    let now = Instant::now();
    for stripes in [1, 2, 3] {
        let mut q = senders(12, stripes);
        assert_eq!((q.assign(0, now), q.assign(1, now)), (Assign::To(0), Assign::To(1)));
        let (mut got, then) = drain(&mut q, 0, now);
        got.sort_unstable();
        assert_eq!((got, then), ((0..6).collect(), Take::Leave), "{stripes} stripes");
        q.release(0);
        assert_eq!(q.assign(0, now), Assign::To(1), "the first one has given all that it has");
        let (mut got, then) = drain(&mut q, 1, now);
        got.sort_unstable();
        assert_eq!((got, then), ((6..12).collect(), Take::Done), "{stripes} stripes");
    }
}

#[test]
fn what_only_a_lost_sender_had_comes_from_the_next_of_the_list_at_once() {
    let now = Instant::now();
    let mut q = senders(12, 2);
    assert_eq!((q.assign(0, now), q.assign(1, now)), (Assign::To(0), Assign::To(1)));
    assert_eq!(q.take(1, now), Take::Chunk(6));
    q.lost(1, now, "gone", true);
    // The origin keeps its stripes for as long as one of its senders has something for them.
    assert_eq!(q.assign(1, now), Assign::To(0));
    q.release(1);
    assert_eq!(drain(&mut q, 0, now).1, Take::Leave);
    q.release(0);
    assert_eq!(q.assign(0, now), Assign::To(2));
    let (mut got, then) = drain(&mut q, 0, now);
    got.sort_unstable();
    assert_eq!((got, then), ((6..12).collect(), Take::Done));
}

#[test]
fn a_sender_that_has_not_said_what_it_has_is_asked() {
    let now = Instant::now();
    let plan = StripePlan {
        stripe_count: 1,
        stripes: vec![vec![0], vec![0]],
        origins: vec!["trainer".into(), "trainer".into()],
        ..StripePlan::default()
    };
    let mut q = ChunkQueue::new(rules(), &ChunkSet::empty(2), 2, &plan, now);
    assert_eq!(q.assign(0, now), Assign::To(0));
    assert_eq!(q.take(0, now), Take::Wait);
    // It has nothing of it.
    q.learned(0, &[]);
    assert_eq!(q.take(0, now), Take::Leave);
    q.release(0);
    assert_eq!(q.assign(0, now), Assign::To(1));
    q.learned_all(1);
    assert_eq!(drain(&mut q, 0, now), (vec![0, 1], Take::Done));
}

#[test]
fn without_a_plan_streams_leave_a_sender_that_has_given_all_it_has() {
    let now = Instant::now();
    let plan = StripePlan { origins: vec!["t".into(), "t".into()], ..StripePlan::default() };
    let mut q = ChunkQueue::new(rules(), &ChunkSet::empty(8), 2, &plan, now);
    q.learned(0, &[0..2]);
    q.learned(1, &[2..8]);
    for stream in 0..4 {
        assert_eq!(q.assign(stream, now), Assign::To(stream % 2));
    }
    assert_eq!(drain(&mut q, 0, now).1, Take::Leave);
    assert_eq!(q.take(2, now), Take::Leave);
    q.release(0);
    q.release(2);
    assert_eq!((q.assign(0, now), q.assign(2, now)), (Assign::To(1), Assign::To(1)));
    q.lost(0, now, "reset", false);
    assert!(matches!(q.assign(0, now), Assign::Wait(_)), "the other has nothing, this one rests");
}

proptest! {
    /// Whatever parts there are and whoever is lost: while somebody live has a chunk, streams get it, with
    /// no more patience than it takes to be assigned again.
    #[test]
    fn parts_in_any_order_give_everything_that_a_live_source_has(
        chunks in 1u32..40,
        stripes in 0u32..4,
        parts in proptest::collection::vec(proptest::collection::vec(any::<bool>(), 40), 1..4),
        lost in proptest::option::of(0usize..3),
    ) {
        let now = Instant::now();
        let (senders, all): (usize, Vec<u32>) = (parts.len(), (0..stripes).collect());
        let plan = StripePlan {
            stripe_count: stripes,
            stripes: vec![all.clone(); senders],
            fallbacks: Vec::new(),
            origins: vec!["trainer".into(); senders],
        };
        // The last source has everything, and is nobody's parent.
        let mut q = ChunkQueue::new(rules(), &ChunkSet::empty(chunks), senders + 1, &plan, now);
        for (sender, has) in parts.iter().enumerate() {
            let one = |ix: u32| has[ix as usize].then_some(ix..ix + 1);
            q.learned(sender, &(0..chunks).filter_map(one).collect::<Vec<_>>());
        }
        q.learned_all(senders);
        if let Some(lost) = lost.filter(|lost| *lost < senders) {
            // One that has nothing is never asked, so it cannot be lost.
            let its = (100..110).find(|stream| q.assign(*stream, now) == Assign::To(lost));
            if let Some(stream) = its {
                q.lost(stream, now, "gone", true);
            }
            for stream in 100..110 {
                q.release(stream);
            }
        }
        for _ in 0..4 * senders * (stripes as usize + 1) + 4 {
            match q.assign(0, now) {
                Assign::Done => break,
                Assign::To(_) => {}
                other => panic!("{other:?} while one that has everything lives"),
            }
            let then = drain(&mut q, 0, now).1;
            q.release(0);
            prop_assert!(matches!(then, Take::Leave | Take::Done), "{:?}", then);
        }
        prop_assert!(q.is_done());
    }
}
