//! Versions over real sockets into real shared memory, and everything that can go wrong on the way.

// What a publisher or holder gives has no Debug: `expect_err` would ask for it.
#![allow(clippy::err_expect)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::version::{Root, Version};
use anabranch_transfer::checkpoint::Checkpoint;
use anabranch_transfer::{FetchError, Holder, PublishError, Server, StageError};
use common::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_version_arrives_as_a_directory_that_any_reader_loads() {
    let (publisher, receiver, weights) = (publisher(), receiver(), Weights::new(24, 1));
    let publishing = publisher.publish(1, &weights.refs()).expect("publish");
    let published = publishing.sealed().await.expect("sealed");
    let sources = vec![from(&publisher, published.version)];
    let staged = receiver.fetcher.fetch(request(published.version, sources)).await.expect("fetch");
    assert_holds(staged.dir(), &weights);
    assert_eq!(staged.report.received_bytes, published.bytes);
    assert_eq!(staged.report.bytes_by_holder, [("trainer".to_owned(), published.bytes)]);
    assert_eq!(published.sent_bytes(), published.bytes);
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(staged.dir().join("model.safetensors")).expect("file");
    assert_eq!(mode.permissions().mode() & 0o777, 0o644);
}

#[test]
fn versions_follow_each_other_over_the_same_streams_under_new_names() {
    let (publisher, receiver) = (publisher(), receiver());
    let mut kept = None;
    let mut dirs = Vec::new();
    for number in 1..=5 {
        let weights = Weights::new(8, number);
        let v = publish(&publisher, number, &weights).version;
        let fetched = receiver.fetcher.fetch_blocking(&request(v, vec![from(&publisher, v)]));
        let staged = fetched.expect("fetch");
        assert_holds(staged.dir(), &weights);
        dirs.push(staged.dir().to_owned());
        // The version before goes when the new one is in place.
        kept = Some(staged);
    }
    drop(kept);
    dirs.dedup();
    assert_eq!(dirs.len(), 5);
    assert!(publisher.server().open_streams() <= 8, "streams are reused");
}

#[test]
fn flipped_bits_are_found_counted_and_fetched_again() {
    let (publisher, receiver, weights) = (publisher(), receiver(), Weights::new(16, 2));
    let v = publish(&publisher, 1, &weights).version;
    let bad = Proxy::start(&publisher.addresses()[0], Fault::FlipEvery(1 << 20));
    let sources = vec![source("flipping", bad.addr.to_string(), v), from(&publisher, v)];
    let staged = receiver.fetcher.fetch_blocking(&request(v, sources)).expect("fetch");
    assert_holds(staged.dir(), &weights);
    assert!(staged.report.queue.bad_chunks > 0, "{:?}", staged.report);
}

#[test]
fn a_source_that_only_sends_rubbish_is_dropped_and_named() {
    let (publisher, receiver, weights) = (publisher(), receiver(), Weights::new(4, 2));
    let v = publish(&publisher, 1, &weights).version;
    let bad = Proxy::start(&publisher.addresses()[0], Fault::FlipEvery(30_000));
    let sources = vec![source("liar", bad.addr.to_string(), v)];
    let error = receiver.fetcher.fetch_blocking(&request(v, sources)).err().expect("refused");
    let text = error.to_string();
    assert!(
        text.contains("liar") && (text.contains("wrong hash") || text.contains("protocol")),
        "{text}"
    );
}

#[test]
fn after_a_dead_source_another_one_finishes_with_few_bytes_again() {
    let (publisher, receiver, weights) = (publisher(), receiver(), Weights::new(96, 3));
    let published = publish(&publisher, 1, &weights);
    let v = published.version;
    let dying = Proxy::start(&publisher.addresses()[0], Fault::DieAfter(48 << 20));
    let first = vec![source("dying", dying.addr.to_string(), v)];
    let error = receiver.fetcher.fetch_blocking(&request(v, first)).err().expect("dies");
    assert!(matches!(error, FetchError::NoSource { .. }), "{error}");
    let second = request(v, vec![from(&publisher, v)]);
    let staged = receiver.fetcher.fetch_blocking(&second).expect("resumed");
    assert_holds(staged.dir(), &weights);
    let again = published.sent_bytes() - published.bytes;
    let share = again as f64 / published.bytes as f64;
    assert!(staged.report.carried_bytes > 40 << 20, "{:?}", staged.report);
    assert!(staged.report.received_bytes + staged.report.carried_bytes == published.bytes);
    // What the dying source had in flight: a window per stream.
    eprintln!("sent again: {:.2}%", share * 100.0);
    assert!(share < 0.03);
}

