//! Receivers that feed each other by a plan while they still receive.

// What a fetch gives has no Debug: `expect` on its error would ask for it.
#![allow(clippy::err_expect)]

mod common;

use std::time::Duration;

use anabranch_proto::address::Address;
use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::version::Version;
use anabranch_transfer::{FeedOrder, FetchRequest, ServeLimits, Server, SourceRef};
use common::*;

fn serve(receiver: &Receiver) -> Server {
    let limits = ServeLimits { version_wait: Duration::from_millis(300), ..ServeLimits::default() };
    Server::start("127.0.0.1:0".parse().expect("addr"), receiver.holder.clone(), limits)
        .expect("server")
}

fn at(server: &Server, version: Version, stripes: &[u32]) -> SourceRef {
    let addr = server.addr().to_string();
    SourceRef { stripes: stripes.to_vec(), ..source(&addr, &addr, version) }
}

fn chained(version: Version, sources: Vec<SourceRef>) -> FetchRequest {
    FetchRequest { stripe_count: 1, ..request(version, sources) }
}

#[test]
fn a_chain_of_receivers_costs_the_trainer_one_copy() {
    let (publisher, weights) = (publisher(), Weights::new(24, 1));
    let published = publish(&publisher, 1, &weights);
    let v = published.version;
    let trainer = |stripes: &[u32]| SourceRef { stripes: stripes.to_vec(), ..from(&publisher, v) };
    let nodes: Vec<Receiver> = (0..3).map(|_| receiver()).collect();
    let servers: Vec<Server> = nodes.iter().map(serve).collect();
    std::thread::scope(|scope| {
        // The tail begins first: a parent that has not begun is waited for.
        for k in (0..3).rev() {
            let (node, servers, weights) = (&nodes[k], &servers, &weights);
            let sources = match k {
                0 => vec![trainer(&[0])],
                k => vec![at(&servers[k - 1], v, &[0]), trainer(&[])],
            };
            scope.spawn(move || {
                let staged = node.fetcher.fetch_blocking(&chained(v, sources)).expect("fetch");
                assert_holds(staged.dir(), weights);
            });
        }
    });
    assert_eq!(published.sent_bytes(), published.bytes);
}

#[test]
fn parents_of_each_other_begin_at_once() {
    let (publisher, weights) = (publisher(), Weights::new(8, 1));
    let v = publish(&publisher, 1, &weights).version;
    // As patient as the one that is asked: else a wait for each other ends by itself.
    let node = || receiver_with(|rules| rules.progress = Duration::from_secs(10));
    let nodes = [node(), node()];
    let patient = || ServeLimits { version_wait: Duration::from_secs(4), ..ServeLimits::default() };
    let start = |node: &Receiver| {
        let any = "127.0.0.1:0".parse().expect("addr");
        Server::start(any, node.holder.clone(), patient()).expect("server")
    };
    let servers = nodes.each_ref().map(start);
    std::thread::scope(|scope| {
        for k in 0..2u32 {
            let (node, servers, weights) = (&nodes[k as usize], &servers, &weights);
            // Each is the head of one chain, and named behind the other in the list of sources.
            let other = at(&servers[1 - k as usize], v, &[1 - k]);
            let trainer = SourceRef { stripes: vec![k], ..from(&publisher, v) };
            let request = FetchRequest { stripe_count: 2, ..request(v, vec![other, trainer]) };
            scope.spawn(move || {
                let staged = node.fetcher.fetch_blocking(&request).expect("fetch");
                assert_holds(staged.dir(), weights);
                let took = staged.report.took;
                assert!(took < patient().version_wait, "they waited for each other: {took:?}");
            });
        }
    });
}

#[test]
fn children_of_a_relay_that_dies_go_on_from_the_next_source() {
    let (publisher, weights) = (publisher(), Weights::new(24, 1));
    let v = publish(&publisher, 1, &weights).version;
    let relay = receiver();
    let relay_server = serve(&relay);
    let whole = relay.fetcher.fetch_blocking(&request(v, vec![from(&publisher, v)]));
    let whole = whole.expect("relay");
    let dying = Proxy::start(relay_server.addr().to_string(), Fault::DieAfter(9 << 20));
    let child = receiver();
    let parent = SourceRef { stripes: vec![0], ..source("relay", dying.addr.to_string(), v) };
    let request = chained(v, vec![parent, from(&publisher, v)]);
    let staged = child.fetcher.fetch_blocking(&request).expect("child");
    assert_holds(staged.dir(), &weights);
    let report = &staged.report;
    let from_relay = report.bytes_by_holder[0].1;
    assert!((4 << 20..10 << 20).contains(&from_relay), "{report:?}");
    let again = report.received_bytes - report.bytes;
    assert!(again * 50 <= report.bytes, "{again} bytes came again");
    drop(whole);
}

#[test]
fn without_the_version_anywhere_the_error_says_who_had_not_begun() {
    let (publisher, weights) = (publisher(), Weights::new(4, 1));
    let v = publish(&publisher, 1, &weights).version;
    let (idle, child) = (receiver(), receiver());
    let server = serve(&idle);
    let sources = vec![at(&server, v, &[0])];
    let error = child.fetcher.fetch_blocking(&chained(v, sources)).err().expect("refused");
    assert!(error.to_string().contains("has not begun to arrive"), "{error}");
}

fn feed_order(to: &Server, version: Version, job: &str) -> FeedOrder {
    let (job, receiver) = (job.to_owned(), "trainer".to_owned());
    let grant = Grant { job, version, receiver, role: Role::Feed, ttl_ms: 60_000, nonce: 7 };
    FeedOrder {
        addrs: vec![Address::Tcp(to.addr().into())],
        grant: grant.mint(&KEY).to_vec(),
        streams: 4,
        connect: Duration::from_secs(2),
    }
}

#[test]
fn a_source_that_cannot_be_dialled_dials_and_is_asked_on_its_own_streams() {
    let (publisher, node) = (publisher(), receiver());
    let server = serve(&node);
    let mut kept = None;
    for number in 1..=2 {
        let weights = Weights::new(12, number);
        let v = publish(&publisher, number, &weights).version;
        publisher.server().feed(feed_order(&server, v, JOB)).expect("feed");
        let request = request(v, vec![source("trainer", "feed:trainer", v)]);
        let staged = node.fetcher.fetch_blocking(&request).expect("fetch");
        assert_holds(staged.dir(), &weights);
        kept = Some(staged);
    }
    drop(kept);
}

#[test]
fn a_source_without_a_grant_to_feed_is_not_heard_and_the_receiver_says_whom_it_waited_for() {
    let (publisher, weights) = (publisher(), Weights::new(2, 1));
    let node = receiver_with(|rules| rules.connect = Duration::from_millis(300));
    let server = serve(&node);
    let v = publish(&publisher, 1, &weights).version;
    publisher.server().feed(feed_order(&server, v, "another job")).expect("feed");
    let request = request(v, vec![source("trainer", "feed:trainer", v)]);
    let error = node.fetcher.fetch_blocking(&request).err().expect("nobody came");
    assert!(error.to_string().contains("`trainer` did not dial this receiver"), "{error}");
}
