use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::manifest::{Kind, Manifest};
use anabranch_proto::version::Root;

use super::*;
use crate::image::blob::{Backing, Stamp};
use crate::image::chunks::{ChunkSet, Ledger};
use crate::image::exported::MODEL_FILE;
use crate::link::Link;
use crate::link::file::FileLink;
use crate::link::wire::{FailCode, Message, PROTO};

const IMAGE_BYTES: u64 = 100_000;

fn held(number: u64, generation: &Arc<AtomicU64>) -> (Held, SharedMap) {
    let map = SharedMap::anonymous("anabranch-test", IMAGE_BYTES).expect("memfd");
    map.write(0..IMAGE_BYTES, |bytes| bytes.fill(number as u8));
    let hash = |range| map.read(range, |bytes| *blake3::hash(bytes).as_bytes());
    let chunk_hashes = (0..IMAGE_BYTES).step_by(4096);
    let chunk_hashes = chunk_hashes.map(|at| hash(at..IMAGE_BYTES.min(at + 4096))).collect();
    let (image_bytes, tensors) = (IMAGE_BYTES, Vec::new());
    let manifest =
        Manifest { kind: Kind::Full, chunk_bytes: 4096, image_bytes, tensors, chunk_hashes };
    let encoded: Arc<[u8]> = manifest.encode().into();
    let version = Version { epoch: 1, number, root: Root::of(&encoded) };
    let ledger = Arc::new(Ledger::new(ChunkSet::full(manifest.chunk_count())));
    let (file, stamp) = (Backing::Own(Arc::clone(map.backing())), Stamp::of(generation));
    let blob = Blob { file, manifest: Arc::new(manifest), encoded, ledger, stamp };
    (Held::new(version, blob), map)
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).expect("dir").count() - 1
}

#[test]
fn a_version_that_was_overtaken_or_has_no_room_leaves_nothing_and_the_old_one_stays() {
    let dir = tempfile::tempdir().expect("dir");
    let export = Export::open(dir.path(), 2, "math").expect("export");
    let generation = Arc::default();
    let (first, map) = held(1, &generation);
    export.write(&first, &map).expect("written");
    let (second, map) = held(2, &generation);
    generation.fetch_add(1, Ordering::AcqRel);
    let error = export.write(&second, &map).expect_err("its memory is another's");
    assert!(matches!(error, ExportError::Overtaken { .. }), "{error}");
    assert_eq!(entries(dir.path()), 1);
    let error = export.require(second.version(), 1 << 60).expect_err("no disk is so large");
    let text = error.to_string();
    assert!(text.contains("v2@1") && text.contains(&(1u64 << 60).to_string()), "{text}");
}

#[test]
fn a_file_that_is_cut_under_a_reader_is_a_refusal_that_names_it() {
    let dir = tempfile::tempdir().expect("dir");
    let export = Export::open(dir.path(), 2, "math").expect("export");
    let (version, map) = held(1, &Arc::default());
    let at = export.write(&version, &map).expect("written");
    let version = version.version();
    let (job, receiver) = ("math".to_owned(), "e1".to_owned());
    let grant = Grant { job, version, receiver, role: Role::Fetch, ttl_ms: 1000, nonce: 0 };
    let hi =
        Message::Hi { proto: PROTO, base: Root::default(), grant: grant.mint(&[0; 32]).into() };
    let mut link = FileLink::open(dir.path()).expect("link");
    link.set_patience(Duration::from_secs(5)).expect("patience");
    link.send(&hi).expect("sent");
    let welcome = link.receive().expect("answer");
    let want = Message::Welcome { complete: true, delta_complete: false, delta_bytes: 0 };
    assert_eq!(welcome, want);
    let want = |first| Message::Want { blob: BlobId::Image, first, count: 1 };
    link.send(&want(3)).expect("sent");
    assert!(matches!(link.receive().expect("answer"), Message::Chunk { index: 3, len: 4096, .. }));
    link.receive_chunk(&map, 0..4096).expect("bytes");
    assert!(link.is_idle());
    let model = File::options().write(true).open(at.join(MODEL_FILE)).expect("open");
    model.set_len(50_000).expect("cut");
    for (index, why) in [(20, "cannot read"), (25, "chunk 25 of 25")] {
        link.send(&want(index)).expect("sent");
        let Message::Fail { code, text } = link.receive().expect("answer") else {
            panic!("chunk {index} is not there")
        };
        assert!(text.contains(why), "{text}");
        assert_eq!(code == FailCode::NotHeld, index == 20);
    }
    link.closer().expect("closer")();
    assert!(link.receive().is_err() && !link.is_idle());
}
