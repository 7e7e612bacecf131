//! Versions over libfabric, from other processes. Where libfabric is missing, or older than 1.18 and would use
//! `ofi_rxm`, each test prints the reason and passes. The provider is libfabric's choice, or what FI_PROVIDER
//! names: `FI_PROVIDER='tcp;ofi_rxm'` needs no hardware.
// What a publisher or holder gives has no Debug: `expect_err` would ask for it.
#![allow(clippy::err_expect)]

#[path = "../../transfer/tests/common/mod.rs"]
mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anabranch_proto::address::Address;
use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::version::{Root, Version};
use anabranch_transfer::wire::{FailCode, HEADER_BYTES, Header, Message, PROTO};
use anabranch_transfer::{FetchError, LinkKind, Publisher, SourceRef, Staged};
use common::*;

const SOURCE: &str = "ANABRANCH_TEST_SOURCE";

/// A publisher in a process of its own, killed when dropped.
struct Source {
    child: Child,
    _stdin: ChildStdin,
    addrs: Vec<String>,
    version: Version,
}

/// `None` where there is no libfabric.
fn rdma_publisher() -> Option<Publisher> {
    anabranch_transfer_rdma::register();
    let mut config = anabranch_transfer::PublisherConfig::loopback(JOB, 1);
    config.chunk_bytes = 256 << 10;
    config.links = vec![LinkKind::Rdma, LinkKind::Tcp];
    match Publisher::start(config) {
        Ok(publisher) => {
            publisher.set_serve_key(KEY);
            Some(publisher)
        }
        Err(error) => {
            // Straight to the stream: the harness hides what tests print.
            writeln!(std::io::stderr(), "skipped, no rdma can run here: {error}").ok();
            None
        }
    }
}

/// Not a test by itself: the source's process of the others. `mib seed fault`
#[test]
fn source_process() {
    let Ok(asked) = std::env::var(SOURCE) else { return };
    let mut asked = asked.split(' ');
    let mut next = || asked.next().expect("mib, seed, fault");
    let weights = Weights::new(next().parse().expect("mib"), next().parse().expect("seed"));
    let Some(publisher) = rdma_publisher() else { return };
    let Version { epoch, number, root } = publish(&publisher, 1, &weights).version;
    if next() == "torn" {
        tear();
    }
    let addrs: Vec<String> = publisher.addresses().iter().map(ToString::to_string).collect();
    println!("SOURCE {} {epoch} {number} {}", addrs.join(","), hex::encode(root.0));
    std::io::stdin().read_to_end(&mut Vec::new()).ok();
}

/// Changes a byte in every eighth MiB of the arena, behind the back of the publisher.
fn tear() {
    for fd in std::fs::read_dir("/proc/self/fd").expect("proc").flatten() {
        let is_arena = |to: std::path::PathBuf| to.to_string_lossy().contains("anabranch-arena");
        if !std::fs::read_link(fd.path()).is_ok_and(is_arena) {
            continue;
        }
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options().read(true).write(true).open(fd.path()).expect("arena");
        let len = file.metadata().expect("arena").len();
        for at in (1 << 20..len).step_by(8 << 20) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("read");
            file.write_all_at(&[byte[0] ^ 1], at).expect("write");
        }
    }
}

fn source_in_a_process(mib: usize, seed: u64, fault: &str) -> Option<Source> {
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "source_process", "--nocapture"])
        .env(SOURCE, format!("{mib} {seed} {fault}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a process");
    let stdin = child.stdin.take().expect("piped");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let told = lines.find_map(|line| {
        // After the harness's own words on the same line.
        let line = line.ok()?;
        line.split_once("SOURCE ").map(|(_, told)| told.to_owned())
    });
    let Some(told) = told else {
        child.wait().ok();
        return None;
    };
    let mut fields = told.split(' ');
    let mut field = || fields.next().expect("four fields");
    let addrs = field().split(',').map(str::to_owned).collect();
    let (epoch, number) = (field().parse().expect("epoch"), field().parse().expect("number"));
    let mut root = Root::default();
    hex::decode_to_slice(field(), &mut root.0).expect("root");
    let version = Version { epoch, number, root };
    Some(Source { child, _stdin: stdin, addrs, version })
}

