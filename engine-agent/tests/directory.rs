//! Versions that an engine loads from where the trainer wrote them: verified byte for byte, copied nowhere,
//! and not trusted when they change under the load.

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anabranch_proto::pb::load_state::Stage;
use anabranch_proto::pb::{self, OnRunning, from_agent, to_agent};
use anabranch_proto::{Root, SampleId};
use anabranch_transfer::directory::{ReadOptions, index_directory};
use common::*;

fn index(directory: &Path) -> Root {
    index_directory(directory, &ReadOptions::default()).expect("index").root
}

fn load(order: u64, root: Root, directory: &Path, on_running: OnRunning) -> to_agent::Kind {
    to_agent::Kind::Load(pb::Load {
        order,
        version: Some(pb::Version { epoch: 1, number: order, root: root.0.to_vec().into() }),
        on_running: on_running.into(),
        directory: directory.to_str().expect("utf-8").into(),
        ..Default::default()
    })
}

async fn reaches(attached: &mut Attached, ledger: &mut Ledger, wanted: &[Stage]) -> pb::LoadState {
    let reached = |kind: &from_agent::Kind| match kind {
        from_agent::Kind::LoadState(state) if wanted.contains(&state.stage()) => {
            Some(state.clone())
        }
        _ => None,
    };
    attached.until_said(ledger, reached).await
}

const ENDS: [Stage; 2] = [Stage::Active, Stage::Failed];

/// The byte at `at` of the model file becomes another.
fn flip(directory: &Path, at: u64) {
    let path = directory.join("model.safetensors");
    let file = std::fs::File::options().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 1], at).expect("write");
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("dir").flatten() {
        match entry.metadata().expect("metadata").is_dir() {
            true => found.extend(files(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

#[tokio::test]
async fn only_a_directory_with_every_byte_as_published_is_loaded_and_nothing_is_copied() {
    logs();
    let dir = tempfile::tempdir().expect("dir");
    let (first, second) = (dir.path().join("v1"), dir.path().join("v2"));
    let v1 = checkpoint(&first, 1, 4000);
    let v2 = checkpoint(&second, 2, 4000);
    let (root_1, root_2) = (index(&first), index(&second));
    let engine = TestEngine::start(|config| config.rate = Some(400.0)).await;
    let mut manager = TestManager::start().await;
    let staging = tempfile::tempdir().expect("dir");
    let own = staging.path().to_owned();
    let _agent = TestAgent::start(manager.addr, engine.addr, |config| config.staging = own);
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    attached.control(load(1, root_1, &first, OnRunning::Continue)).await;
    assert_eq!(reaches(&mut attached, &mut ledger, &ENDS).await.error, "");
    // A byte that does not change any name, shape or dtype.
    flip(&second, 100_000);
    for left in [true, false] {
        if !left {
            std::fs::remove_file(second.join("anabranch.manifest")).expect("left by the trainer");
        }
        attached.control(load(2, root_2, &second, OnRunning::Continue)).await;
        let refused = reaches(&mut attached, &mut ledger, &ENDS).await;
        assert_eq!(refused.stage(), Stage::Failed);
        let says = if left { "tensor `a.weight`" } else { "its tensors have root" };
        assert!(refused.error.contains(says), "{}", refused.error);
    }
    let digest = attached.prompt(&[4]).await;
    attached.start(SampleId::new(5, 0), digest, 50, 0).await;
    attached.until(&mut ledger, |ledger| ledger.ended() == 1).await;
    verify(&ledger.samples[&SampleId::new(5, 0)], &[4], 0, &BTreeMap::from([(1, v1)]));
    flip(&second, 100_000);
    attached.control(load(3, root_2, &second, OnRunning::Continue)).await;
    let done = reaches(&mut attached, &mut ledger, &ENDS).await;
    assert_eq!((done.stage(), done.error.as_str(), done.holds), (Stage::Active, "", false));
    attached.start(SampleId::new(5, 1), digest, 50, 1).await;
    attached.until(&mut ledger, |ledger| ledger.ended() == 2).await;
    verify(&ledger.samples[&SampleId::new(5, 1)], &[4], 1, &BTreeMap::from([(3, v2)]));
    let models = files(staging.path());
    assert!(models.iter().all(|path| !path.ends_with("model.safetensors")), "{models:?}");
}

#[tokio::test]
async fn a_directory_that_changes_between_its_check_and_its_load_is_not_trusted() {
    let dir = tempfile::tempdir().expect("dir");
    let (first, second) = (dir.path().join("v1"), dir.path().join("v2"));
    let v1 = checkpoint(&first, 1, 40);
    checkpoint(&second, 2, 40);
    let engine = TestEngine::start(|config| config.rate = Some(400.0)).await;
    let mut manager = TestManager::start().await;
    let _agent = TestAgent::start(manager.addr, engine.addr, |_| {});
    let mut attached = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    attached.control(load(1, index(&first), &first, OnRunning::Continue)).await;
    assert_eq!(reaches(&mut attached, &mut ledger, &ENDS).await.error, "");
    let digest = attached.prompt(&[4]).await;
    attached.start(SampleId::new(5, 0), digest, 200, 0).await;
    attached.until(&mut ledger, |ledger| ledger.tokens() > 10).await;
    // The load waits for the sample; the trainer writes its next version over this one meanwhile.
    attached.control(load(2, index(&second), &second, OnRunning::Finish)).await;
    reaches(&mut attached, &mut ledger, &[Stage::Staged]).await;
    checkpoint(&second, 3, 40);
    let refused = reaches(&mut attached, &mut ledger, &ENDS).await;
    assert_eq!(refused.stage(), Stage::Failed);
    assert!(refused.error.contains("changed while it was used"), "{}", refused.error);
    // The old weights are back.
    attached.start(SampleId::new(5, 1), digest, 50, 1).await;
    attached.until(&mut ledger, |ledger| ledger.ended() == 2).await;
    verify(&ledger.samples[&SampleId::new(5, 1)], &[4], 1, &BTreeMap::from([(1, v1)]));
}
