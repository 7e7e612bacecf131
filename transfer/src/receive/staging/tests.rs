// One range is a set of chunks here, not a mistake for its members.
#![allow(clippy::single_range_in_vec_init)]

use anabranch_proto::manifest::{DType, Kind};
use anabranch_proto::version::Root;

use super::*;
use crate::image::exported::MODEL_FILE;
use crate::image::layout::{Layout, TensorSpec};

fn image(fill: u8) -> (Arc<Manifest>, Vec<u8>) {
    let spec = TensorSpec { name: "w".into(), dtype: DType::U8, shape: vec![20_000] };
    let layout = Layout::new(&[spec]).expect("layout");
    let mut bytes = layout.header().to_vec();
    bytes.resize(layout.image_bytes() as usize, fill);
    let chunk_hashes = bytes.chunks(4096).map(|c| *blake3::hash(c).as_bytes()).collect();
    let manifest = Manifest {
        kind: Kind::Full,
        chunk_bytes: 4096,
        image_bytes: layout.image_bytes(),
        tensors: layout.tensors().to_vec(),
        chunk_hashes,
    };
    (Arc::new(manifest), bytes)
}

fn fill(staging: &Staging, fill: u8) -> Result<StagedSlot, StageError> {
    let (manifest, bytes) = image(fill);
    let filling = staging.begin(&manifest, false)?;
    for index in 0..manifest.chunk_count() {
        let range = manifest.chunk_range(index);
        let from = &bytes[range.start as usize..range.end as usize];
        filling.filler().map().write(range, |to| to.copy_from_slice(from));
        filling.filler().verified(index).expect("record");
    }
    filling.publish(Version { epoch: 1, number: u64::from(fill), root: Root([fill; 32]) })
}

fn staging() -> (tempfile::TempDir, Staging) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("shm");
    let staging = Staging::open(dir.path(), "a").expect("staging");
    (dir, staging)
}

#[test]
fn a_staged_slot_is_never_given_away_and_a_dropped_one_is() {
    let (_dir, staging) = staging();
    let first = fill(&staging, 1).expect("first");
    let second = fill(&staging, 2).expect("second");
    let busy = fill(&staging, 3).err().expect("both are staged");
    assert!(matches!(busy, StageError::Busy { .. }), "{busy}");
    drop(first);
    let third = fill(&staging, 3).expect("the first slot");
    let bytes = fs::read(second.dir().join(MODEL_FILE)).expect("second");
    assert_eq!(bytes, image(2).1);
    assert_eq!(fs::read(third.dir().join(MODEL_FILE)).expect("third"), image(3).1);
}

#[test]
fn an_unfinished_slot_keeps_its_chunks_for_the_next_try() {
    let (_dir, staging) = staging();
    let (manifest, bytes) = image(1);
    let filling = staging.begin(&manifest, false).expect("begin");
    filling.filler().map().write(4096..8192, |to| to.copy_from_slice(&bytes[4096..8192]));
    filling.filler().verified(1).expect("record");
    drop(filling);
    let again = staging.begin(&manifest, false).expect("again");
    assert_eq!(again.filler().ledger.snapshot().ranges(), [1..2]);
}

#[test]
fn an_earlier_life_leaves_slots_and_no_directories() {
    let (dir, staging) = staging();
    let staged = fill(&staging, 1).expect("staged");
    let stale = dir.path().join("a/v9-left-by-a-kill-s0");
    fs::create_dir(&stale).expect("dir");
    drop((staged, staging));
    let other = dir.path().join("of-someone-else");
    fs::create_dir(&other).expect("dir");
    let staging = Staging::open(dir.path(), "a").expect("reopened");
    assert!(!stale.exists() && other.exists());
    let (manifest, _) = image(1);
    let filling = staging.begin(&manifest, false).expect("begin");
    assert!(filling.filler().ledger.is_full(), "all of it is still here and was hashed again");
}

#[test]
fn too_little_shared_memory_is_said_with_the_flag_that_helps() {
    let (_dir, staging) = staging();
    let error = staging.check_space(1 << 50).expect_err("too small").to_string();
    assert!(error.contains("--shm-size") && error.contains("medium: Memory"), "{error}");
    staging.check_space(1 << 20).expect("fits");
}