impl Source {
    /// By its address for rdma alone.
    fn by_rdma(&self, holder: &str) -> SourceRef {
        assert!(self.addrs[0].starts_with("rdma://"), "{:?}", self.addrs);
        source(holder, &self.addrs[0], self.version)
    }

    fn by_tcp(&self, holder: &str) -> SourceRef {
        source(holder, &self.addrs[1], self.version)
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn bytes_of(staged: &Staged, holder: &str) -> u64 {
    let of = &staged.report.bytes_by_holder;
    of.iter().find(|(name, _)| name == holder).map_or(0, |(_, bytes)| *bytes)
}

#[test]
fn a_version_arrives_from_another_process_and_verifies() {
    let Some(source) = source_in_a_process(24, 1, "none") else { return };
    let receiver = receiver();
    let request = request(source.version, vec![source.by_rdma("trainer")]);
    let staged = receiver.fetcher.fetch_blocking(&request).expect("fetch");
    assert_holds(staged.dir(), &Weights::new(24, 1));
    assert_eq!(staged.report.received_bytes, staged.report.bytes);
}

#[test]
fn versions_follow_each_other_with_deltas_and_through_a_relay() {
    let Some(publisher) = rdma_publisher() else { return };
    let (relay, leaf) = (receiver(), receiver());
    let links = vec![LinkKind::Rdma];
    let listen =
        anabranch_transfer::Listen { at: ([127, 0, 0, 1], 0).into(), links, advertise: Vec::new() };
    let listener = anabranch_transfer::Listener::bind(&listen).expect("bound");
    let limits = anabranch_transfer::ServeLimits::default();
    let server = anabranch_transfer::Server::serve(listener, relay.holder.clone(), limits);
    let server = server.expect("server");
    let mut weights = Weights::new(16, 2);
    let mut kept = Vec::new();
    for number in 1..=4 {
        let published = publish(&publisher, number, &weights);
        let v = published.version;
        let fetch = |r: &Receiver, addr: &Address| {
            let sources = vec![source("up", addr, v)];
            r.fetcher.fetch_blocking(&request(v, sources)).expect("fetch")
        };
        let at_relay = fetch(&relay, &publisher.addresses()[0]);
        let at_leaf = fetch(&leaf, &server.addresses()[0]);
        assert_holds(at_leaf.dir(), &weights);
        if number > 1 {
            let delta = published.delta_bytes.expect("a delta");
            assert_eq!((at_relay.report.delta_bytes, at_leaf.report.delta_bytes), (delta, delta));
        }
        kept = vec![at_relay, at_leaf];
        for (_, _, _, data) in &mut weights.tensors {
            data.iter_mut().step_by(200).for_each(|byte| *byte ^= number as u8);
        }
    }
    drop(kept);
    assert!(publisher.server().open_streams() <= 8, "streams are reused");
}

#[test]
fn a_source_that_is_killed_midway_costs_little_and_another_one_finishes() {
    const MIB: usize = 192;
    let Some(first) = source_in_a_process(MIB, 3, "none") else { return };
    let second = source_in_a_process(MIB, 3, "none").expect("as the first");
    assert_eq!(first.version, second.version);
    let sources = vec![first.by_rdma("first"), second.by_rdma("second")];
    let mut request = request(first.version, sources);
    let doomed = Mutex::new(Some(first));
    request.progress = Some(Arc::new(move |progress| {
        if progress.bytes * 5 > progress.total_bytes {
            drop(doomed.lock().expect("lock").take());
        }
    }));
    let receiver = receiver();
    let staged = receiver.fetcher.fetch_blocking(&request).expect("fetch");
    assert_holds(staged.dir(), &Weights::new(MIB, 3));
    let report = &staged.report;
    assert!(report.queue.lost_streams > 0, "it died in time: {:?}", report.queue);
    assert!(bytes_of(&staged, "first") > 0 && bytes_of(&staged, "second") > 0);
    let again = report.received_bytes - report.bytes;
    eprintln!("{again} of {} bytes came again; {:?}", report.bytes, report.queue);
    assert!(again * 50 <= report.bytes, "{again} of {}", report.bytes);
}

#[test]
fn a_source_outlives_receivers_that_leave_in_the_middle_of_a_read() {
    let Some(mut source) = source_in_a_process(64, 7, "none") else { return };
    for _ in 0..6 {
        let receiver = receiver();
        let mut request = request(source.version, vec![source.by_rdma("trainer")]);
        let leave = request.cancel.clone();
        request.progress = Some(Arc::new(move |progress| {
            if progress.bytes > 0 {
                leave.cancel();
            }
        }));
        // One that was fast enough has the version.
        let fetched = receiver.fetcher.fetch_blocking(&request);
        assert!(matches!(fetched, Ok(_) | Err(FetchError::Cancelled(_))));
        assert_eq!(source.child.try_wait().expect("its state"), None, "the source lives");
    }
    let receiver = receiver();
    let request = request(source.version, vec![source.by_rdma("trainer")]);
    let staged = receiver.fetcher.fetch_blocking(&request).expect("fetch");
    assert_holds(staged.dir(), &Weights::new(64, 7));
}

#[test]
fn a_torn_source_is_found_by_the_hashes_and_another_one_gives_the_chunks() {
    let Some(torn) = source_in_a_process(24, 4, "torn") else { return };
    let good = source_in_a_process(24, 4, "none").expect("as the first");
    let sources = vec![torn.by_rdma("torn"), good.by_rdma("good")];
    let receiver = receiver();
    let staged = receiver.fetcher.fetch_blocking(&request(good.version, sources)).expect("fetch");
    assert_holds(staged.dir(), &Weights::new(24, 4));
    assert!(staged.report.queue.bad_chunks > 0, "{:?}", staged.report.queue);

    let alone = receiver_with(|rules| rules.give_up = Duration::from_secs(5));
    let fetched = alone.fetcher.fetch_blocking(&request(torn.version, vec![torn.by_rdma("torn")]));
    let error = fetched.err().expect("torn bytes are never a version");
    assert!(matches!(error, FetchError::NoSource { .. }), "{error}");
    assert!(error.to_string().contains("wrong hash"), "{error}");
}

#[test]
fn publishing_over_a_version_that_is_being_read_never_gives_torn_bytes() {
    let Some(publisher) = rdma_publisher() else { return };
    let weights: Vec<Weights> = (0..6).map(|seed| Weights::new(32, 50 + seed)).collect();
    let first = publish(&publisher, 1, &weights[0]).version;
    let reader = receiver();
    std::thread::scope(|scope| {
        let fetching = scope.spawn(|| {
            let sources = vec![source("trainer", &publisher.addresses()[0], first)];
            reader.fetcher.fetch_blocking(&request(first, sources))
        });
        for (number, weights) in weights.iter().enumerate().skip(1) {
            publish(&publisher, number as u64 + 1, weights);
        }
        match fetching.join().expect("no panic") {
            Ok(staged) => assert_holds(staged.dir(), &weights[0]),
            Err(error) => assert!(matches!(error, FetchError::NoSource { .. }), "{error}"),
        }
    });
}

#[test]
fn a_wrong_grant_gets_no_key_and_no_byte() {
    let Some(publisher) = rdma_publisher() else { return };
    let published = publish(&publisher, 1, &Weights::new(4, 5));
    let v = published.version;
    let forged = |key: &[u8; 32]| {
        let (job, receiver) = (JOB.to_owned(), "engine-9".to_owned());
        let (role, ttl_ms, nonce) = (Role::Fetch, 60_000, 77);
        Grant { job, version: v, receiver, role, ttl_ms, nonce }.mint(key).to_vec()
    };
    let answers = |grant: Vec<u8>| {
        let Address::Rdma(at) = &publisher.addresses()[0] else { panic!("rdma comes first") };
        let mut stream = TcpStream::connect(at.as_str()).expect("connected");
        stream.set_read_timeout(Some(Duration::from_millis(500))).expect("timeout");
        stream.write_all(b"RDMA").expect("sent");
        let hi = Message::Hi { proto: PROTO, base: Root::default(), grant };
        stream.write_all(&hi.to_bytes()).expect("sent");
        let mut messages = Vec::new();
        let mut head = [0; HEADER_BYTES];
        while stream.read_exact(&mut head).is_ok() {
            let header = Header::decode(&head).expect("header");
            let mut body = vec![0; header.body_bytes()];
            stream.read_exact(&mut body).expect("body");
            messages.push(header.finish(&body).expect("message"));
        }
        messages
    };
    let refused = answers(forged(&[7; 32]));
    assert!(
        matches!(&refused[..], [Message::Fail { code: FailCode::Grant, .. }]),
        "one refusal, nothing else: {refused:?}"
    );
    // The same conversation with a grant of the right key goes on to a place in memory.
    let welcomed = answers(forged(&KEY));
    assert!(
        matches!(&welcomed[..], [Message::Welcome { .. }, Message::Remote { .. }]),
        "{welcomed:?}"
    );
    assert_eq!(published.sent_bytes(), 0);
}

#[test]
fn a_receiver_without_libfabric_takes_the_version_over_tcp() {
    let own = "a_receiver_without_libfabric_takes_the_version_over_tcp";
    falls_back_to_tcp(own, ("ANABRANCH_LIBFABRIC", "/nowhere/libfabric.so"));
}

#[test]
fn a_receiver_without_a_device_of_the_provider_takes_the_version_over_tcp() {
    let own = "a_receiver_without_a_device_of_the_provider_takes_the_version_over_tcp";
    falls_back_to_tcp(own, ("FI_PROVIDER", "of_no_device_anywhere"));
}

/// The source has rdma; the receiver runs in a process whose environment takes it away.
fn falls_back_to_tcp(test: &str, (variable, value): (&str, &str)) {
    const SOURCE_AT: &str = "ANABRANCH_TEST_SOURCE_AT";
    if let Ok(at) = std::env::var(SOURCE_AT) {
        return fetch_without_rdma(&at);
    }
    let Some(source) = source_in_a_process(8, 6, "none") else { return };
    let at = format!("{} {}", source.addrs.join(","), hex::encode(source.version.root.0));
    let receiver = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", test, "--nocapture"])
        .env(SOURCE_AT, at)
        .env(variable, value)
        .status();
    assert!(receiver.expect("a process").success(), "with {variable}={value}");
}

fn fetch_without_rdma(at: &str) {
    anabranch_transfer_rdma::register();
    let (addrs, root) = at.split_once(' ').expect("addresses and root");
    let addrs: Vec<String> = addrs.split(',').map(str::to_owned).collect();
    let mut version = Version { epoch: 1, number: 1, root: Root::default() };
    hex::decode_to_slice(root, &mut version.root.0).expect("root");
    let by_rdma = source("trainer", &addrs[0], version);
    let receiver = receiver();
    let refused = receiver.fetcher.fetch_blocking(&request(version, vec![by_rdma.clone()]));
    let error = refused.err().expect("no rdma here").to_string();
    for part in ["no rdma through", "FI_PROVIDER", "libfabric1"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let addrs = addrs.iter().map(|addr| addr.parse().expect("address")).collect();
    let either = SourceRef { addrs, ..by_rdma };
    let staged = receiver.fetcher.fetch_blocking(&request(version, vec![either]));
    assert_holds(staged.expect("over tcp").dir(), &Weights::new(8, 6));
}

/// Rates of both links in one run.
#[test]
#[ignore = "prints figures for a minute: cargo test --release -p anabranch-transfer-rdma --test rdma -- --ignored --exact links_side_by_side --nocapture"]
fn links_side_by_side() {
    const MIB: usize = 512;
    let Some(source) = source_in_a_process(MIB, 9, "none") else { return };
    let rate = |at: SourceRef| {
        let receiver = receiver();
        let (started, cpu) = (Instant::now(), cpu_seconds());
        let staged = receiver.fetcher.fetch_blocking(&request(source.version, vec![at]));
        let staged = staged.expect("fetch");
        let cpu = cpu_seconds() - cpu;
        (staged.report.bytes as f64 / started.elapsed().as_secs_f64() / 1e6, cpu)
    };
    for round in 1..=4 {
        let (tcp, tcp_cpu) = rate(source.by_tcp("trainer"));
        let (rdma, rdma_cpu) = rate(source.by_rdma("trainer"));
        println!(
            "round {round}: tcp {tcp:.0} MB/s ({tcp_cpu:.2} s of the receiver's cpu), \
             rdma {rdma:.0} MB/s ({rdma_cpu:.2} s): {:.2}x",
            rdma / tcp
        );
    }
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("proc");
    let after_name = stat.rsplit_once(')').expect("a name").1;
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    // In ticks of 10 ms.
    let ticks = |at: usize| fields[at].parse::<f64>().expect("ticks");
    (ticks(11) + ticks(12)) / 100.0
}
