//! One version from several senders, each with a part of it, over real sockets.

// What a part gives has no Debug: `expect_err` would ask for it.
#![allow(clippy::err_expect)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use anabranch_proto::address::Address;
use anabranch_proto::version::Version;
use anabranch_transfer::layout::TensorSpec;
use anabranch_transfer::{
    FetchRequest, Part, PartInfo, PieceRef, PublishError, Published, Publisher, Sender, SourceRef,
};
use common::*;

fn specs(weights: &Weights) -> Vec<TensorSpec> {
    let spec = |(name, dtype, shape, _): &(String, _, Vec<u64>, _)| TensorSpec {
        name: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
    };
    weights.tensors.iter().map(spec).collect()
}

/// Whole tensors, by their place in the list.
fn tensors(weights: &Weights, which: impl Fn(usize) -> bool) -> Vec<PieceRef<'_>> {
    let mine = weights.tensors.iter().enumerate().filter(|(ix, _)| which(*ix));
    mine.map(|(_, (name, _, _, data))| PieceRef { tensor: name, offset: 0, data }).collect()
}

/// Shards along dimension 0, as FSDP makes them: a third of each tensor, cut at odd places.
fn shards(weights: &Weights, rank: usize) -> Vec<PieceRef<'_>> {
    let mut pieces = Vec::new();
    for (tensor, _, _, data) in &weights.tensors {
        let (start, end) = (data.len() * rank / 3, data.len() * (rank + 1) / 3);
        pieces.push(PieceRef { tensor, offset: start as u64, data: &data[start..end] });
    }
    pieces
}