#[test]
fn a_stalled_source_costs_its_deadline_and_no_more() {
    let (publisher, receiver, weights) = (publisher(), receiver(), Weights::new(24, 4));
    let v = publish(&publisher, 1, &weights).version;
    let stalling = Proxy::start(&publisher.addresses()[0], Fault::StallAfter(2 << 20));
    let sources = vec![source("stalled", stalling.addr.to_string(), v), from(&publisher, v)];
    let started = Instant::now();
    let staged = receiver.fetcher.fetch_blocking(&request(v, sources)).expect("fetch");
    assert_holds(staged.dir(), &weights);
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
}

#[test]
fn with_every_source_stalled_the_fetch_ends_by_its_deadline() {
    let (publisher, weights) = (publisher(), Weights::new(24, 4));
    let receiver = receiver_with(|rules| rules.give_up = Duration::from_secs(1));
    let v = publish(&publisher, 1, &weights).version;
    let stalling = Proxy::start(&publisher.addresses()[0], Fault::StallAfter(2 << 20));
    let sources = vec![source("stalled", stalling.addr.to_string(), v)];
    let error = receiver.fetcher.fetch_blocking(&request(v, sources)).err().expect("gives up");
    assert!(matches!(error, FetchError::Stalled { .. } | FetchError::NoSource { .. }), "{error}");
    assert!(error.to_string().contains("stalled at 127.0.0.1"), "{error}");
}

#[test]
fn without_a_valid_grant_not_one_byte_is_served() {
    let (publisher, receiver, weights) = (publisher(), receiver(), Weights::new(2, 5));
    let published = publish(&publisher, 1, &weights);
    let v = published.version;
    let good = Grant {
        job: JOB.into(),
        version: v,
        receiver: "engine-1".into(),
        role: Role::Fetch,
        ttl_ms: 60_000,
        nonce: 0,
    };
    let other = Version { number: 2, ..v };
    let grants = [
        (Vec::new(), "not a grant"),
        (good.mint(&[1; 32]).to_vec(), "another key"),
        (Grant { job: "other".into(), ..good.clone() }.mint(&KEY).to_vec(), "serves `math`"),
        (Grant { version: other, ..good.clone() }.mint(&KEY).to_vec(), "has not begun"),
        (Grant { role: Role::Feed, ..good.clone() }.mint(&KEY).to_vec(), "Feed"),
    ];
    for (grant, want) in grants {
        let mut at = from(&publisher, v);
        at.grant = grant;
        let error = receiver.fetcher.fetch_blocking(&request(v, vec![at])).err().expect("refused");
        assert!(error.to_string().contains(want), "{want}: {error}");
    }
    assert_eq!(published.sent_bytes(), 0);
}

#[test]
fn a_holder_that_joined_before_any_job_lends_by_its_key_alone() {
    let (publisher, weights) = (publisher(), Weights::new(2, 5));
    let v = publish(&publisher, 1, &weights).version;
    let early = Holder::new("");
    early.set_key(KEY);
    let at = from(&publisher, v);
    let refused = early.admit(&at.grant, Instant::now()).err().expect("it holds nothing");
    assert!(refused.to_string().contains("has not begun"), "{refused}");
    early.set_key([1; 32]);
    early.set_key([2; 32]);
    let refused = early.admit(&at.grant, Instant::now()).err().expect("a key of long ago");
    assert!(!refused.to_string().contains("not held here"), "{refused}");
}

#[test]
fn a_grant_expires_from_its_first_use() {
    let (publisher, receiver, weights) = (publisher(), receiver(), Weights::new(2, 5));
    let v = publish(&publisher, 1, &weights).version;
    let (job, engine) = (JOB.to_owned(), "engine-1".to_owned());
    let short =
        Grant { job, version: v, receiver: engine, role: Role::Fetch, ttl_ms: 5000, nonce: 7 };
    let mut at = from(&publisher, v);
    at.grant = short.mint(&KEY).to_vec();
    drop(receiver.fetcher.fetch_blocking(&request(v, vec![at.clone()])).expect("in time"));
    let holder = publisher.server().holder();
    let later = Instant::now() + Duration::from_secs(6);
    let refused = holder.admit(&at.grant, later).err().expect("expired");
    assert!(refused.to_string().contains("expired"), "{refused}");
}

