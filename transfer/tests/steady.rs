//! What a host pays for each version in the steady state, with trainer and receiver on it: no new pages,
//! and the memory of two versions. Alone in its process, since page faults are counted for all of it.

mod common;

use std::fs;

use anabranch_transfer::{Publisher, PublisherConfig, ShmArena};
use common::*;

const MIB: u64 = 1 << 20;
const MODEL_MIB: u64 = 64;

/// Minor faults of this process so far.
fn faults() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("stat");
    // The command's name may hold spaces: fields count from its closing bracket.
    let rest = stat.rsplit_once(") ").expect("a name").1;
    rest.split(' ').nth(7).expect("field").parse().expect("number")
}

/// Proportional share of all memory mapped here, in bytes.
fn pss() -> u64 {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").expect("smaps_rollup");
    let line = rollup.lines().find(|l| l.starts_with("Pss:")).expect("Pss");
    line.split_ascii_whitespace().nth(1).expect("kB").parse::<u64>().expect("number") << 10
}

/// Memory that all files under `dir` take, each counted once.
fn used(dir: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut seen = std::collections::BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).expect("dir").flatten() {
            let meta = entry.metadata().expect("metadata");
            if meta.is_dir() {
                dirs.push(entry.path());
            } else {
                seen.insert(meta.ino(), meta.blocks() * 512);
            }
        }
    }
    seen.values().sum()
}

#[test]
fn after_the_first_versions_no_page_is_new_and_two_versions_is_all_there_is() {
    let host = tempfile::tempdir_in("/dev/shm").expect("shm");
    let dir = host.path().join("anabranch-math-1.arena");
    let config = PublisherConfig {
        shm: Some(ShmArena { dir, required: true }),
        delta: false,
        ..PublisherConfig::loopback(JOB, 1)
    };
    let publisher = Publisher::start(config).expect("start");
    publisher.set_serve_key(KEY);
    let agents = host.path().join("agents");
    fs::create_dir(&agents).expect("dir");
    let staging = anabranch_transfer::Staging::open(&agents, "agent").expect("staging");
    let holder = anabranch_transfer::Holder::new(JOB);
    let fetcher = anabranch_transfer::Fetcher::new(staging, holder, Default::default());
    let weights = Weights::new(MODEL_MIB as usize, 1);
    let before = pss();
    let mut serving = None;
    let (mut counted, mut worst) = (0, 0);
    for number in 1..=8 {
        let start = faults();
        let published = publish(&publisher, number, &weights);
        let mut source = from(&publisher, published.version);
        source.addrs = publisher.addresses();
        let request = request(published.version, vec![source]);
        let staged = fetcher.fetch_blocking(&request).expect("fetch");
        assert_eq!(staged.report.adopted_bytes, published.bytes);
        // The engine has loaded it: the version before is let go.
        serving = Some(staged);
        let cost = faults() - start;
        if number > 2 {
            (counted, worst) = (counted + cost, worst.max(cost));
        } else {
            assert!(cost > MODEL_MIB * MIB / 4096, "both slots are touched at first: {cost}");
        }
        let limit = 2 * published.bytes + MIB;
        assert!(used(host.path()) <= limit, "{} of {limit}", used(host.path()));
    }
    let pages = MODEL_MIB * MIB / 4096;
    eprintln!("page faults a version: {} of {pages}, worst {worst}", counted / 6);
    assert!(worst < pages / 50, "{worst} of {pages} pages were new");
    let more = pss().saturating_sub(before);
    eprintln!("memory: {:.2} models of {MODEL_MIB} MiB", more as f64 / (MODEL_MIB * MIB) as f64);
    assert!(more <= (2 * MODEL_MIB + 64) * MIB, "{more}");
    drop(serving);
}
