//! Versions exported to a directory of a shared file system and fetched from there, also when nobody who
//! wrote them lives any more.

// What a publisher or holder gives has no Debug: `expect_err` would ask for it.
#![allow(clippy::err_expect)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_proto::address::Address;
use anabranch_proto::version::{Root, Version};
use anabranch_transfer::{FetchError, PublishError, Published, Publisher, SourceRef, Staged};
use common::*;

fn exporting(dir: &Path, epoch: u32) -> Publisher {
    publisher_with(|config| {
        config.export = Some(dir.to_owned());
        config.epoch = epoch;
    })
}

fn from_file(dir: &Path, version: Version) -> Vec<SourceRef> {
    vec![source("shared disk", format!("file:{}", dir.display()), version)]
}

fn fetch(receiver: &Receiver, dir: &Path, version: Version) -> Result<Staged, FetchError> {
    receiver.fetcher.fetch_blocking(&request(version, from_file(dir, version)))
}

fn exported_to(published: &Published) -> PathBuf {
    published.export.clone().expect("asked for").expect("written")
}

fn names(dir: &Path) -> Vec<String> {
    let entry = |e: std::io::Result<fs::DirEntry>| e.expect("entry").file_name();
    let names = fs::read_dir(dir).expect("dir").map(entry);
    let mut names: Vec<String> = names.map(|n| n.to_string_lossy().into_owned()).collect();
    names.retain(|name| name != ".exporter");
    names.sort();
    names
}

#[test]
fn a_version_is_fetched_from_the_directory_after_its_trainer_has_gone() {
    let (dir, receiver) = (tempfile::tempdir().expect("dir"), receiver());
    let publisher = exporting(dir.path(), 1);
    let addresses = publisher.addresses();
    assert_eq!(addresses.last(), Some(&Address::File(dir.path().to_owned())));
    let weights = Weights::new(12, 1);
    let published = publish(&publisher, 1, &weights);
    drop(publisher);
    assert!(exported_to(&published).join("model.safetensors").exists());
    let v = published.version;
    // Its socket is among its addresses still.
    let mut sources = from_file(dir.path(), v);
    sources[0].addrs = addresses;
    let staged = receiver.fetcher.fetch_blocking(&request(v, sources)).expect("fetch");
    assert_holds(staged.dir(), &weights);
    assert_eq!(staged.report.received_bytes, published.bytes);
    assert_eq!(published.sent_bytes(), 0);
    // The exported image is itself what an engine can load.
    assert_holds(&exported_to(&published), &weights);
}

#[test]
fn the_delta_lies_beside_the_version_and_is_taken_where_its_base_is_held() {
    let (dir, receiver) = (tempfile::tempdir().expect("dir"), receiver());
    let publisher = exporting(dir.path(), 1);
    let mut weights = Weights::new(24, 2);
    let v1 = publish(&publisher, 1, &weights).version;
    let first = fetch(&receiver, dir.path(), v1).expect("v1");
    for (_, _, _, data) in &mut weights.tensors {
        for byte in data.iter_mut().step_by(200) {
            *byte ^= 1;
        }
    }
    let second = publish(&publisher, 2, &weights);
    let delta_bytes = second.delta_bytes.expect("a delta");
    assert!(exported_to(&second).join("delta.manifest").exists());
    drop(publisher);
    let staged = fetch(&receiver, dir.path(), second.version).expect("v2");
    assert_holds(staged.dir(), &weights);
    assert_eq!(staged.report.delta_bytes, delta_bytes);
    assert_eq!(staged.report.received_bytes, delta_bytes);
    drop(first);
    // One who holds another base, or none, takes it in full.
    let staged = fetch(&common::receiver(), dir.path(), second.version).expect("v2 in full");
    assert_eq!((staged.report.delta_bytes, staged.report.received_bytes), (0, second.bytes));
}

#[test]
fn the_newest_stay_and_who_asks_for_an_older_one_is_told_what_is_there() {
    let (dir, receiver) = (tempfile::tempdir().expect("dir"), receiver());
    let publisher = exporting(dir.path(), 1);
    let other = dir.path().join("v1-of-somebody-else");
    fs::create_dir(&other).expect("dir");
    let versions: Vec<Version> =
        (1..=4).map(|n| publish(&publisher, n, &Weights::new(2, n)).version).collect();
    let of = |n: usize| format!("v{}-e1-{}", n + 1, versions[n].root);
    assert_eq!(names(dir.path()), ["v1-of-somebody-else".to_owned(), of(2), of(3)]);
    let error = fetch(&receiver, dir.path(), versions[0]).err().expect("removed").to_string();
    for part in [of(0), of(2), of(3), dir.path().display().to_string()] {
        assert!(error.contains(&part), "{part}: {error}");
    }
    assert!(fetch(&receiver, dir.path(), versions[2]).is_ok());
}

