//! The SDK against a scripted manager over real gRPC: lost links, a full manager, forgotten sessions.

mod fake;

use std::time::Duration;

use anabranch_trainer::{
    BatchSeq, Client, DType, Delivery, Error, Group, JobConfig, Outcome, Pack, Sampling, Shard,
    Step, TensorRef, Version, VersionState, Window,
};
use fake::{Fake, Heard, Say};

const SOON: Duration = Duration::from_secs(20);

async fn job(fake: &Fake) -> anabranch_trainer::Job {
    let client = Client::connect(&fake.url(), None).await.expect("the fake listens");
    client.open(JobConfig::new("j")).await.expect("opened")
}

fn group(key: &str) -> Group {
    Group::new(key, vec![1, 2], 2, Sampling::new(4))
}

async fn next(consumer: &mut anabranch_trainer::Consumer) -> Result<Delivery, Error> {
    tokio::time::timeout(SOON, consumer.next()).await.expect("something within 20 s")
}

async fn batch(consumer: &mut anabranch_trainer::Consumer) -> (u64, usize) {
    match next(consumer).await.expect("a batch") {
        Delivery::Batch(batch) => (batch.seq.0, batch.trajectories.len()),
        other => panic!("expected a batch, got {other:?}"),
    }
}

#[tokio::test]
async fn batches_arrive_once_over_a_lost_link_and_are_acknowledged() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    let mut consumer = job.consume(Pack::default(), Shard::ALL).expect("sound");
    fake.say(Say::part(1, 0, true)).await;
    fake.say(Say::part(2, 0, false)).await;
    assert_eq!(batch(&mut consumer).await, (1, 1));
    fake.say(Say::Cut).await;
    // Offered again from the start, as if no acknowledgement had arrived.
    fake.say(Say::part(1, 0, true)).await;
    fake.say(Say::part(2, 0, false)).await;
    fake.say(Say::part(2, 1, true)).await;
    assert_eq!(batch(&mut consumer).await, (2, 2));
    fake.until(|heard| matches!(heard, Heard::Ack(2))).await;
    assert_eq!(fake.count(|heard| matches!(heard, Heard::Attach)), 2);
}

#[tokio::test]
async fn a_steps_last_batch_is_acknowledged_only_with_its_end() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    let mut consumer = job.consume(Pack::default(), Shard::ALL).expect("sound");
    fake.say(Say::part(1, 0, true)).await;
    fake.say(Say::last_part(2)).await;
    assert_eq!(batch(&mut consumer).await.0, 1);
    assert_eq!(batch(&mut consumer).await.0, 2);
    fake.until(|heard| matches!(heard, Heard::Ack(1))).await;
    fake.say(Say::Cut).await;
    assert_eq!(fake.count(|heard| matches!(heard, Heard::Ack(2))), 0);
    fake.say(Say::last_part(2)).await;
    fake.say(Say::done(2)).await;
    match next(&mut consumer).await.expect("the step's end") {
        Delivery::StepDone(done) => assert_eq!((done.step, done.last_seq), (Step(7), BatchSeq(2))),
        other => panic!("expected the step's end, got {other:?}"),
    }
    fake.until(|heard| matches!(heard, Heard::Ack(2))).await;
}

#[tokio::test]
async fn a_commit_survives_a_lost_link() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    let mut consumer = job.consume(Pack::default(), Shard::ALL).expect("sound");
    fake.say(Say::part(1, 0, true)).await;
    batch(&mut consumer).await;
    consumer.commit(BatchSeq(1), Version::base(0)).await.expect("on its way");
    fake.until(|heard| matches!(heard, Heard::Commit(1))).await;
    fake.say(Say::Cut).await;
    fake.until_count(2, |heard| matches!(heard, Heard::Commit(1))).await;
}

#[tokio::test]
async fn credit_is_granted_at_once_and_again_when_batches_are_taken() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    let window = Window { bytes: 1 << 20, samples: 2, lost_after: SOON };
    let mut consumer = job.consume_within(Pack::default(), Shard::ALL, window).expect("sound");
    fake.until(|heard| matches!(heard, Heard::Credit(2))).await;
    fake.say(Say::part(1, 0, true)).await;
    fake.until(|heard| matches!(heard, Heard::Ack(1))).await;
    assert_eq!(fake.count(|heard| matches!(heard, Heard::Credit(_))), 1, "nothing was taken");
    batch(&mut consumer).await;
    fake.until(|heard| matches!(heard, Heard::Credit(1))).await;
}

#[tokio::test]
async fn a_full_manager_is_tried_again_and_the_step_is_closed_last() {
    let fake = Fake::start().await;
    fake.full_times(2);
    let job = job(&fake).await;
    let submit = job.submit(7).groups([group("a"), group("b")]).last().timeout(SOON);
    let submitted = submit.send().await.expect("taken");
    assert!(submitted.closed && submitted.accepted() == 2, "{submitted:?}");
    let submits = fake.submits();
    assert_eq!(submits, [(2, false), (2, false), (2, false), (0, true)]);
}

#[tokio::test]
async fn when_the_time_is_up_the_step_stays_open() {
    let fake = Fake::start().await;
    fake.full_times(u32::MAX);
    let job = job(&fake).await;
    let submit = || job.submit(7).group(group("a")).last().timeout(Duration::from_millis(300));
    let submitted = submit().allow_rejected().send().await.expect("an answer");
    assert_eq!(submitted.verdicts[0].outcome, Outcome::Full { why: "full".into() });
    assert!(!submitted.closed);
    let error = submit().send().await.expect_err("not asked for");
    assert!(error.retry(), "there may be room later: {error}");
    assert!(fake.submits().iter().all(|(_, last)| !last));
}

