//! Samples through the whole driver: in by a trainer, made by scripted agents, out in batches; and what
//! happens when links break on the way.

mod common;

use std::time::Duration;

use anabranch_manager::core::config::CoreConfig;
use anabranch_proto::limits::FRAME_BYTES;
use anabranch_proto::pb::{self, data_to_agent, end::Why, from_agent, from_consumer, to_agent};
use anabranch_proto::tokens::encode_ids;
use common::*;

#[tokio::test]
async fn groups_go_in_and_their_trajectories_come_out_and_are_forgotten_at_commit() {
    let manager = start(raw()).await;
    let channel = channel(&manager).await;
    let agent = Agent::attach(channel.clone(), hello("e1")).await;
    let serving = tokio::task::LocalSet::new();
    let mut trainer = Trainer::open(channel).await;
    let mut consumer =
        trainer.consume(pb::Pack { min: 4, multiple_of: 4, ..Default::default() }).await;
    let test = async {
        let submitted = trainer.submit(1, vec![group("a", 4, 30), group("b", 4, 50)]).await;
        let results = submitted.expect("taken").results;
        assert!(results.iter().all(|r| r.kind() == pb::submitted::result::Kind::Accepted));
        let again = trainer.submit(1, vec![group("a", 4, 30)]).await.expect("taken").results;
        assert_eq!(again[0].kind(), pb::submitted::result::Kind::Duplicate);

        let mut batches = vec![consumer.batch().await];
        while !batches[batches.len() - 1].last_of_step {
            batches.push(consumer.batch().await);
        }
        assert!(batches.iter().map(|batch| batch.seq).eq(1..=batches.len() as u64));
        assert!(batches.iter().all(|batch| batch.trajectories.len() % 4 == 0));
        let last = batches.len() as u64;
        let mut all: Vec<_> = batches.into_iter().flat_map(|batch| batch.trajectories).collect();
        all.sort_by_key(|t| (t.key.clone(), t.index));
        assert_eq!(all.len(), 8);
        for trajectory in &all {
            check_exact(trajectory, if trajectory.key == "a" { 30 } else { 50 });
            assert_eq!(trajectory.finish(), pb::trajectory::Finish::Length);
            let engine = trajectory.spans[0].engine.as_ref().expect("named");
            assert_eq!((engine.id.as_str(), engine.incarnation), ("e1", 1));
        }
        let done = consumer.step_done().await;
        assert_eq!((done.step, done.delivered, done.tokens), (1, 8, 4 * 80));

        let pages = state(manager.local_addr()).await["ledger"]["pages"].clone();
        assert_eq!(pages, 8);
        consumer.say(from_consumer::Kind::Ack(pb::Ack { seq: last })).await;
        consumer.say(from_consumer::Kind::Commit(pb::Commit { seq: last, version: None })).await;
        let forgotten = |state: &serde_json::Value| state["ledger"]["pages"] == 0;
        until(manager.local_addr(), "forgotten", forgotten).await;
    };
    serving.spawn_local(agent.serve());
    serving.run_until(test).await;
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn a_link_that_comes_back_in_time_keeps_its_samples_and_repeated_ticks_count_once() {
    let manager = start(raw()).await;
    let mut trainer = Trainer::open(channel(&manager).await).await;
    let mut consumer = trainer.consume(pb::Pack::default()).await;
    let mut agent = Agent::attach(channel(&manager).await, hello("e1")).await;
    trainer.submit(1, vec![group("a", 1, 100)]).await.expect("taken");
    let started = agent.next_start().await;
    let first = agent.make(&started.start, 0, 40, None).await;
    agent.until_acked(first.seq).await;
    let session = agent.welcome.session;
    drop(agent);
    let suspect = |state: &serde_json::Value| state["engines"][0]["state"] == "suspect";
    until(manager.local_addr(), "suspect", suspect).await;

    let sample = started.start.sample;
    let held = pb::Held { sample, attempt: started.start.attempt, upto: 60 };
    let back = pb::Hello { resume_session: session, held: vec![held], ..hello("e1") };
    let mut agent = Agent::attach(channel(&manager).await, back).await;
    assert_eq!(agent.welcome.session, session);
    assert_eq!(agent.welcome.acked_tick, first.seq);
    assert_eq!((agent.welcome.keep.len(), agent.welcome.drop.len()), (1, 0));
    // It could not know that this one had arrived.
    agent.send(first).await;
    agent.make(&started.start, 40, 100, Some(Why::Length)).await;
    let batch = consumer.batch().await;
    check_exact(&batch.trajectories[0], 100);
    assert_eq!(batch.trajectories[0].attempts, 1);
    let state = state(manager.local_addr()).await;
    assert_eq!(state["counters"]["migrations"], 0);
    assert_eq!(
        (&state["ledger"]["tokens"], &state["ledger"]["repeated_tokens"]),
        (&100.into(), &40.into())
    );
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn a_lost_engines_samples_go_on_elsewhere_with_their_tokens() {
    let core = CoreConfig { reattach_grace_ms: 200, ..CoreConfig::default() };
    let manager = start(anabranch_manager::RawConfig { core, ..raw() }).await;
    let mut trainer = Trainer::open(channel(&manager).await).await;
    let mut consumer = trainer.consume(pb::Pack::default()).await;
    let mut dying = Agent::attach(channel(&manager).await, hello("e1")).await;
    trainer.submit(1, vec![group("a", 1, 100)]).await.expect("taken");
    let started = dying.next_start().await;
    let tick = dying.make(&started.start, 0, 64, None).await;
    dying.until_acked(tick.seq).await;
    drop(dying);

    let mut other = Agent::attach(channel(&manager).await, hello("e2")).await;
    let resumed = other.next_start().await;
    assert_eq!(resumed.prompt, [5, 6, 7]);
    assert_eq!((resumed.start.offset, resumed.start.kept.len()), (64, 64 * 4));
    assert_eq!(resumed.start.sampling.as_ref().expect("set").max_tokens, 36);
    assert!(resumed.start.attempt > started.start.attempt);
    other.finish(&resumed.start).await;
    let batch = consumer.batch().await;
    check_exact(&batch.trajectories[0], 100);
    let engines: Vec<&str> = batch.trajectories[0]
        .spans
        .iter()
        .map(|span| span.engine.as_ref().expect("named").id.as_str())
        .collect();
    assert_eq!(engines, ["e1", "e2"]);
    let (_, metrics) = get(manager.local_addr(), "/metrics").await;
    assert!(metrics.contains("anabranch_delivery_seconds_count 1"), "{metrics}");
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn a_malformed_tick_costs_the_link_and_not_the_sample() {
    let manager = start(raw()).await;
    let mut trainer = Trainer::open(channel(&manager).await).await;
    let mut consumer = trainer.consume(pb::Pack::default()).await;
    let mut agent = Agent::attach(channel(&manager).await, hello("e1")).await;
    trainer.submit(1, vec![group("a", 1, 20)]).await.expect("taken");
    let started = agent.next_start().await;
    agent.make(&started.start, 0, 8, None).await;
    let bad = pb::Tick { tokens: vec![0; 6].into(), ..tick(2, &started.start, 8, 16, None) };
    agent.send(bad).await;
    let ended = within("the end of the link", async {
        loop {
            match agent.order().await {
                Ok(Some(_)) => {}
                other => return other,
            }
        }
    });
    assert!(!matches!(ended.await, Ok(Some(_))));
    let session = agent.welcome.session;
    drop(agent);
    let held = pb::Held { sample: started.start.sample, attempt: started.start.attempt, upto: 16 };
    let back = pb::Hello { resume_session: session, held: vec![held], ..hello("e1") };
    let mut agent = Agent::attach(channel(&manager).await, back).await;
    assert_eq!(agent.welcome.acked_tick, 2, "the bad tick is not asked for again");
    // What it made after the tick that is missing leaves a gap: the sample starts again from what is kept.
    agent.make(&started.start, 16, 20, Some(Why::Length)).await;
    let again = agent.next_start().await;
    assert_eq!(again.start.offset, 8);
    agent.finish(&again.start).await;
    check_exact(&consumer.batch().await.trajectories[0], 20);
    let (_, metrics) = get(manager.local_addr(), "/metrics").await;
    assert!(metrics.contains("anabranch_bad_ticks_total 1"), "{metrics}");
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn a_long_prompt_crosses_once_in_frames() {
    let manager = start(raw()).await;
    let mut trainer = Trainer::open(channel(&manager).await).await;
    let mut agent = Agent::attach(channel(&manager).await, hello("e1")).await;
    let prompt: Vec<u32> = (0..150_000).map(|n| n % 1999).collect();
    let long = pb::Group { prompt: encode_ids(&prompt), ..group("a", 2, 4) };
    trainer.submit(1, vec![long]).await.expect("taken");
    let (mut parts, mut starts) = (0, Vec::new());
    within("two starts", async {
        while starts.len() < 2 {
            match agent.next_work().await {
                data_to_agent::Kind::Prompt(part) => {
                    assert!(part.ids.len() <= FRAME_BYTES);
                    parts += 1;
                }
                data_to_agent::Kind::Start(start) => {
                    // The prefix is cached now: the sibling may come.
                    agent.make(&start, 0, 1, None).await;
                    starts.push(start);
                }
                _ => {}
            }
        }
    })
    .await;
    assert_eq!(parts, (prompt.len() * 4).div_ceil(FRAME_BYTES));
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn beats_are_acknowledged_and_a_report_of_death_moves_the_samples() {
    let manager = start(raw()).await;
    let mut trainer = Trainer::open(channel(&manager).await).await;
    let mut agent = Agent::attach(channel(&manager).await, hello("e1")).await;
    agent.say(from_agent::Kind::Beat(pb::Beat { seq: 9, ..Default::default() })).await;
    let Ok(Some(to_agent::Kind::BeatAck(ack))) = agent.order().await else { panic!("no ack") };
    assert_eq!(ack.seq, 9);
    trainer.submit(1, vec![group("a", 1, 10)]).await.expect("taken");
    let started = agent.next_start().await;
    let tick = agent.make(&started.start, 0, 5, None).await;
    agent.until_acked(tick.seq).await;
    let down = pb::EngineDown { why: "out of memory".into(), will_restart: false };
    agent.say(from_agent::Kind::EngineDown(down)).await;
    let mut other = Agent::attach(channel(&manager).await, hello("e2")).await;
    assert_eq!(other.next_start().await.start.offset, 5);
    manager.stop().await.expect("stopped");
}

/// One thread for everything: while it is blocked, the whole process stands still, as under SIGSTOP.
#[tokio::test(flavor = "current_thread")]
async fn a_manager_that_was_stopped_itself_does_not_blame_its_engines() {
    let core = CoreConfig { lease_ms: 500, reattach_grace_ms: 100, ..CoreConfig::default() };
    let manager = start(anabranch_manager::RawConfig { core, ..raw() }).await;
    let _agent = Agent::attach(channel(&manager).await, hello("e1")).await;
    let (_, before) = get(manager.local_addr(), "/metrics").await;
    assert!(before.contains("anabranch_manager_stopped_milliseconds_total 0"));
    #[allow(clippy::disallowed_methods)]
    std::thread::sleep(Duration::from_millis(1_500));
    let state = state(manager.local_addr()).await;
    assert_eq!(state["engines"][0]["state"], "joining", "{state:#}");
    let (_, after) = get(manager.local_addr(), "/metrics").await;
    let stopped =
        after.lines().find(|line| line.starts_with("anabranch_manager_stopped")).expect("there");
    let ms: u64 = stopped.rsplit(' ').next().expect("a value").parse().expect("a number");
    assert!((900..5_000).contains(&ms), "{stopped}");
    manager.stop().await.expect("stopped");
}