fn part(publisher: &Publisher, number: u64, weights: &Weights, pieces: &[PieceRef<'_>]) -> Part {
    let publishing = publisher.publish_part(number, &specs(weights), pieces).expect("published");
    publishing.wait().expect("hashed")
}

/// As over a trainer's collective: as bytes.
fn gather(parts: &[Part]) -> Vec<PartInfo> {
    let passed = |part: &Part| PartInfo::decode(&part.info().encode()).expect("as it was");
    parts.iter().map(passed).collect()
}

fn seal(parts: Vec<Part>) -> Vec<Published> {
    let infos = gather(&parts);
    parts.into_iter().map(|part| part.seal(&infos).expect("sealed")).collect()
}

fn sources(publishers: &[Publisher], published: &Published) -> Vec<SourceRef> {
    let one = |(ix, publisher): (usize, &Publisher)| {
        source(&format!("rank {ix}"), &publisher.addresses()[0], published.version)
    };
    publishers.iter().enumerate().map(one).collect()
}

/// The version that one sender which has everything would make.
fn root_of_one(number: u64, weights: &Weights) -> Version {
    publish(&publisher(), number, weights).version
}

#[test]
fn two_senders_with_half_each_make_the_version_that_one_makes() {
    let weights = Weights::new(24, 1);
    let publishers = [publisher(), publisher()];
    let parts = vec![
        part(&publishers[0], 1, &weights, &tensors(&weights, |ix| ix < 11)),
        part(&publishers[1], 1, &weights, &tensors(&weights, |ix| ix >= 11)),
    ];
    let published = seal(parts);
    assert_eq!(published[0].version, published[1].version);
    assert_eq!(published[0].version, root_of_one(1, &weights));
    let v = published[0].version;
    let receiver = receiver();
    let fetched = receiver.fetcher.fetch_blocking(&request(v, sources(&publishers, &published[0])));
    let staged = fetched.expect("fetch");
    assert_holds(staged.dir(), &weights);
    assert_eq!(staged.report.received_bytes, published[0].bytes, "every chunk came once");
    let sent = published.iter().map(Published::sent_bytes).collect::<Vec<_>>();
    assert!(sent.iter().all(|bytes| *bytes > 8 << 20), "both gave: {sent:?}");
}

#[test]
fn three_senders_whose_parts_alternate_within_chunks_and_tensors() {
    let weights = Weights::new(12, 2);
    let publishers = [publisher(), publisher(), publisher()];
    let parts =
        (0..3).map(|rank| part(&publishers[rank], 7, &weights, &shards(&weights, rank))).collect();
    let published = seal(parts);
    assert!(published.iter().all(|p| p.version == root_of_one(7, &weights)));
    let v = published[0].version;
    let receiver = receiver();
    let fetched = receiver.fetcher.fetch_blocking(&request(v, sources(&publishers, &published[0])));
    assert_holds(fetched.expect("fetch").dir(), &weights);
}

#[test]
fn versions_in_parts_follow_each_other_in_the_same_memory() {
    let (publishers, receiver) = ([publisher(), publisher()], receiver());
    let mut serving = None;
    for number in 1..=4 {
        // The border moves in the middle: memory of another extent.
        let border = if number < 3 { 3 } else { 6 };
        let weights = Weights::new(8, number);
        let mine = |rank: usize| tensors(&weights, move |ix| (ix < border) == (rank == 0));
        let parts = (0..2).map(|rank| part(&publishers[rank], number, &weights, &mine(rank)));
        let published = seal(parts.collect());
        let sources = sources(&publishers, &published[0]);
        let fetched = receiver.fetcher.fetch_blocking(&request(published[0].version, sources));
        let staged = fetched.expect("fetch");
        assert_holds(staged.dir(), &weights);
        // A version before that one is no base of a delta, and is served still.
        assert_eq!(published[1].delta_bytes, None);
        assert!(publishers[0].server().holder().versions().len() <= 2);
        serving = Some(staged);
    }
    drop(serving);
    // One of them has all of the next one.
    let weights = Weights::new(8, 5);
    let version = publish(&publishers[0], 5, &weights).version;
    let fetched =
        receiver.fetcher.fetch_blocking(&request(version, vec![from(&publishers[0], version)]));
    assert_holds(fetched.expect("fetch").dir(), &weights);
}

#[test]
fn a_sender_that_dies_is_stood_in_for_by_one_that_has_everything() {
    let weights = Weights::new(32, 3);
    let publishers = [publisher(), publisher(), publisher()];
    let parts = vec![
        part(&publishers[0], 1, &weights, &tensors(&weights, |ix| ix < 17)),
        part(&publishers[1], 1, &weights, &tensors(&weights, |ix| ix >= 17)),
    ];
    let published = seal(parts);
    // All of the chunks: an ordinary publisher of the same bytes.
    let whole = publish(&publishers[2], 1, &weights);
    let v = published[0].version;
    assert_eq!(whole.version, v);
    let dying = Proxy::start(&publishers[0].addresses()[0], Fault::DieAfter(6 << 20));
    let mut sources = sources(&publishers, &published[0]);
    sources[0].addrs = vec![Address::Tcp(dying.addr.into())];
    let receiver = receiver();
    let staged = receiver.fetcher.fetch_blocking(&request(v, sources)).expect("fetch");
    assert_holds(staged.dir(), &weights);
    assert!(whole.sent_bytes() > 0);
}

/// As planned: the senders are the parent of both stripes, and another holder may stand in for them.
fn planned(mut sources: Vec<SourceRef>, senders: usize, version: Version) -> FetchRequest {
    for source in &mut sources[..senders] {
        (source.stripes, source.origin) = (vec![0, 1], "trainer".to_owned());
    }
    sources[senders..].iter_mut().for_each(|source| source.fallback_for = vec![0, 1]);
    FetchRequest { stripe_count: 2, ..request(version, sources) }
}

#[test]
fn with_a_plan_every_chunk_comes_from_the_sender_that_has_it() {
    let weights = Weights::new(24, 3);
    let publishers = [publisher(), publisher(), publisher(), publisher()];
    let parts = (0..3).map(|rank| part(&publishers[rank], 1, &weights, &shards(&weights, rank)));
    let published = seal(parts.collect());
    let whole = publish(&publishers[3], 1, &weights);
    let request = planned(sources(&publishers, &published[0]), 3, whole.version);
    let receiver = receiver();
    let staged = receiver.fetcher.fetch_blocking(&request).expect("fetch");
    assert_holds(staged.dir(), &weights);
    assert_eq!(staged.report.received_bytes, whole.bytes, "every chunk came once");
    assert_eq!(whole.sent_bytes(), 0, "nobody had to stand in");
    let sent: Vec<u64> = published.iter().map(Published::sent_bytes).collect();
    // Most chunks are held by two of them.
    assert!(sent.iter().all(|bytes| *bytes > 1 << 20), "all gave: {sent:?}");
}

#[test]
fn with_a_plan_a_senders_part_comes_from_the_stand_in_as_soon_as_it_is_lost() {
    let weights = Weights::new(24, 4);
    let publishers = [publisher(), publisher(), publisher()];
    let parts = vec![
        part(&publishers[0], 1, &weights, &tensors(&weights, |ix| ix < 13)),
        part(&publishers[1], 1, &weights, &tensors(&weights, |ix| ix >= 13)),
    ];
    let published = seal(parts);
    let whole = publish(&publishers[2], 1, &weights);
    let dying = Proxy::start(&publishers[1].addresses()[0], Fault::DieAfter(4 << 20));
    let mut sources = sources(&publishers, &published[0]);
    sources[1].addrs = vec![Address::Tcp(dying.addr.into())];
    let request = planned(sources, 2, whole.version);
    let receiver = receiver();
    let started = Instant::now();
    let staged = receiver.fetcher.fetch_blocking(&request).expect("fetch");
    assert_holds(staged.dir(), &weights);
    assert!(started.elapsed() < Duration::from_secs(10), "not by the patience with a stuck stripe");
    let (first, stand_in) = (published[0].sent_bytes(), whole.sent_bytes());
    assert!(first > 8 << 20 && (1 << 20..14 << 20).contains(&stand_in), "{first}, {stand_in}");
}

#[test]
fn a_checkpoint_is_shared_out_by_bytes() {
    let weights = Weights::new(16, 4);
    let (dir, all) = (tempfile::tempdir().expect("dir"), publisher());
    write_checkpoint(dir.path(), &weights);
    let whole = all.publish_directory(3, dir.path()).expect("publish").wait().expect("sealed");
    let publishers: Vec<Publisher> = (0..3).map(|_| publisher()).collect();
    let share = |(index, publisher): (usize, &Publisher)| {
        let sender = Sender { index: index as u32, count: 3 };
        let publishing =
            publisher.publish_directory_part(3, dir.path(), sender).expect("published");
        assert!(publishing.bytes > publishing.image_bytes / 5, "{} bytes", publishing.bytes);
        publishing.wait().expect("hashed")
    };
    let published = seal(publishers.iter().enumerate().map(share).collect());
    assert!(published.iter().all(|p| p.version == whole.version));
    let small = |part: &PartInfo| part.encode().len();
    let again = publishers[0].publish_directory_part(4, dir.path(), Sender { index: 0, count: 3 });
    let info = again.expect("published").wait().expect("hashed");
    assert!(small(info.info()) < 1 << 20, "two chunks of 256 KiB at most, and hashes");
}

fn write_checkpoint(dir: &Path, weights: &Weights) {
    let views = weights.tensors.iter().map(|(name, dtype, shape, data)| {
        let dtype = match dtype.name() {
            "U8" => safetensors::Dtype::U8,
            "F32" => safetensors::Dtype::F32,
            _ => safetensors::Dtype::BF16,
        };
        let shape = shape.iter().map(|d| *d as usize).collect();
        (name.clone(), safetensors::tensor::TensorView::new(dtype, shape, data).expect("view"))
    });
    let bytes = safetensors::serialize(views, None).expect("serialized");
    std::fs::write(dir.join("model.safetensors"), bytes).expect("written");
}

#[test]
fn parts_that_do_not_make_one_version_name_senders_and_tensors() {
    let weights = Weights::new(6, 5);
    let publishers = [publisher(), publisher()];
    let half = |p: usize, number, weights: &Weights, which: &dyn Fn(usize) -> bool| {
        part(&publishers[p], number, weights, &tensors(weights, which))
    };
    let refused = |parts: Vec<Part>| {
        let infos = gather(&parts);
        let mut refused = parts.into_iter().filter_map(|part| part.seal(&infos).err());
        refused.next().expect("refused").to_string()
    };
    // Layers 3 and 4 are nobody's.
    let text =
        refused(vec![half(0, 1, &weights, &|ix| ix < 4), half(1, 1, &weights, &|ix| ix > 5)]);
    assert!(text.contains("no sender has `layers.3.weight`, `layers.4.weight` (2097152"), "{text}");
    // Both have layer 2, and one of them another one.
    let mut other = Weights::new(6, 5);
    other.tensors[3].3[70_000] ^= 1;
    let text = refused(vec![half(0, 2, &weights, &|ix| ix < 4), half(1, 2, &other, &|ix| ix >= 3)]);
    assert!(text.contains("senders 1 and 2 both have bytes of `layers.2.weight`"), "{text}");
    // Another layout, another number.
    let longer = Weights::new(7, 5);
    let text =
        refused(vec![half(0, 3, &weights, &|ix| ix < 4), half(1, 3, &longer, &|ix| ix >= 4)]);
    assert!(text.contains("sender 2 has another layout (9 tensors"), "{text}");
    let text =
        refused(vec![half(0, 4, &weights, &|ix| ix < 4), half(1, 5, &weights, &|ix| ix >= 4)]);
    assert!(text.contains("sender 2 has a part of version 1.5, sender 1"), "{text}");
    // Somebody else's list.
    let stray = half(0, 6, &weights, &|ix| ix < 4);
    let error = stray.seal(&[]).err().expect("refused").to_string();
    assert!(error.contains("not among the 0 given"), "{error}");
    // None of that keeps either from publishing.
    let parts = vec![half(0, 7, &weights, &|ix| ix < 4), half(1, 7, &weights, &|ix| ix >= 4)];
    seal(parts);
}

#[test]
fn what_is_not_of_the_layout_is_refused_at_once() {
    let weights = Weights::new(2, 6);
    let publisher = publisher();
    let tensor = &weights.tensors[1];
    let refused = |pieces: &[PieceRef<'_>]| {
        let refused = publisher.publish_part(1, &specs(&weights), pieces);
        refused.err().expect("refused").to_string()
    };
    let piece = |offset, data| PieceRef { tensor: &tensor.0, offset, data };
    let text = refused(&[PieceRef { tensor: "head", offset: 0, data: &[1, 2] }]);
    assert!(text.contains("2 bytes at 0 of tensor `head`"), "{text}");
    let text = refused(&[piece(9, &tensor.3)]);
    assert!(text.contains("1048576 bytes at 9 of tensor `layers.0.weight`"), "{text}");
    let text = refused(&[piece(0, &tensor.3), piece(64, &tensor.3[..10])]);
    assert!(text.contains("`layers.0.weight` are given twice"), "{text}");
}

#[test]
fn nothing_is_published_over_a_part_that_is_not_sealed() {
    let weights = Weights::new(4, 7);
    let publisher = publisher();
    let waiting = part(&publisher, 1, &weights, &tensors(&weights, |ix| ix < 2));
    let error = publisher.publish(2, &weights.refs()).err().expect("refused");
    assert!(matches!(error, PublishError::Arena(_)), "{error}");
    assert!(error.to_string().contains("version 1"), "{error}");
    drop(waiting);
    publish(&publisher, 2, &weights);
}

#[test]
fn a_part_takes_the_memory_of_its_part() {
    let weights = Weights::new(64, 8);
    let publisher = publisher();
    let part = part(&publisher, 1, &weights, &tensors(&weights, |ix| (20..28).contains(&ix)));
    let resident: u64 = std::fs::read_dir("/proc/self/fd")
        .expect("fds")
        .flatten()
        .filter(|fd| {
            let to = std::fs::read_link(fd.path()).unwrap_or_default();
            to.to_string_lossy().contains("anabranch-arena")
        })
        .filter_map(|fd| std::fs::metadata(fd.path()).ok())
        .map(|meta| {
            use std::os::unix::fs::MetadataExt;
            if meta.len() > 60 << 20 { meta.blocks() * 512 } else { 0 }
        })
        .min()
        .expect("a slot");
    assert!(resident <= 9 << 20, "{resident} bytes for a part of 8 MiB");
    drop(part);
}

#[test]
fn malformed_infos_are_refused() {
    let weights = Weights::new(2, 9);
    let publisher = publisher();
    let part = part(&publisher, 1, &weights, &tensors(&weights, |ix| ix < 2));
    let bytes = part.info().encode();
    assert_eq!(PartInfo::decode(&bytes).as_ref(), Ok(part.info()));
    for cut in 0..bytes.len().min(600) {
        assert!(PartInfo::decode(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    let longer = [bytes.clone(), vec![0]].concat();
    assert!(PartInfo::decode(&longer).is_err());
    for at in 0..bytes.len().min(600) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x81;
        // An error, or another part: never a panic, and never out of bounds of its image.
        drop(PartInfo::decode(&flipped));
    }
}