#[tokio::test]
async fn a_rejected_group_is_an_error_unless_asked_for_and_keeps_the_step_open() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    let submit = || job.submit(7).groups([group("bad"), group("old"), group("a")]).last();
    let error = submit().send().await.expect_err("one is rejected");
    assert!(matches!(&error, Error::Rejected { verdicts, .. } if verdicts[0].key == "bad"));
    assert!(error.to_string().contains("1 of 3 groups; group \"bad\": never"), "{error}");
    assert_eq!(fake.submits(), [(3, false)], "the caller decides about the step");
    let submitted = submit().allow_rejected().send().await.expect("asked for");
    assert_eq!(submitted.rejected().map(|v| v.key.as_str()).collect::<Vec<_>>(), ["bad"]);
    assert_eq!(submitted.duplicates().collect::<Vec<_>>(), ["old"]);
    assert!(submitted.closed);
}

#[tokio::test]
async fn a_forgotten_session_is_opened_again_and_lost_state_is_an_error() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    fake.forget_session(1);
    let submitted = job.submit(7).group(group("a")).send().await.expect("opened again");
    assert_eq!((submitted.accepted(), submitted.closed), (1, false));
    fake.forget_session(2);
    let error = job.submit(7).group(group("b")).send().await.expect_err("state is lost");
    assert!(matches!(error, Error::StateLost { was: 1, is: 2 }), "{error}");
    assert!(!error.retry());
}

#[tokio::test]
async fn streams_go_on_in_a_session_that_was_opened_again() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    let mut consumer = job.consume(Pack::default(), Shard::ALL).expect("sound");
    fake.say(Say::part(1, 0, true)).await;
    assert_eq!(batch(&mut consumer).await.0, 1);
    fake.forget_session(1);
    fake.say(Say::Cut).await;
    fake.say(Say::part(2, 0, true)).await;
    assert_eq!(batch(&mut consumer).await.0, 2);
    fake.forget_session(2);
    fake.say(Say::Cut).await;
    let error = next(&mut consumer).await.expect_err("the state is lost");
    assert!(matches!(error, Error::StateLost { .. }), "{error}");
}

#[tokio::test]
async fn a_watch_goes_on_over_a_lost_link_until_the_job_is_closed() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    let mut watch = job.watch_versions();
    for settled in [false, true] {
        let status = tokio::time::timeout(SOON, watch.next()).await.expect("soon");
        assert_eq!(status.expect("told").settled, settled);
    }
    job.close(false).await.expect("closed");
    let ended = tokio::time::timeout(SOON, watch.next()).await.expect("soon");
    assert!(matches!(ended, Err(Error::Closed)));
}

#[tokio::test]
async fn a_trajectory_that_contradicts_itself_ends_the_stream_unacknowledged() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    let mut consumer = job.consume(Pack::default(), Shard::ALL).expect("sound");
    fake.say(Say::bad_part(1)).await;
    let error = next(&mut consumer).await.expect_err("spans do not tile");
    assert!(
        error.to_string().contains("batch 1: trajectory \"1\"/0: spans cover 0 of 2"),
        "{error}"
    );
    assert!(matches!(next(&mut consumer).await, Err(Error::Closed)));
    assert_eq!(fake.count(|heard| matches!(heard, Heard::Ack(_))), 0);
}

static WEIGHTS: [u8; 1 << 20] = [7; 1 << 20];

fn tensor(shape: &[u64]) -> TensorRef<'_> {
    TensorRef { name: "w", dtype: DType::F32, shape, data: &WEIGHTS }
}

const SHAPE: &[u64] = &[512, 512];

#[tokio::test]
async fn a_version_is_announced_sealed_and_announced_again_after_a_lost_link() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    let published = job.publish(1, &[tensor(SHAPE)]).await.expect("the snapshot fits");
    let sealed = published.sealed().await.expect("sealed");
    let status = tokio::time::timeout(SOON, published.settled()).await.expect("soon");
    let status = status.expect("settled");
    assert_eq!((status.version, status.state), (sealed, VersionState::Current));
    assert_eq!(fake.count(|heard| matches!(heard, Heard::Begin(1.., 1_048_576..))), 2);
    assert_eq!(fake.count(|heard| matches!(heard, Heard::Seal(32))), 2);
    let older = job.publish(1, &[tensor(SHAPE)]).await.expect_err("numbers grow");
    assert!(older.to_string().contains("version 1 after 1"), "{older}");
}

#[tokio::test]
async fn a_refused_version_says_why_and_bad_tensors_are_refused_here() {
    let fake = Fake::start().await;
    let job = job(&fake).await;
    let published = job.publish(13, &[tensor(SHAPE)]).await.expect("the snapshot fits");
    let error = tokio::time::timeout(SOON, published.settled()).await.expect("soon");
    let error = error.expect_err("the manager refuses it").to_string();
    assert!(error.contains("version 13") && error.contains("not published here"), "{error}");
    let error =
        job.publish(14, &[tensor(&[512, 513])]).await.expect_err("too few bytes").to_string();
    assert!(error.contains("`w`"), "{error}");
    assert!(job.publish(0, &[tensor(SHAPE)]).await.is_err());
}

#[tokio::test]
async fn nobody_at_the_address_is_said_at_once() {
    let error = Client::connect("http://127.0.0.1:1", None).await.expect_err("port 1 is closed");
    assert!(error.retry());
    let error = Client::connect("localhost:5000", None).await.expect_err("no scheme");
    assert!(!error.retry());
    assert!(error.to_string().contains("http://HOST:PORT"), "{error}");
}
