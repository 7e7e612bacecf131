//! Versions, mode switches and shards as trainer and agents see them over the wire.

mod common;

use anabranch_manager::Manager;
use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::pb::{self, from_agent, load_state::Stage, publish_event, to_agent};
use common::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

const ROOT: [u8; 32] = [7; 32];

struct Publisher {
    parts: mpsc::Sender<pb::PublishPart>,
    events: Streaming<pb::PublishEvent>,
}

impl Publisher {
    async fn begin(trainer: &mut Trainer, number: u64, addresses: &[&str]) -> Publisher {
        let (parts, out) = mpsc::channel(8);
        let begin = pb::publish_part::Begin {
            session: trainer.session,
            version: Some(pb::Version { number, ..Default::default() }),
            kind: 1,
            addresses: addresses.iter().map(|at| at.to_string()).collect(),
            bytes: 1000,
            ..Default::default()
        };
        let kind = Some(pb::publish_part::Kind::Begin(begin));
        parts.send(pb::PublishPart { kind }).await.expect("open");
        let events =
            trainer.client.publish(ReceiverStream::new(out)).await.expect("open").into_inner();
        Publisher { parts, events }
    }

    async fn seal(&self) {
        let kind = Some(pb::publish_part::Kind::Seal(pb::publish_part::Seal {
            root: ROOT.to_vec().into(),
        }));
        self.parts.send(pb::PublishPart { kind }).await.expect("open");
    }

    async fn next(&mut self) -> Result<publish_event::Kind, tonic::Status> {
        let event = within("an event of the version", self.events.message()).await?;
        Ok(event.expect("open").kind.expect("a kind"))
    }
}

fn version(number: u64) -> pb::Version {
    pb::Version { number, root: ROOT.to_vec().into(), ..Default::default() }
}

async fn load_order(agent: &mut Agent) -> pb::Load {
    loop {
        if let to_agent::Kind::Load(load) = agent.order().await.expect("open").expect("a kind") {
            return load;
        }
    }
}

fn stage(load: &pb::Load, stage: Stage) -> from_agent::Kind {
    let probe = (stage == Stage::Active).then(|| pb::Probe {
        ids: vec![1, 2],
        logprobs: vec![-0.5, -0.5],
        verdict: pb::probe::Verdict::First.into(),
    });
    from_agent::Kind::LoadState(pb::LoadState {
        order: load.order,
        version: load.version.clone(),
        stage: stage.into(),
        bytes: 1000,
        probe,
        holds: stage == Stage::Active,
        ..Default::default()
    })
}

async fn opened(manager: &Manager) -> (Trainer, pb::Opened) {
    let mut trainer = Trainer::open(channel(manager).await).await;
    let request = pb::OpenRequest { job: "job".into(), ..Default::default() };
    let again = trainer.client.open(request).await.expect("opened").into_inner();
    trainer.session = again.session;
    (trainer, again)
}

