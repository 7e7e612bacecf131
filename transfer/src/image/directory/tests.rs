use std::os::unix::fs::FileExt;

use anabranch_proto::manifest::DType;

use super::*;

/// Two shards, tensors in an order that is not the image's.
fn shards(dir: &Path, fill: u8) {
    let data = |len: usize| (0..len).map(|at| (at as u8).wrapping_mul(fill)).collect::<Vec<u8>>();
    let file = |name: &str, tensors: &[(&str, DType, &[u64])]| {
        let spec = |(name, dtype, shape): &(&str, DType, &[u64])| TensorSpec {
            name: (*name).into(),
            dtype: *dtype,
            shape: shape.to_vec(),
        };
        let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
        let layout = Layout::new(&specs).expect("layout");
        let mut bytes = layout.header().to_vec();
        bytes.extend(data(layout.image_bytes() as usize - bytes.len()));
        fs::write(dir.join(name), bytes).expect("write");
    };
    file("model-1.safetensors", &[("norm", DType::F32, &[7]), ("a", DType::BF16, &[900, 1000])]);
    file("model-2.safetensors", &[("b", DType::BF16, &[800, 1000]), ("scale", DType::F64, &[3])]);
}

fn version(root: Root) -> Version {
    Version { epoch: 0, number: 1, root }
}

fn options() -> ReadOptions {
    ReadOptions { threads: 2, ..ReadOptions::default() }
}

#[test]
fn a_directory_has_the_root_that_its_tensors_have_when_they_are_published() {
    let dir = tempfile::tempdir().expect("dir");
    shards(dir.path(), 3);
    let indexed = index_directory(dir.path(), &options()).expect("index");
    let publisher = crate::Publisher::start(crate::PublisherConfig::loopback("math", 0));
    let published = publisher.expect("start").publish_directory(1, dir.path()).expect("publish");
    let published = published.wait().expect("sealed");
    assert_eq!(indexed.root, published.version.root);
    assert_eq!(indexed.manifest, published.manifest);
    let verified = verify_directory(dir.path(), published.version, &options()).expect("verified");
    assert_eq!(verified.manifest, published.manifest);
    // Without the manifest in the directory it is the root that decides.
    fs::remove_file(dir.path().join(MANIFEST_FILE)).expect("left by the index");
    verify_directory(dir.path(), published.version, &options()).expect("verified");
}

#[test]
fn a_wrong_byte_is_placed_by_the_manifest_and_found_without_it() {
    let dir = tempfile::tempdir().expect("dir");
    shards(dir.path(), 3);
    let v = version(index_directory(dir.path(), &options()).expect("index").root);
    let path = dir.path().join("model-2.safetensors");
    let file = fs::File::options().write(true).open(&path).expect("open");
    file.write_all_at(&[0xEE], 1_200_000).expect("write");
    let verify = || verify_directory(dir.path(), v, &options()).err().expect("refused").to_string();
    let text = verify();
    assert!(text.contains("tensor `b`") && text.contains("does not hold v1"), "{text}");
    fs::write(dir.path().join(MANIFEST_FILE), b"rubbish").expect("write");
    let text = verify();
    assert!(text.contains(&v.root.to_string()) && text.contains("have root"), "{text}");
    file.set_len(1_000_000).expect("cut");
    assert!(verify().contains("truncated"));
    fs::remove_file(&path).expect("remove");
    assert!(verify().contains("have root"), "a shard is missing");
}

#[test]
fn a_directory_that_goes_or_changes_while_it_is_read_is_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let at = dir.path().join("v1");
    fs::create_dir(&at).expect("dir");
    shards(&at, 3);
    let indexed = index_directory(&at, &options()).expect("index");
    let v = version(indexed.root);
    let during = |act: fn(&Path)| {
        let at = at.clone();
        let once = AtomicBool::new(false);
        let progress = move |_| {
            if !once.swap(true, Ordering::Relaxed) {
                act(&at);
            }
        };
        ReadOptions { threads: 1, progress: Some(Arc::new(progress)), ..ReadOptions::default() }
    };
    let read = |options: &ReadOptions| {
        verify_directory(&at, v, options).err().expect("refused").to_string()
    };
    let replaced = read(&during(|at| {
        let (from, to) = (at.join("model-1.safetensors"), at.join("copy"));
        fs::copy(&from, &to).expect("copy");
        fs::rename(&to, &from).expect("rename");
    }));
    assert!(replaced.contains("model-1.safetensors changed while it was used"), "{replaced}");
    let one_more = read(&during(|at| {
        fs::write(at.join("model-3.safetensors"), b"").expect("write");
    }));
    assert!(one_more.contains("changed while it was used"), "{one_more}");
    fs::remove_file(at.join("model-3.safetensors")).expect("remove");
    let gone = read(&during(|at| fs::remove_dir_all(at).expect("remove")));
    assert!(gone.contains("cannot look at"), "{gone}");
    assert!(indexed.stamp.check().is_err());
    let cancelled = ReadOptions::default();
    shards(
        {
            fs::create_dir(&at).expect("dir");
            &at
        },
        3,
    );
    cancelled.cancel.cancel();
    assert!(read(&cancelled).contains("was cancelled"));
}
