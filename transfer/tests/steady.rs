//! What a host pays for each version in the steady state, with trainer and receiver on it: no new pages,
//! and the memory of two versions. Alone in its process, since page faults are counted for all of it.

mod common;

use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anabranch_transfer::{Publisher, PublisherConfig, ShmArena};
use common::*;

const MIB: u64 = 1 << 20;
const MODEL_MIB: u64 = 64;
const PAGES: u64 = MODEL_MIB * MIB / 4096;

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

/// Memory of files named so that is mapped here and was touched.
fn resident(name: &str) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").expect("smaps");
    let mut bytes = 0;
    let mut counts = false;
    for line in maps.lines() {
        match line.strip_prefix("Rss:") {
            Some(kib) if counts => {
                let kib = kib.trim().trim_end_matches(" kB").parse::<u64>().expect("kB");
                bytes += kib << 10;
            }
            Some(_) => {}
            // Fields of a mapping begin with a capital, its own line with an address.
            None if line.starts_with(|c: char| c.is_ascii_uppercase()) => {}
            None => counts = line.contains(name),
        }
    }
    bytes
}

/// No version is being sealed, and nothing is made ready behind one.
fn is_sealed() -> bool {
    let tasks = fs::read_dir("/proc/self/task").expect("tasks").flatten();
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.into_iter().all(|name| name.trim_end() != "transfer-seal")
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < until, "not within 10 s: {what}");
        std::thread::yield_now();
    }
}

/// Page faults are counted for the whole process.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn after_the_first_version_no_page_is_new_and_two_versions_is_all_there_is() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
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
    let mut worst = 0;
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
        if number == 1 {
            wait("the second slot is ready", || {
                is_sealed() && resident("slot-") >> 20 >= 2 * MODEL_MIB
            });
        } else {
            worst = worst.max(faults() - start);
        }
        let limit = 2 * published.bytes + MIB;
        assert!(used(host.path()) <= limit, "{} of {limit}", used(host.path()));
    }
    eprintln!("page faults of a version: {worst} of {PAGES} at worst");
    assert!(worst < PAGES / 50, "{worst} of {PAGES} pages were new");
    let more = pss().saturating_sub(before);
    eprintln!("memory: {:.2} models of {MODEL_MIB} MiB", more as f64 / (MODEL_MIB * MIB) as f64);
    assert!(more <= (2 * MODEL_MIB + 64) * MIB, "{more}");
    drop(serving);
}

#[test]
fn deltas_and_their_trials_take_no_new_pages_either() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let publisher = publisher_with(|config| config.hash_threads = 2);
    let receiver = receiver();
    let mut weights = Weights::new(MODEL_MIB as usize, 1);
    let mut serving = None;
    let mut worst = [0; 2];
    for number in 1..=40u64 {
        // One value in a hundred, or all: half of the first ones are worth a delta, then each for a long chain.
        let is_sparse = number % 2 == 0 || number > 8;
        if is_sparse {
            for (_, _, _, data) in &mut weights.tensors {
                data.iter_mut().step_by(200).for_each(|byte| *byte ^= 1);
            }
        } else {
            weights = Weights::new(MODEL_MIB as usize, number);
        }
        let start = faults();
        let published = publish(&publisher, number, &weights);
        assert_eq!(published.delta_bytes.is_some(), is_sparse);
        let trainers = faults();
        let from = vec![from(&publisher, published.version)];
        let staged = receiver.fetcher.fetch_blocking(&request(published.version, from));
        serving = Some(staged.expect("fetch"));
        if number == 1 {
            let ready = |name| resident(name) >> 20 >= 2 * MODEL_MIB;
            wait("the second slots are ready", || {
                is_sealed() && ready("anabranch-arena-") && ready("agent/slot-")
            });
        } else {
            let cost = [trainers - start, faults() - trainers];
            eprintln!("version {number}: {cost:?} page faults of {PAGES}");
            worst = [worst[0].max(cost[0]), worst[1].max(cost[1])];
        }
    }
    assert!(worst.iter().all(|faults| *faults < PAGES / 50), "{worst:?} of {PAGES} pages were new");
    drop(serving);
}

#[test]
fn a_trainer_that_publishes_once_takes_the_memory_of_one_version() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let publisher = publisher_with(|config| config.single = true);
    publish(&publisher, 1, &Weights::new(MODEL_MIB as usize, 1));
    wait("the sealing ends", is_sealed);
    let bytes = resident("anabranch-arena-") + resident("anabranch-delta");
    assert_eq!(bytes >> 20, MODEL_MIB);
}
