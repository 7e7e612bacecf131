use anabranch_proto::manifest::{DType, Kind};
use anabranch_proto::version::Version;

use super::*;
use crate::delta::{chain, encode};
use crate::image::layout::{Layout, TensorSpec};
use crate::receive::staging::{Filling, StagedSlot, Staging};

const CHUNK_BYTES: u32 = 64 << 10;
const ELEMENTS: u64 = 2 << 20;

fn manifest(image: &[u8], layout: &Layout) -> Arc<Manifest> {
    let hash = |chunk: &[u8]| *blake3::hash(chunk).as_bytes();
    Arc::new(Manifest {
        kind: Kind::Full,
        chunk_bytes: CHUNK_BYTES,
        image_bytes: image.len() as u64,
        tensors: layout.tensors().to_vec(),
        chunk_hashes: image.chunks(CHUNK_BYTES as usize).map(hash).collect(),
    })
}

/// Two images of which each block differs much, and what they are images of.
fn images() -> (Layout, Vec<u8>, Vec<u8>) {
    let (name, shape) = ("w".to_owned(), vec![ELEMENTS]);
    let layout = Layout::new(&[TensorSpec { name, dtype: DType::BF16, shape }]).expect("layout");
    let data = |salt: u64| {
        let byte = |at: u64| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u8;
        (0..2 * ELEMENTS).map(move |at| byte(at) ^ u8::from(salt > 0 && at % 14 == 0))
    };
    let image = |salt| layout.header().iter().copied().chain(data(salt)).collect::<Vec<u8>>();
    let (old, new) = (image(0), image(1));
    (layout, old, new)
}

fn staged(staging: &Staging, image: &[u8], manifest: &Arc<Manifest>) -> StagedSlot {
    let filling = staging.begin(manifest, false).expect("a slot");
    let filler = filling.filler();
    filler.write_unverified(0, image, &ChunkSet::empty(manifest.chunk_count()));
    (0..manifest.chunk_count()).for_each(|chunk| filler.verify(chunk));
    filling.publish(version(manifest)).expect("staged")
}

fn version(manifest: &Manifest) -> Version {
    Version { epoch: 1, number: 1, root: manifest.root() }
}

struct Setup {
    _dir: tempfile::TempDir,
    _base: StagedSlot,
    filling: Filling,
    arriving: Arriving,
}

/// A slot to fill from a staged base, and a delta of which nothing is here yet; `change` may spoil it.
fn setup(change: impl FnOnce(&mut Vec<u8>)) -> Setup {
    let dir = tempfile::tempdir_in("/dev/shm").expect("shm");
    let staging = Staging::open(dir.path(), "agent").expect("staging");
    let (layout, old, new) = images();
    let (old_manifest, new_manifest) = (manifest(&old, &layout), manifest(&new, &layout));
    let base = staged(&staging, &old, &old_manifest);
    let filling = staging.begin(&new_manifest, false).expect("a slot");
    let coded = encode(&new_manifest, &old, &new, 1, &|_, _| true).expect("coded");
    let from = old_manifest.root();
    let mut blob = [&chain::head(from, coded.len() as u64)[..], &coded].concat();
    change(&mut blob);
    let map = SharedMap::anonymous("anabranch-test", blob.len() as u64).expect("memfd");
    map.write(0..blob.len() as u64, |out| out.copy_from_slice(&blob));
    let kind = Kind::Delta { base: from, result: new_manifest.root() };
    let mut delta = Manifest::clone(&manifest(&blob, &layout));
    (delta.kind, delta.tensors) = (kind, Vec::new());
    let ledger = Arc::new(Ledger::new(ChunkSet::empty(delta.chunk_count())));
    let (map, manifest, ended) = (Arc::new(map), Arc::new(delta), AtomicBool::new(false));
    let arriving = Arriving { map, manifest, ledger, ended };
    Setup { _dir: dir, _base: base, filling, arriving }
}

fn insert(arriving: &Arriving, chunks: Range<u32>) {
    for chunk in chunks {
        arriving.ledger.insert(chunk);
    }
}

#[test]
fn chunks_are_verified_before_the_delta_is_all_here() {
    let Setup { filling, arriving, .. } = &setup(|_| ());
    let (base, verified) = (filling.base().expect("staged"), &filling.filler().ledger);
    let last = arriving.manifest.chunk_count() - 1;
    assert!(last > 1, "one chunk proves nothing");
    std::thread::scope(|scope| {
        let applier = scope.spawn(|| apply(arriving, &base, filling.filler()));
        insert(arriving, 0..last);
        let early = verified.wait_beyond(0, Duration::from_secs(30));
        assert!(early.count() > 0 && !verified.is_full(), "{} chunks", early.count());
        arriving.ledger.insert(last);
        let applied = applier.join().expect("no panic").expect("applied");
        assert_eq!(applied.bytes, filling.filler().manifest().image_bytes);
    });
    assert!(verified.is_full());
}

#[test]
fn a_delta_that_stops_coming_leaves_the_rest_unverified() {
    let Setup { filling, arriving, .. } = &setup(|_| ());
    let base = filling.base().expect("staged");
    let last = arriving.manifest.chunk_count() - 1;
    insert(arriving, 0..last);
    arriving.ended.store(true, Ordering::Release);
    let applied = apply(arriving, &base, filling.filler()).expect("nothing was wrong");
    let verified = filling.filler().ledger.snapshot();
    assert!(applied.bytes > 0 && verified.count() > 0 && !verified.is_full());
}

#[test]
fn a_delta_from_another_base_or_with_a_wrong_block_verifies_nothing_wrong() {
    let spoil: [fn(&mut Vec<u8>); 3] =
        [|blob| blob[0] ^= 1, |blob| *blob.last_mut().expect("bytes") ^= 0x10, |blob| blob[41] = 0];
    for change in spoil {
        let Setup { filling, arriving, .. } = &setup(change);
        let base = filling.base().expect("staged");
        insert(arriving, 0..arriving.manifest.chunk_count());
        // Whether it says so or not: no hash of the version fits.
        let _ = apply(arriving, &base, filling.filler());
        assert!(!filling.filler().ledger.is_full());
    }
}
