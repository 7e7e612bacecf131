//! An agent on the trainer's host: every version is the trainer's own memory, also for the engine, and is
//! back with the trainer when the next one is active.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use anabranch_proto::address::Address;
use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::manifest::DType;
use anabranch_proto::pb::load_state::Stage;
use anabranch_proto::pb::{self, from_agent, to_agent};
use anabranch_proto::{SampleId, Version};
use anabranch_transfer::{Publisher, PublisherConfig, ShmArena, TensorRef};
use common::*;

const KEY: [u8; 32] = [9; 32];
const ROWS: u64 = 3000;

fn load(publisher: &Publisher, version: Version) -> to_agent::Kind {
    let (job, receiver) = ("test".to_owned(), "e1".to_owned());
    let (ttl_ms, nonce) = (60_000, version.number);
    let grant = Grant { job, version, receiver, role: Role::Fetch, ttl_ms, nonce }.mint(&KEY);
    let source = |addr: Address| pb::Source {
        addr: addr.to_string(),
        grant: grant.clone(),
        holder: "trainer".into(),
        ..Default::default()
    };
    to_agent::Kind::Load(pb::Load {
        order: version.number,
        version: Some(version.into()),
        sources: publisher.addresses().into_iter().map(source).collect(),
        on_running: pb::OnRunning::Continue.into(),
        ..Default::default()
    })
}

/// Bytes of slots that an agent has of its own.
fn slot_bytes(staging: &Path) -> u64 {
    let agent = std::fs::read_dir(staging).expect("dir").flatten();
    let agent = agent.map(|e| e.path()).find(|p| !p.to_string_lossy().ends_with(".arena"));
    let files = std::fs::read_dir(agent.expect("the agent's")).expect("dir").flatten();
    let slots = files.filter(|e| e.path().is_file() && e.file_name() != "lock");
    slots.map(|e| e.metadata().expect("metadata").len()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_are_the_trainers_memory_while_samples_run_and_go_back_to_it() {
    logs();
    let host = tempfile::tempdir_in("/dev/shm").expect("shm");
    let dir = host.path().join("anabranch-test-1.arena");
    let shm = Some(ShmArena { dir, required: true });
    let config = PublisherConfig { shm, ..PublisherConfig::loopback("test", 1) };
    let publisher = Publisher::start(config).expect("publisher");
    publisher.set_serve_key(KEY);
    let engine = TestEngine::start(|config| config.rate = Some(300.0)).await;
    let mut manager = TestManager::start().await;
    let staging = host.path().to_owned();
    let _agent = TestAgent::start(manager.addr, engine.addr, |c| c.staging = staging);
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let prompt = attached.prompt(&[4, 5]).await;
    for index in 0..4 {
        attached.start(SampleId::new(1, index), prompt, 900, u64::from(index)).await;
    }
    let mut digests = base();
    for number in 1..=6u8 {
        let data = vec![number; ROWS as usize * 64 * 4];
        let shape = [ROWS, 64];
        let tensor = |name| TensorRef { name, dtype: DType::F32, shape: &shape, data: &data };
        let publishing = publisher.publish(number.into(), &[tensor("a.weight")]).expect("publish");
        assert_eq!(publishing.left_in_use, 0, "the one before the last is back");
        let published = publishing.sealed().await.expect("sealed");
        attached.control(load(&publisher, published.version)).await;
        let done = attached
            .until_said(&mut ledger, |kind| match kind {
                from_agent::Kind::LoadState(state)
                    if matches!(state.stage(), Stage::Active | Stage::Failed) =>
                {
                    Some(state.clone())
                }
                _ => None,
            })
            .await;
        assert_eq!((done.stage(), done.error.as_str()), (Stage::Active, ""));
        assert_eq!(done.fetched_from["trainer"], published.bytes);
        assert_eq!(published.sent_bytes(), 0, "no byte crossed a socket");
        assert_eq!(slot_bytes(host.path()), 0);
        let content = anabranch_engine::TensorContent {
            name: "a.weight",
            dtype: "F32",
            shape: &shape,
            data: &data,
        };
        digests.insert(number.into(), anabranch_engine::content_digest_of([content]));
    }
    attached.until(&mut ledger, |ledger| ledger.ended() == 4).await;
    let digests: BTreeMap<u64, [u8; 32]> = digests;
    for (sample, row) in &ledger.samples {
        verify(row, &[4, 5], u64::from(sample.index), &digests);
    }
}
