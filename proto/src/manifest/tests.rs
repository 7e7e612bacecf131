use proptest::prelude::*;

use super::*;

fn tensor(name: &str, offset: u64, shape: &[u64]) -> Tensor {
    let len = tensor_bytes(DType::BF16, shape).expect("small");
    Tensor { name: name.into(), dtype: DType::BF16, shape: shape.to_vec(), offset, len }
}

fn sample() -> Manifest {
    let image_bytes = 10_000;
    Manifest {
        kind: Kind::Full,
        chunk_bytes: 4096,
        image_bytes,
        tensors: vec![tensor("a", 96, &[10, 20]), tensor("b.weight", 496, &[300])],
        chunk_hashes: vec![[1; 32], [2; 32], [3; 32]],
    }
}

fn broken(change: impl FnOnce(&mut Manifest)) -> ManifestError {
    let mut m = sample();
    change(&mut m);
    Manifest::decode(&m.encode()).expect_err("must be refused")
}

#[test]
fn what_is_encoded_is_decoded_and_every_field_moves_the_root() {
    let m = sample();
    assert_eq!(Manifest::decode(&m.encode()), Ok(m.clone()));
    let changes: [fn(&mut Manifest); 5] = [
        |m| m.kind = Kind::Adapter { base: Root([7; 32]) },
        |m| m.tensors[1].offset += 8,
        |m| m.tensors[0].name = "c".into(),
        |m| m.chunk_hashes[2][31] ^= 1,
        |m| m.image_bytes += 1,
    ];
    for change in changes {
        let mut other = m.clone();
        change(&mut other);
        assert_ne!(other.root(), m.root());
    }
}

#[test]
fn overlap_overflow_range_duplicates_and_chunk_counts_are_refused() {
    use ManifestError as E;
    assert!(matches!(broken(|m| m.tensors[1].offset = 494), E::Overlap { .. }));
    assert!(matches!(broken(|m| m.tensors[1].offset = 9_500), E::Outside { .. }));
    assert!(matches!(broken(|m| m.tensors[1].offset = u64::MAX - 8), E::Outside { .. }));
    assert!(matches!(broken(|m| m.tensors[1].name = "a".into()), E::Duplicate(_)));
    assert!(matches!(broken(|m| m.tensors[0].len = 398), E::Length { .. }));
    assert!(matches!(
        broken(|m| m.tensors[0].shape = vec![u64::MAX, u64::MAX, 3]),
        E::Length { .. }
    ));
    assert!(matches!(broken(|m| m.chunk_hashes.truncate(2)), E::ChunkCount { .. }));
    assert!(matches!(broken(|m| m.chunk_bytes = 0), E::ChunkBytes(0)));
    assert!(matches!(broken(|m| m.tensors.swap(0, 1)), E::Overlap { .. }));
    let base = Root([1; 32]);
    assert!(matches!(broken(|m| m.kind = Kind::Delta { base, result: base }), E::DeltaTensors(2)));
}

#[test]
fn a_manifest_cut_anywhere_or_with_a_tail_is_refused() {
    let mut bytes = sample().encode();
    for cut in 0..bytes.len() {
        assert!(Manifest::decode(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    bytes.push(0);
    assert_eq!(Manifest::decode(&bytes), Err(ManifestError::Trailing(1)));
}

#[test]
fn a_count_that_claims_gigabytes_allocates_nothing() {
    let mut bytes = sample().encode();
    bytes[17..21].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(
        Manifest::decode(&bytes),
        Err(ManifestError::Short { .. }
            | ManifestError::Code { .. }
            | ManifestError::Name { .. }
            | ManifestError::Dimensions { .. })
    ));
}

#[test]
fn dtype_names_and_codes_go_both_ways() {
    for d in DType::ALL {
        assert_eq!(DType::from_name(d.name()), Some(d));
        assert_eq!(DType::from_code(d as u8), Some(d));
    }
}

proptest! {
    #[test]
    fn decoding_never_panics_and_is_canonical(
        at in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        cut in any::<prop::sample::Index>(),
        keep in any::<bool>(),
    ) {
        let mut bytes = sample().encode();
        for (ix, value) in at {
            let ix = ix.index(bytes.len());
            bytes[ix] = value;
        }
        if !keep {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(m) = Manifest::decode(&bytes) {
            prop_assert_eq!(m.encode(), bytes);
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut with_magic = MAGIC.to_vec();
        with_magic.extend(&bytes);
        let _ = Manifest::decode(&bytes);
        let _ = Manifest::decode(&with_magic);
    }
}