#[test]
fn numbers_go_back_in_a_new_epoch_and_not_within_one() {
    let (dir, receiver) = (tempfile::tempdir().expect("dir"), receiver());
    let first = exporting(dir.path(), 1);
    let v7 = publish(&first, 7, &Weights::new(2, 7)).version;
    let refused = first.publish(6, &Weights::new(2, 6).refs()).err().expect("refused");
    assert!(matches!(refused, PublishError::Regression { .. }), "{refused}");
    let text = refused.to_string();
    assert!(text.contains("version 6 after 7") && text.contains("epoch"), "{text}");
    drop(first);
    let second = exporting(dir.path(), 2);
    let weights = Weights::new(2, 3);
    let v3 = publish(&second, 3, &weights).version;
    // The older epoch's version is the older one, whatever its number.
    assert!(fetch(&receiver, dir.path(), v7).is_ok());
    assert_holds(fetch(&receiver, dir.path(), v3).expect("v3@2").dir(), &weights);
    let v4 = publish(&second, 4, &Weights::new(2, 4)).version;
    assert!(fetch(&receiver, dir.path(), v7).is_err());
    assert!(fetch(&receiver, dir.path(), v3).is_ok() && fetch(&receiver, dir.path(), v4).is_ok());
}

#[test]
fn a_wrong_byte_or_a_cut_file_is_refused_and_the_old_version_keeps_serving() {
    let (dir, receiver) = (tempfile::tempdir().expect("dir"), receiver());
    let publisher = exporting(dir.path(), 1);
    let old = Weights::new(4, 1);
    let v1 = publish(&publisher, 1, &old).version;
    let serving = fetch(&receiver, dir.path(), v1).expect("v1");
    let second = publish(&publisher, 2, &Weights::new(4, 2));
    let model = exported_to(&second).join("model.safetensors");
    let file = fs::File::options().read(true).write(true).open(&model).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1_500_000).expect("read");
    file.write_all_at(&[byte[0] ^ 1], 1_500_000).expect("write");
    let error = fetch(&receiver, dir.path(), second.version).err().expect("refused").to_string();
    assert!(error.contains("wrong hash") && error.contains("shared disk"), "{error}");
    file.set_len(1 << 20).expect("cut");
    let error = fetch(&receiver, dir.path(), second.version).err().expect("refused").to_string();
    assert!(error.contains("is damaged: it has 1048576 bytes"), "{error}");
    fs::write(exported_to(&second).join("manifest"), b"ABM1").expect("write");
    let error = fetch(&receiver, dir.path(), second.version).err().expect("refused").to_string();
    assert!(error.contains("manifest is damaged"), "{error}");
    assert_holds(serving.dir(), &old);
    // A trainer that starts again writes it anew.
    drop(publisher);
    let again = exporting(dir.path(), 1);
    let v2 = publish(&again, 2, &Weights::new(4, 2)).version;
    assert_eq!(v2, second.version);
    assert_holds(fetch(&receiver, dir.path(), v2).expect("v2").dir(), &Weights::new(4, 2));
}

#[test]
fn a_version_that_is_removed_while_it_is_read_is_never_staged_in_part() {
    let (dir, receiver) = (tempfile::tempdir().expect("dir"), receiver());
    let publisher = exporting(dir.path(), 1);
    let weights = Weights::new(48, 5);
    let published = publish(&publisher, 1, &weights);
    let (v, at) = (published.version, exported_to(&published));
    let mut req = request(v, from_file(dir.path(), v));
    let removed = at.clone();
    req.progress = Some(Arc::new(move |_| {
        fs::remove_dir_all(&removed).ok();
    }));
    // Its files were open by then. Over a network they may be lost, and it is refused.
    match receiver.fetcher.fetch_blocking(&req) {
        Ok(staged) => assert_holds(staged.dir(), &weights),
        Err(error) => assert!(error.to_string().contains("cannot read"), "{error}"),
    }
    assert!(!at.exists());
    let error = fetch(&common::receiver(), dir.path(), v).err().expect("gone").to_string();
    assert!(error.contains("there is no version"), "{error}");
    let nowhere = dir.path().join("nowhere");
    let error = fetch(&common::receiver(), &nowhere, v).err().expect("gone").to_string();
    assert!(error.contains("cannot read the exported versions in"), "{error}");
}

#[test]
fn a_file_system_that_hangs_costs_the_deadline_and_no_more() {
    let dir = tempfile::tempdir().expect("dir");
    let receiver = receiver_with(|rules| rules.give_up = Duration::from_secs(2));
    let v = Version { epoch: 1, number: 1, root: Root([7; 32]) };
    let at = dir.path().join(format!("v1-e1-{}", v.root));
    fs::create_dir(&at).expect("dir");
    // Opening a pipe that nobody writes waits for ever, as a dead server's files do.
    let made = std::process::Command::new("mkfifo").arg(at.join("manifest")).status();
    assert!(made.expect("mkfifo").success());
    let started = Instant::now();
    let error = fetch(&receiver, dir.path(), v).err().expect("hangs").to_string();
    assert!(error.contains("no byte moved for 700ms"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[test]
fn a_directory_belongs_to_one_trainer_and_what_a_killed_one_left_is_cleared() {
    let dir = tempfile::tempdir().expect("dir");
    let first = exporting(dir.path(), 1);
    let config = |config: &mut anabranch_transfer::PublisherConfig| {
        config.export = Some(dir.path().to_owned());
    };
    let mut second = anabranch_transfer::PublisherConfig::loopback(JOB, 1);
    config(&mut second);
    let error = Publisher::start(second).err().expect("taken").to_string();
    let own = format!("process {}", std::process::id());
    assert_eq!(error.matches(&own).count(), 2, "both are named: {error}");
    drop(first);
    let part = dir.path().join(".part-v9-e1-000000000000-0");
    fs::create_dir(&part).expect("dir");
    fs::write(part.join("model.safetensors"), b"half").expect("write");
    let _third = exporting(dir.path(), 1);
    assert!(names(dir.path()).is_empty());
}
