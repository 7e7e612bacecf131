//! Weights by chunks: from a publisher to one agent, from that agent to the next, and what happens to a
//! version that does not fit.

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use anabranch_agent::{EngineSpec, LinkKind, Listen};
use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::manifest::DType;
use anabranch_proto::pb::load_state::Stage;
use anabranch_proto::pb::{self, end::Why, from_agent, to_agent};
use anabranch_proto::{SampleId, Version};
use anabranch_transfer::{Published, Publisher, PublisherConfig, TensorRef};
use common::*;

const KEY: [u8; 32] = [9; 32];

fn publisher() -> Publisher {
    let publisher = Publisher::start(PublisherConfig::loopback("test", 1)).expect("publisher");
    publisher.set_serve_key(KEY);
    publisher
}

async fn publish(publisher: &Publisher, number: u64, fill: u8, rows: u64) -> Published {
    let data = vec![fill; rows as usize * 64 * 4];
    let shape = [rows, 64];
    let tensor = |name| TensorRef { name, dtype: DType::F32, shape: &shape, data: &data };
    let tensors = [tensor("a.weight"), tensor("b.weight")];
    publisher.publish(number, &tensors).expect("copied").sealed().await.expect("sealed")
}

fn digest(fill: u8, rows: usize) -> [u8; 32] {
    let data = vec![fill; rows * 64 * 4];
    let shape = [rows as u64, 64];
    let tensor =
        |name| anabranch_engine::TensorContent { name, dtype: "F32", shape: &shape, data: &data };
    anabranch_engine::content_digest_of([tensor("a.weight"), tensor("b.weight")])
}

fn source(holder: &str, addr: &str, version: Version, receiver: &str) -> pb::Source {
    static NONCE: AtomicU64 = AtomicU64::new(0);
    let grant = Grant {
        job: "test".into(),
        version,
        receiver: receiver.into(),
        role: Role::Fetch,
        ttl_ms: 60_000,
        nonce: NONCE.fetch_add(1, Ordering::Relaxed),
    };
    pb::Source {
        addr: addr.into(),
        dial: 1,
        grant: grant.mint(&KEY),
        holder: holder.into(),
        ..Default::default()
    }
}

fn load(order: u64, version: Version, sources: Vec<pb::Source>) -> to_agent::Kind {
    let on_running = pb::OnRunning::Continue.into();
    to_agent::Kind::Load(pb::Load {
        order,
        version: Some(version.into()),
        sources,
        on_running,
        ..Default::default()
    })
}

