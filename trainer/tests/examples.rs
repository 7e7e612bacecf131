//! The examples of the SDK, run as they are against a real manager and the embedded engine.

mod world;

#[allow(dead_code)]
#[path = "../examples/grpo_loop.rs"]
mod grpo_loop;
#[allow(dead_code)]
#[path = "../examples/publish.rs"]
mod publish;
#[allow(dead_code)]
#[path = "../examples/several_senders.rs"]
mod several_senders;

use std::path::Path;
use std::time::Duration;

use anabranch_trainer::LoadStage;
use world::World;

/// Long enough for a loaded machine; a test that waits so long has failed.
const SOON: Duration = Duration::from_secs(60);

async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, wait).await.unwrap_or_else(|_| panic!("{what}: not in {SOON:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_grpo_loop_trains_publishes_and_commits() {
    let world = World::start().await;
    let version = soon("three steps", grpo_loop::train(&world.url(), 3)).await.expect("trained");
    assert_eq!(version.number, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_checkpoint_reaches_every_engine() {
    let world = World::start().await;
    let dir = world.dir.path().join("checkpoint");
    checkpoint(&dir);
    let status = soon("a roll-out", publish::publish(&world.url(), &dir)).await.expect("settled");
    assert_eq!((status.version.number, status.settled), (1, true));
    assert!(status.engines.iter().all(|on| on.stage == LoadStage::Active), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn several_senders_publish_one_version() {
    let world = World::start().await;
    let url = world.url();
    let publish = several_senders::publish(&url);
    let status = soon("a roll-out", publish).await.expect("settled");
    assert_eq!((status.version.number, status.settled), (1, true));
    assert!(status.bytes >= 2 << 20, "{status:?}");
}

/// One tensor of 1 MiB.
fn checkpoint(dir: &Path) {
    std::fs::create_dir_all(dir).expect("dir");
    let bytes = 1 << 20;
    let mut header =
        format!("{{\"w\":{{\"dtype\":\"F32\",\"shape\":[512,512],\"data_offsets\":[0,{bytes}]}}}}");
    header.push_str(&" ".repeat(header.len().next_multiple_of(64) - header.len()));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + bytes, 7);
    std::fs::write(dir.join("model.safetensors"), file).expect("written");
}
