use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorView};

use super::*;

fn write(path: &Path, tensors: &[(&str, Dtype, Vec<usize>)]) {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, d, s)| vec![7; s.iter().product::<usize>() * d.bitsize() / 8])
        .collect();
    let views: HashMap<&str, TensorView<'_>> = tensors
        .iter()
        .zip(&data)
        .map(|((n, d, s), b)| (*n, TensorView::new(*d, s.clone(), b).expect("view")))
        .collect();
    safetensors::serialize_to_file(views, None, path).expect("write");
}

fn raw(dir: &Path, header: &str, data: usize) -> Result<Checkpoint, CheckpointError> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    fs_write(dir, &bytes);
    Checkpoint::open(dir)
}

fn fs_write(dir: &Path, bytes: &[u8]) {
    std::fs::write(dir.join("model.safetensors"), bytes).expect("write");
}

#[test]
fn a_sharded_directory_is_read_as_one() {
    let dir = tempfile::tempdir().expect("dir");
    let (bf16, f32) = (Dtype::BF16, Dtype::F32);
    write(&dir.path().join("a-1.safetensors"), &[("x", bf16, vec![2, 3]), ("s", f32, vec![])]);
    write(&dir.path().join("a-2.safetensors"), &[("y", f32, vec![4])]);
    let read = Checkpoint::open(dir.path()).expect("checkpoint");
    assert_eq!((read.tensors().len(), read.baseline().len()), (3, 3));
    let y = read.tensors().iter().find(|t| t.name == "y").expect("y");
    let mut out = vec![0; y.len as usize];
    read.read_into(y, &mut out).expect("read");
    assert_eq!(out, [7; 16]);
    write(&dir.path().join("a-3.safetensors"), &[("x", bf16, vec![2, 3])]);
    assert!(matches!(Checkpoint::open(dir.path()), Err(CheckpointError::Duplicate { .. })));
}

#[test]
fn broken_files_are_refused_with_their_name_and_fault() {
    let dir = tempfile::tempdir().expect("dir");
    let dir = dir.path();
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::NoFiles(_))));
    fs_write(dir, &[1, 2, 3]);
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::Truncated { promised: 8, .. })));
    fs_write(dir, &u64::MAX.to_le_bytes());
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::Header { .. })));
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!("{{\"t\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{offsets}}}}}")
    };
    let f32 = |shape, offsets| tensor("F32", shape, offsets);
    assert!(raw(dir, &f32("[2]", "[0,8]"), 8).is_ok());
    for (header, data, want) in [
        (f32("[2]", "[0,8]"), 7, "truncated: its header promises"),
        (f32("[2]", "[0,8]"), 9, "1 bytes after its last tensor"),
        (f32("[3]", "[0,8]"), 8, "does not give 8 bytes"),
        (f32("[2]", "[8,0]"), 8, "ends before it starts"),
        (f32("[2]", "[4,12]"), 12, "leaves a hole"),
        (f32("[2]", "[18446744073709551608,18446744073709551616]"), 8, "`t`"),
        (f32("[4611686018427387904,4]", "[0,0]"), 0, "does not give"),
        (tensor("F4", "[4]", "[0,2]"), 2, "F4 is not supported"),
        ("{".to_owned(), 0, "not a safetensors file"),
    ] {
        let error = raw(dir, &header, data).expect_err(want).to_string();
        assert!(error.contains(want), "{want}: {error}");
    }
}

#[test]
fn a_diff_names_what_is_wrong_and_counts_the_rest() {
    let one = |n: &str, d, s: &[u64]| (n.to_owned(), d, s.to_vec());
    let engine = Baseline::from_tensors(
        (0..8)
            .map(|i| one(&format!("l{i}"), DType::BF16, &[4]))
            .chain([one("n", DType::BF16, &[2, 2]), one("d", DType::BF16, &[1])]),
    );
    let version = Baseline::from_tensors([
        one("n", DType::BF16, &[4]),
        one("d", DType::F32, &[1]),
        one("z", DType::U8, &[1]),
    ]);
    let tensors = version.tensors.iter().map(|(name, (dtype, shape))| {
        let (name, dtype, shape) = (name.clone(), *dtype, shape.clone());
        anabranch_proto::manifest::Tensor { name, dtype, shape, offset: 0, len: 0 }
    });
    let manifest = Manifest {
        kind: anabranch_proto::manifest::Kind::Full,
        chunk_bytes: 4096,
        image_bytes: 0,
        tensors: tensors.collect(),
        chunk_hashes: vec![],
    };
    let text = engine.compare(&manifest).expect_err("differs").to_string();
    assert_eq!(
        text,
        "missing: `l0`, `l1`, `l2`, `l3`, `l4`, and 3 more; extra: `z`; other shape: `n` is [4], \
         the engine has [2, 2]; other dtype: `d` is F32, the engine has BF16"
    );
}