async fn outcome(attached: &mut Attached, ledger: &mut Ledger) -> pb::LoadState {
    attached
        .until_said(ledger, |kind| match kind {
            from_agent::Kind::LoadState(state)
                if matches!(state.stage(), Stage::Active | Stage::Failed) =>
            {
                Some(state.clone())
            }
            _ => None,
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_come_in_chunks_and_go_on_to_a_peer_while_samples_run() {
    logs();
    let publisher = publisher();
    let trainer = publisher.addresses()[0].to_string();
    let engine = TestEngine::start(|config| config.rate = Some(300.0)).await;
    let mut manager = TestManager::start().await;
    // What it announces before it serves is what peers dial: its certificate stands there already.
    let at = Listen::at("127.0.0.1:0".parse().expect("address"));
    let listen = Some(Listen { links: vec![LinkKind::Tls], ..at });
    let _agent = TestAgent::start(manager.addr, engine.addr, |c| c.listen = listen);
    let mut first = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let prompt = first.prompt(&[4, 5]).await;
    for index in 0..6 {
        first.start(SampleId::new(1, index), prompt, 1200, u64::from(index)).await;
    }
    let mut versions = Vec::new();
    // More versions than slots: each must be given back after the next load.
    for number in 1..=4u8 {
        let published = publish(&publisher, number.into(), number, 3000).await;
        let version = published.version;
        let sources = vec![source("trainer", &trainer, version, "e1")];
        let before = ledger.tokens();
        first.until(&mut ledger, |ledger| ledger.tokens() > before + 200).await;
        first.control(load(number.into(), version, sources)).await;
        let done = outcome(&mut first, &mut ledger).await;
        assert_eq!((done.stage(), done.error.as_str(), done.holds), (Stage::Active, "", true));
        assert!(done.fetched_from["trainer"] > 0 || number > 1, "{done:?}");
        versions.push(version);
    }
    // A second engine gets the newest from the first agent only.
    let other = TestEngine::start(|_| {}).await;
    let _second_agent = TestAgent::start(manager.addr, other.addr, |c| c.id = Some("e2".into()));
    let mut second = manager.attach(|_| welcome(2)).await;
    let [near, peer] = &first.hello.addresses[..] else { panic!("{:?}", first.hello.addresses) };
    assert!(near.starts_with("shm:/") && peer.starts_with("tls://127.0.0.1:"), "{peer}");
    let newest = versions[3];
    second.control(load(9, newest, vec![source("e1", peer, newest, "e2")])).await;
    let mut other_ledger = Ledger::default();
    let done = outcome(&mut second, &mut other_ledger).await;
    assert_eq!((done.stage(), done.error.as_str()), (Stage::Active, ""));
    assert!(done.fetched_from["e1"] > 0);

    first.until(&mut ledger, |ledger| ledger.ended() == 6).await;
    let mut digests = base();
    digests.extend((1..=4u8).map(|n| (n.into(), digest(n, 3000))));
    for (sample, row) in &ledger.samples {
        verify(row, &[4, 5], u64::from(sample.index), &digests);
        assert_eq!((row.tokens.len(), row.inexact), (1200, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_does_not_fit_or_cannot_be_reached_is_never_shown_to_the_engine() {
    let publisher = publisher();
    let trainer = publisher.addresses()[0].to_string();
    let engine = TestEngine::start(|config| config.rate = Some(300.0)).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let good = publish(&publisher, 1, 1, 500).await.version;
    attached.control(load(1, good, vec![source("trainer", &trainer, good, "e1")])).await;
    assert_eq!(outcome(&mut attached, &mut ledger).await.stage(), Stage::Active);
    let prompt = attached.prompt(&[4]).await;
    attached.start(SampleId::new(1, 0), prompt, 400, 0).await;
    let other_shape = publish(&publisher, 2, 2, 600).await.version;
    attached
        .control(load(2, other_shape, vec![source("trainer", &trainer, other_shape, "e1")]))
        .await;
    let refused = outcome(&mut attached, &mut ledger).await;
    assert_eq!((refused.stage(), refused.order), (Stage::Failed, 2));
    assert!(refused.error.contains("other shape"), "{}", refused.error);
    let nobody = source("gone", "127.0.0.1:1", other_shape, "e1");
    attached.control(load(3, other_shape, vec![nobody])).await;
    let unreachable = outcome(&mut attached, &mut ledger).await;
    assert!(unreachable.error.contains("gone at 127.0.0.1:1"), "{}", unreachable.error);
    attached.until(&mut ledger, |ledger| ledger.ended() == 1).await;
    assert_eq!(ledger.why(SampleId::new(1, 0)), Why::Length);
    let row = &ledger.samples[&SampleId::new(1, 0)];
    verify(row, &[4], 0, &BTreeMap::from([(1, digest(1, 500))]));
    // And it can still be brought to a version that fits.
    let next = publish(&publisher, 3, 3, 500).await.version;
    attached.control(load(4, next, vec![source("trainer", &trainer, next, "e1")])).await;
    assert_eq!(outcome(&mut attached, &mut ledger).await.error, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_takes_a_version_without_an_engine_and_an_engine_gets_it_from_there() {
    let publisher = publisher();
    let trainer = publisher.addresses()[0].to_string();
    let engine = TestEngine::start(|_| {}).await;
    let mut manager = TestManager::start().await;
    let _relay = TestAgent::start(manager.addr, engine.addr, |c| {
        c.engine = EngineSpec::Relay;
        c.id = Some("relay".into());
        c.listen = Some(Listen::at("127.0.0.1:0".parse().expect("address")));
    });
    let mut relay = manager.attach(|_| welcome(1)).await;
    assert_eq!(relay.hello.engine_kind, "relay");
    let mut ledger = Ledger::default();
    let v = publish(&publisher, 1, 1, 500).await.version;
    relay.control(load(1, v, vec![source("trainer", &trainer, v, "relay")])).await;
    let done = outcome(&mut relay, &mut ledger).await;
    assert_eq!((done.stage(), done.error.as_str(), done.holds), (Stage::Active, "", true));

    let _agent = TestAgent::start(manager.addr, engine.addr, |c| c.id = Some("e2".into()));
    let mut second = manager.attach(|_| welcome(2)).await;
    let at = relay.hello.addresses[0].clone();
    second.control(load(2, v, vec![source("relay", &at, v, "e2")])).await;
    let done = outcome(&mut second, &mut ledger).await;
    assert_eq!((done.stage(), done.error.as_str()), (Stage::Active, ""));
    assert!(done.fetched_from["relay"] > 0);
}
