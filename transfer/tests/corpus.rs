//! The parsers' targets over inputs that the fuzzer found, and over valid ones with single bytes changed.
//! `scripts/fuzz.sh` looks for more.

mod targets;

use std::path::{Path, PathBuf};

use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::manifest::{DType, Kind, Manifest, Tensor};
use anabranch_proto::version::{Root, Version};
use anabranch_transfer::delta;
use anabranch_transfer::layout::TensorSpec;
use anabranch_transfer::wire::{BlobId, FailCode, Message, PROTO};
use anabranch_transfer::{PieceRef, Publisher, PublisherConfig};
use targets::{KEY, TARGETS, Target, small_image};

#[test]
fn what_the_fuzzer_found_is_taken_or_refused() {
    for (name, target) in TARGETS {
        for entry in std::fs::read_dir(corpus(name)).expect("a corpus") {
            target(&std::fs::read(entry.expect("entry").path()).expect("readable"));
        }
    }
}

/// The fuzzer starts from them: without a valid input it finds no way past a magic.
#[test]
fn the_corpus_has_a_valid_input_of_each_kind() {
    for (name, target) in TARGETS {
        for (nth, seed) in seeds(name).into_iter().enumerate() {
            assert!(target(&seed), "{name}: seed {nth} is not valid");
            let path = corpus(name).join(format!("seed-{nth}"));
            if std::env::var_os("UPDATE_CORPUS").is_some() {
                std::fs::write(&path, &seed).expect("written");
            }
            let kept = std::fs::read(&path).expect("a seed");
            assert!(kept == seed, "the format changed: run this test with UPDATE_CORPUS=1");
        }
    }
}

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target)
}

#[test]
fn valid_inputs_with_one_byte_changed_or_cut_are_taken_or_refused() {
    for (name, target) in TARGETS {
        for seed in seeds(name) {
            damage(target, &seed);
        }
    }
}

fn damage(target: Target, seed: &[u8]) {
    target(seed);
    for at in 0..seed.len() {
        target(&seed[..at]);
        for flip in [1, 0x80, 0xFF] {
            let mut damaged = seed.to_vec();
            damaged[at] ^= flip;
            target(&damaged);
        }
    }
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "wire" => messages().iter().map(Message::to_bytes).collect(),
        "manifest" => manifests().iter().map(Manifest::encode).collect(),
        "grant" => vec![grant(Role::Fetch), grant(Role::Feed)],
        "part" => (0..2).map(part).collect(),
        _ => [(1, 1), (3, 7), (1, 200)].map(|(every, step)| delta_blob(every, step)).to_vec(),
    }
}

/// Of each kind; with several chunks, without dimensions, without tensors.
fn manifests() -> Vec<Manifest> {
    let (base, result) = (Root([1; 32]), Root([2; 32]));
    let full = small_image().0;
    let (chunk_bytes, mut tensors) = (4 << 10, full.tensors.clone());
    tensors[0].shape = vec![2, 5, 10];
    let (name, shape) = ("scale".to_owned(), Vec::new());
    let (offset, len) = (full.image_bytes.next_multiple_of(4), 4);
    tensors.push(Tensor { name, dtype: DType::F32, shape, offset, len });
    let image_bytes = offset + len;
    let hashes = |bytes: u64| vec![[7; 32]; bytes.div_ceil(chunk_bytes) as usize];
    let chunk_hashes = hashes(image_bytes);
    let (kind, chunk_bytes) = (Kind::Adapter { base }, chunk_bytes as u32);
    let adapter = Manifest { kind, chunk_bytes, image_bytes, tensors, chunk_hashes };
    let (kind, chunk_hashes) = (Kind::Delta { base, result }, hashes(5000));
    let delta =
        Manifest { kind, chunk_bytes, image_bytes: 5000, tensors: Vec::new(), chunk_hashes };
    vec![full, adapter, delta]
}

/// Of two senders of one version, with pieces of chunks that neither has.
fn part(sender: u64) -> Vec<u8> {
    let config = PublisherConfig { chunk_bytes: 4 << 10, ..PublisherConfig::loopback("math", 1) };
    let publisher = Publisher::start(config).expect("started");
    let (name, shape) = ("w".to_owned(), vec![20_000]);
    let spec = TensorSpec { name, dtype: DType::U8, shape };
    let (data, offset) = (vec![sender as u8; 10_000], sender * 10_000);
    let piece = PieceRef { tensor: "w", offset, data: &data };
    let part = publisher.publish_part(1, &[spec], &[piece]).expect("published");
    part.wait().expect("hashed").info().encode()
}

fn messages() -> Vec<Message> {
    let (blob, code) = (BlobId::Delta, FailCode::NotYet);
    vec![
        Message::Hi { proto: PROTO, base: Root([3; 32]), grant: vec![1; 40] },
        Message::Offer { proto: PROTO, grant: vec![1; 40] },
        Message::WantManifest { blob },
        Message::Manifest { blob, bytes: vec![9; 40] },
        Message::Want { blob, first: 7, count: 2 },
        Message::Have { ranges: vec![0..1, 5..9] },
        Message::Fail { code, text: "soon".into() },
    ]
}

fn grant(role: Role) -> Vec<u8> {
    let version = Version { epoch: 1, number: 2, root: Root([5; 32]) };
    let (job, receiver) = ("math".to_owned(), "e1".to_owned());
    let sealed = Grant { job, version, receiver, role, ttl_ms: 5, nonce: 6 }.mint(&KEY);
    sealed[..sealed.len() - 32].to_vec()
}

/// Every 40 x `every`-th byte moved by `step`.
fn delta_blob(every: usize, step: u8) -> Vec<u8> {
    let (manifest, base) = small_image();
    let mut new = base.clone();
    new[64..].iter_mut().step_by(40 * every).for_each(|byte| *byte = byte.wrapping_add(step));
    delta::encode(&manifest, &base, &new, 1, &|_, _| true).expect("not given up")
}