#[tokio::test]
async fn a_published_version_reaches_an_engine_with_a_grant_that_its_holder_accepts() {
    let manager = start(raw()).await;
    let mut agent = Agent::attach(channel(&manager).await, hello("e1")).await;
    let (mut trainer, opened) = opened(&manager).await;
    let watch = pb::WatchRequest { session: trainer.session };
    let mut watched = trainer.client.watch_versions(watch).await.expect("open").into_inner();
    let mut publisher = Publisher::begin(&mut trainer, 1, &["127.0.0.1:7001"]).await;
    assert!(matches!(publisher.next().await, Ok(publish_event::Kind::Accepted(_))));
    publisher.seal().await;

    let load = load_order(&mut agent).await;
    assert_eq!(load.version, Some(version(1)));
    assert_eq!(load.bytes, 1000);
    let [source] = &load.sources[..] else { panic!("{load:?}") };
    assert_eq!(source.addr, "127.0.0.1:7001");
    let key: [u8; 32] = opened.serve_key.as_ref().try_into().expect("32 bytes");
    let grant = Grant::verify(&key, &source.grant).expect("made with the trainer's key");
    assert_eq!(
        (grant.job.as_str(), grant.receiver.as_str(), grant.role),
        ("job", "e1", Role::Fetch)
    );
    assert_eq!(grant.version.number, 1);

    agent.say(stage(&load, Stage::Fetching)).await;
    agent.say(stage(&load, Stage::Active)).await;
    let serving = |state: &serde_json::Value| {
        let engine = &state["engines"][0];
        engine["state"] == "serving" && engine["version"]["number"] == 1
    };
    until(manager.local_addr(), "serving the version", serving).await;
    loop {
        match publisher.next().await.expect("open") {
            publish_event::Kind::Status(status) if status.settled => {
                assert_eq!(status.state, "current");
                assert_eq!(status.engines[0].stage, "active");
                break;
            }
            _ => {}
        }
    }
    let settled = async {
        loop {
            let status = watched.message().await.expect("open").expect("a status");
            if status.settled {
                return status;
            }
        }
    };
    assert_eq!(within("the watcher", settled).await.version, Some(version(1)));
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn a_publisher_is_told_what_was_wrong() {
    let manager = start(raw()).await;
    let (mut trainer, _) = opened(&manager).await;
    let mut nowhere = Publisher::begin(&mut trainer, 1, &[]).await;
    let status = nowhere.next().await.expect_err("nobody could fetch it");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status
            .message()
            .contains("give addresses, say that the trainer dials, or give a directory"),
        "{}",
        status.message()
    );
    let mut zero = Publisher::begin(&mut trainer, 0, &["127.0.0.1:1"]).await;
    assert!(zero.next().await.expect_err("reserved").message().contains("publish from 1"));
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn a_colocated_engine_is_released_for_training_and_attested_by_the_trainer() {
    let manager = start(raw()).await;
    let mut colocated = hello("c1");
    colocated.labels.insert("colocated".into(), "true".into());
    let caps = colocated.caps.as_mut().expect("set");
    (caps.release_memory, caps.weights_by_trainer) = (true, true);
    let mut agent = Agent::attach(channel(&manager).await, colocated).await;
    let (trainer, _) = opened(&manager).await;
    let switch = |mode: pb::set_mode_request::Mode| pb::SetModeRequest {
        session: trainer.session,
        mode: mode.into(),
        deadline_ms: 5_000,
    };
    let mut client = trainer.client.clone();
    let train = async {
        client
            .set_mode(switch(pb::set_mode_request::Mode::Train))
            .await
            .expect("switched")
            .into_inner()
    };
    let obey = async {
        loop {
            if let to_agent::Kind::Mode(mode) = agent.order().await.expect("open").expect("a kind")
            {
                assert_eq!(mode.kind(), pb::mode::Kind::ReleaseMemory);
                let (order, ok) = (mode.order, true);
                let done = pb::ModeDone {
                    order,
                    ok,
                    drained: true,
                    memory_released: true,
                    ..Default::default()
                };
                return agent.say(from_agent::Kind::ModeDone(done)).await;
            }
        }
    };
    let (set, ()) = tokio::join!(within("the barrier", train), obey);
    let [engine] = &set.engines[..] else { panic!("{set:?}") };
    assert!(engine.engine == "c1" && engine.drained && engine.memory_released, "{engine:?}");
    let state = state(manager.local_addr()).await;
    assert_eq!(
        (&state["training"], &state["engines"][0]["state"]),
        (&true.into(), &"released".into())
    );
    let mut client = trainer.client.clone();
    let unknown = pb::EngineReport {
        session: trainer.session,
        engine: "c9".into(),
        version: Some(version(1)),
    };
    assert!(client.report_engine(unknown).await.is_err());
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn each_shard_sees_the_same_sequence_of_batches() {
    let manager = start(raw()).await;
    let (mut trainer, _) = opened(&manager).await;
    let pack = pb::Pack { min: 4, multiple_of: 2, ..Default::default() };
    let mut first = trainer.consume_shard(pack, 0, 2).await;
    let mut second = trainer.consume_shard(pack, 1, 2).await;
    let agent = Agent::attach(channel(&manager).await, hello("e1")).await;
    let local = tokio::task::LocalSet::new();
    local.spawn_local(agent.serve());
    local
        .run_until(async {
            trainer.submit(1, vec![group("a", 8, 6)]).await.expect("taken");
            let mut keys = Vec::new();
            loop {
                let (one, two) = (first.batch().await, second.batch().await);
                assert_eq!((one.seq, one.last_of_step), (two.seq, two.last_of_step));
                assert_eq!(one.trajectories.len(), two.trajectories.len());
                keys.extend(one.trajectories.iter().chain(&two.trajectories).map(|t| t.index));
                if one.last_of_step {
                    break;
                }
            }
            keys.sort_unstable();
            assert_eq!(keys, (0..8).collect::<Vec<u32>>());
        })
        .await;
    manager.stop().await.expect("stopped");
}