#[test]
fn publishing_takes_the_memory_of_the_oldest_version_and_readers_never_get_torn_bytes() {
    let publisher = publisher_with(|c| c.delta = false);
    let receiver = receiver_with(|r| (r.strikes, r.progress) = (2, Duration::from_secs(3)));
    let weights: Vec<Weights> = (0..4).map(|seed| Weights::new(64, seed)).collect();
    let v1 = publish(&publisher, 1, &weights[1]).version;
    // Slow enough that two publishes fit into the transfer.
    let slow = Proxy::start(&publisher.addresses()[0], Fault::StallAfter(8 << 20));
    let at = source("slow", slow.addr.to_string(), v1);
    let mut overtaken = request(v1, vec![at]);
    overtaken.cancel = tokio_util::sync::CancellationToken::new();
    let reading = std::thread::scope(|s| {
        let fetch = s.spawn(|| receiver.fetcher.fetch_blocking(&overtaken).err());
        while slow.passed.load(std::sync::atomic::Ordering::SeqCst) < 7 << 20 {
            std::thread::yield_now();
        }
        let started = Instant::now();
        publish(&publisher, 2, &weights[2]);
        let v3 = publisher.publish(3, &weights[3].refs()).expect("not blocked by the reader");
        assert!(v3.revoked_streams > 0);
        v3.wait().expect("sealed");
        assert!(started.elapsed() < Duration::from_secs(5));
        fetch.join().expect("no panic")
    });
    let error = reading.expect("v1 is gone");
    assert!(matches!(error, FetchError::NoSource { .. }), "{error}");
    let v3 = *publisher.server().holder().versions().last().expect("v3");
    let fetched = receiver.fetcher.fetch_blocking(&request(v3, vec![from(&publisher, v3)]));
    assert_holds(fetched.expect("v3").dir(), &weights[3]);
}

