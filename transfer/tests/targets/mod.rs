//! What must hold for any bytes from outside: a clear error or a value that encodes to itself, never a
//! panic, a hang or a large allocation. Run by the fuzzer and, over the corpus, by `cargo test`.

use anabranch_proto::grant::{Grant, ServeKey};
use anabranch_proto::manifest::{DType, Kind, Manifest, Tensor};
use anabranch_transfer::PartInfo;
use anabranch_transfer::delta;
use anabranch_transfer::layout::expected_header;
use anabranch_transfer::wire::{HEADER_BYTES, Header};

pub const KEY: ServeKey = [42; 32];

/// Tells whether the bytes were taken.
pub type Target = fn(&[u8]) -> bool;

pub const TARGETS: [(&str, Target); 5] =
    [("wire", wire), ("manifest", manifest), ("grant", grant), ("delta", delta), ("part", part)];

/// A data-plane message: 24 bytes of header, then the body that it announced.
pub fn wire(bytes: &[u8]) -> bool {
    let Some((head, rest)) = bytes.split_at_checked(HEADER_BYTES) else { return false };
    let Ok(header) = Header::decode(head.try_into().expect("split there")) else { return false };
    let Some(body) = rest.get(..header.body_bytes()) else { return false };
    let Ok(message) = header.finish(body) else { return false };
    let again = message.to_bytes();
    let (head, body) = again.split_at(HEADER_BYTES);
    let header = Header::decode(head.try_into().expect("24 bytes")).expect("our own header");
    assert_eq!(header.finish(body).expect("our own body"), message);
    true
}

/// A manifest, as a receiver takes it from a peer or from a directory.
pub fn manifest(bytes: &[u8]) -> bool {
    let Ok(manifest) = Manifest::decode(bytes) else { return false };
    assert_eq!(manifest.encode(), bytes, "one manifest has one encoding");
    for index in 0..manifest.chunk_count() {
        let range = manifest.chunk_range(index);
        assert!(range.start < range.end && range.end <= manifest.image_bytes);
    }
    for tensor in &manifest.tensors {
        assert!(tensor.offset + tensor.len <= manifest.image_bytes, "{tensor:?}");
    }
    if manifest.image_bytes < 1 << 30 {
        expected_header(&manifest).ok();
    }
    true
}

/// A grant with a genuine MAC, whatever it says.
pub fn grant(bytes: &[u8]) -> bool {
    Grant::verify(&KEY, bytes).ok();
    let sealed = anabranch_proto::grant::seal(&KEY, bytes.to_vec());
    let Ok(grant) = Grant::verify(&KEY, &sealed) else { return false };
    assert_eq!(&grant.mint(&KEY)[..], &sealed[..], "one grant has one encoding");
    true
}

/// A delta from a peer for a small image with several kinds of tensors.
pub fn delta(bytes: &[u8]) -> bool {
    let (manifest, base) = small_image();
    let mut out = vec![0; base.len()];
    delta::apply(&manifest, bytes, &base, &mut out).is_ok()
}

/// What another sender of a version says of its part.
pub fn part(bytes: &[u8]) -> bool {
    let Ok(part) = PartInfo::decode(bytes) else { return false };
    assert_eq!(PartInfo::decode(&part.encode()).expect("our own part"), part);
    true
}

/// Deterministic; tensors of several kinds and odd sizes.
pub fn small_image() -> (Manifest, Vec<u8>) {
    const LENS: [(DType, u64); 4] =
        [(DType::F32, 400), (DType::BF16, 9000), (DType::F8E4M3, 300), (DType::U8, 77)];
    let mut tensors = Vec::new();
    let mut offset = 64;
    for (nth, (dtype, len)) in LENS.into_iter().enumerate() {
        let shape = vec![len / dtype.bytes() as u64];
        tensors.push(Tensor { name: format!("t{nth}"), dtype, shape, offset, len });
        offset += len;
    }
    let mut state = 0x9E37_79B9_u32;
    let base = (0..offset).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    let manifest = Manifest {
        kind: Kind::Full,
        chunk_bytes: 64 << 10,
        image_bytes: offset,
        tensors,
        chunk_hashes: vec![[0; 32]],
    };
    (manifest, base.collect())
}
