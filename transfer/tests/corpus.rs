//! The parsers' targets over inputs that the fuzzer found, and over valid ones with single bytes changed.
//! `scripts/fuzz.sh` looks for more.

mod targets;

use std::path::{Path, PathBuf};

use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::version::{Root, Version};
use anabranch_transfer::delta;
use anabranch_transfer::wire::{BlobId, FailCode, Message, PROTO};
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
    for (name, _) in TARGETS {
        for (nth, seed) in seeds(name).into_iter().enumerate() {
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
        "manifest" => vec![small_image().0.encode()],
        "grant" => vec![grant(Role::Fetch), grant(Role::Feed)],
        _ => [(1, 1), (3, 7), (1, 200)].map(|(every, step)| delta_blob(every, step)).to_vec(),
    }
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