#[test]
fn a_slot_that_an_engine_still_maps_is_not_reused() {
    let (publisher, receiver) = (publisher(), receiver());
    let fetch = |number| {
        let weights = Weights::new(2, number);
        let v = publish(&publisher, number, &weights).version;
        receiver.fetcher.fetch_blocking(&request(v, vec![from(&publisher, v)]))
    };
    let first = fetch(1).expect("v1");
    let path = first.dir().join("model.safetensors");
    // Another process maps it, as an engine on CPU does for as long as it serves the version.
    let script = "import mmap,sys\nf=open(sys.argv[1],'rb')\nm=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\nprint('ok',flush=True)\nsys.stdin.read()";
    let mut engine = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(&path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("python3");
    let mut ready = [0; 3];
    let out = engine.stdout.as_mut().expect("piped");
    std::io::Read::read_exact(out, &mut ready).expect("mapped");
    let second = fetch(2).expect("v2 goes to the other slot");
    drop(first);
    let busy = fetch(3).err().expect("both slots are in use");
    let text = busy.to_string();
    assert!(matches!(busy, FetchError::Stage { error: StageError::Busy { .. }, .. }), "{text}");
    assert!(text.contains("mapped by process") && text.contains("python3"), "{text}");
    engine.kill().expect("kill");
    engine.wait().expect("reaped");
    drop(fetch(4).expect("the slot is free again"));
    drop(second);
}

#[test]
fn equal_chunks_are_not_fetched_again() {
    let (publisher, receiver) = (publisher_with(|c| c.delta = false), receiver());
    let mut weights = Weights::new(16, 9);
    let v1 = publish(&publisher, 1, &weights).version;
    let first = receiver.fetcher.fetch_blocking(&request(v1, vec![from(&publisher, v1)]));
    let first = first.expect("v1");
    weights.tensors[3].3[100] ^= 1;
    let v2 = publish(&publisher, 2, &weights).version;
    let second = receiver.fetcher.fetch_blocking(&request(v2, vec![from(&publisher, v2)]));
    let second = second.expect("v2");
    assert_holds(second.dir(), &weights);
    assert_eq!(second.report.received_bytes, 256 << 10, "{:?}", second.report);
    drop(first);
}

#[test]
fn a_restarted_agent_fetches_only_what_its_slot_lacks() {
    let (publisher, weights) = (publisher(), Weights::new(32, 10));
    let published = publish(&publisher, 1, &weights);
    let v = published.version;
    let before = receiver();
    let dir = Arc::clone(&before.dir);
    let dying = Proxy::start(&publisher.addresses()[0], Fault::DieAfter(16 << 20));
    let sources = vec![source("dying", dying.addr.to_string(), v)];
    before.fetcher.fetch_blocking(&request(v, sources)).err().expect("dies");
    drop(before);
    // One recorded chunk is damaged meanwhile: the record alone is not believed.
    use std::os::unix::fs::FileExt;
    let slot = std::fs::File::options().write(true).open(dir.path().join("agent/slot-0"));
    slot.expect("slot").write_all_at(&[1, 2, 3], 5).expect("damage");
    let after = receiver_in(dir, |_| {});
    let fetched = after.fetcher.fetch_blocking(&request(v, vec![from(&publisher, v)]));
    let staged = fetched.expect("resumed");
    assert_holds(staged.dir(), &weights);
    assert!(staged.report.carried_bytes > 8 << 20, "{:?}", staged.report);
}

#[test]
fn two_agents_cannot_share_a_staging_area() {
    let receiver = receiver();
    let second = anabranch_transfer::Staging::open(receiver.dir.path(), "agent");
    assert!(matches!(second.err(), Some(StageError::Locked { .. })));
}

#[test]
fn a_version_with_another_layout_is_refused_before_a_byte_is_staged() {
    let (publisher, receiver, weights) = (publisher(), receiver(), Weights::new(3, 11));
    let published = publish(&publisher, 1, &weights);
    let v = published.version;
    let mut tensors: Vec<_> =
        weights.tensors.iter().map(|(n, d, s, _)| (n.clone(), *d, s.clone())).collect();
    tensors[0].0 = "lm_head.weight".into();
    tensors[1].2 = vec![64, 8192];
    let baseline = anabranch_transfer::checkpoint::Baseline::from_tensors(tensors);
    let mut req = request(v, vec![from(&publisher, v)]);
    req.baseline = Some(Arc::new(baseline));
    let error = receiver.fetcher.fetch_blocking(&req).err().expect("refused").to_string();
    for part in ["missing: `lm_head.weight`", "extra: `bias`", "the engine has [64, 8192]"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(published.sent_bytes(), 0);
}

#[test]
fn a_directory_is_published_and_a_truncated_one_is_refused() {
    let (publisher, receiver, weights) = (publisher(), receiver(), Weights::new(3, 12));
    let v1 = publish(&publisher, 1, &weights).version;
    let staged = receiver.fetcher.fetch_blocking(&request(v1, vec![from(&publisher, v1)]));
    let staged = staged.expect("v1");
    let second = publisher.publish_directory(2, staged.dir()).expect("publish").wait();
    let second = second.expect("sealed");
    assert_eq!(second.version.root, v1.root, "the same tensors are the same bytes");
    let read = Checkpoint::open(staged.dir()).expect("checkpoint").baseline();
    assert_eq!(read.compare(&second.manifest), Ok(()));

    let copy = tempfile::tempdir().expect("dir");
    let file = copy.path().join("model.safetensors");
    std::fs::copy(staged.dir().join("model.safetensors"), &file).expect("copy");
    let file = std::fs::File::options().write(true).open(&file).expect("open");
    file.set_len(1 << 20).expect("cut");
    let error = publisher.publish_directory(3, copy.path()).err().expect("refused").to_string();
    assert!(error.contains("truncated") && error.contains("model.safetensors"), "{error}");
}

#[test]
fn numbers_do_not_go_back_within_an_epoch_and_a_failed_publish_leaves_the_old_version() {
    let (publisher, weights) = (publisher(), Weights::new(2, 13));
    let v2 = publish(&publisher, 2, &weights).version;
    let refused = publisher.publish(2, &weights.refs()).err().expect("refused");
    assert!(matches!(refused, PublishError::Regression { .. }), "{refused}");
    let mut short = weights.refs();
    short[1].data = &short[1].data[1..];
    let refused = publisher.publish(3, &short).err().expect("refused");
    assert!(refused.to_string().contains("layers.0.weight"), "{refused}");
    assert_eq!(publisher.server().holder().versions(), [v2]);
}

#[test]
fn an_unsealed_version_and_an_unreachable_source_are_said_plainly() {
    let receiver = receiver();
    let v = Version { epoch: 1, number: 1, root: Root::default() };
    let error = receiver.fetcher.fetch_blocking(&request(v, vec![])).err().expect("unsealed");
    assert!(matches!(error, FetchError::Unsealed(_)));
    let v = Version { root: Root([1; 32]), ..v };
    let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("port").local_addr();
    let sources = vec![source("engine-7", closed.expect("addr").to_string(), v)];
    let error = receiver.fetcher.fetch_blocking(&request(v, sources)).err().expect("no path");
    let text = error.to_string();
    assert!(text.contains("no path to any holder of v1@1: engine-7 at 127.0.0.1"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_fetch_stops_and_leaves_the_slot_usable() {
    let (publisher, receiver, weights) = (publisher(), receiver(), Weights::new(16, 14));
    let publishing = publisher.publish(1, &weights.refs()).expect("publish");
    let v = publishing.sealed().await.expect("sealed").version;
    let stalling = Proxy::start(&publisher.addresses()[0], Fault::StallAfter(1 << 20));
    let sources = vec![source("stalled", stalling.addr.to_string(), v)];
    let fetch = receiver.fetcher.fetch(request(v, sources));
    assert!(tokio::time::timeout(Duration::from_millis(300), fetch).await.is_err());
    let again = request(v, vec![from(&publisher, v)]);
    let mut outcome = receiver.fetcher.fetch(again.clone()).await;
    while matches!(outcome, Err(FetchError::Stage { error: StageError::Busy { .. }, .. })) {
        outcome = receiver.fetcher.fetch(again.clone()).await;
    }
    assert_holds(outcome.expect("fetch").dir(), &weights);
}

#[test]
fn a_receiver_serves_what_it_holds_while_it_is_still_receiving() {
    let (publisher, weights) = (publisher(), Weights::new(32, 15));
    let published = publish(&publisher, 1, &weights);
    let v = published.version;
    let (relay, leaf) = (receiver(), receiver_with(|r| r.progress = Duration::from_secs(5)));
    let limits = anabranch_transfer::ServeLimits::default();
    let server = Server::start(([127, 0, 0, 1], 0).into(), relay.holder.clone(), limits);
    let server = server.expect("server");
    std::thread::scope(|s| {
        let upstream = s.spawn(|| {
            relay.fetcher.fetch_blocking(&request(v, vec![from(&publisher, v)])).expect("relay")
        });
        while relay.holder.versions().is_empty() {
            std::thread::yield_now();
        }
        let at = source("relay", server.addr().to_string(), v);
        let staged = leaf.fetcher.fetch_blocking(&request(v, vec![at])).expect("leaf");
        assert_holds(staged.dir(), &weights);
        drop(upstream.join().expect("relay"));
    });
    assert_eq!(published.sent_bytes(), published.bytes, "the leaf cost the trainer nothing");
}

#[test]
fn a_sparse_step_travels_as_a_delta_and_relays_hand_it_on() {
    let (publisher, receiver, leaf) = (publisher(), receiver(), receiver());
    let mut weights = Weights::new(24, 16);
    let base = publish(&publisher, 1, &weights);
    let at = |p: &anabranch_transfer::Publisher, v| vec![from(p, v)];
    let fetch = |r: &Receiver, v, sources| r.fetcher.fetch_blocking(&request(v, sources));
    let v1 = base.version;
    let first = fetch(&receiver, v1, at(&publisher, v1)).expect("v1");
    let leaf_first = fetch(&leaf, v1, at(&publisher, v1)).expect("v1");
    // One value in a hundred moves by one step, in every chunk.
    for (_, _, _, data) in &mut weights.tensors {
        for byte in data.iter_mut().step_by(200) {
            *byte ^= 1;
        }
    }
    let second = publish(&publisher, 2, &weights);
    let v2 = second.version;
    let delta_bytes = second.delta_bytes.expect("a delta");
    assert!(delta_bytes * 20 < second.bytes, "{delta_bytes} of {}", second.bytes);
    let staged = fetch(&receiver, v2, at(&publisher, v2)).expect("v2");
    assert_holds(staged.dir(), &weights);
    assert_eq!((staged.report.delta_bytes, second.sent_bytes()), (delta_bytes, delta_bytes));

    let limits = anabranch_transfer::ServeLimits::default();
    let relay = Server::start(([127, 0, 0, 1], 0).into(), receiver.holder.clone(), limits);
    let relay = relay.expect("server");
    let by_relay = vec![source("relay", relay.addr().to_string(), v2)];
    let at_leaf = fetch(&leaf, v2, by_relay).expect("v2 from the relay");
    assert_holds(at_leaf.dir(), &weights);
    assert_eq!(at_leaf.report.delta_bytes, delta_bytes);
    assert_eq!(second.sent_bytes(), delta_bytes, "the leaf cost the trainer nothing");
    drop((first, leaf_first));
}
