//! Versions that travel as differences: chains of them, the anchor, and differences that lie.

mod common;

use anabranch_proto::address::Address;
use anabranch_proto::manifest::Manifest;
use anabranch_transfer::{Published, Publisher, ServeLimits, Server};
use common::*;

/// One value in `every` moves by one step, in every tensor.
fn step(weights: &mut Weights, every: usize) {
    for (_, _, _, data) in &mut weights.tensors {
        data.iter_mut().step_by(2 * every).for_each(|byte| *byte ^= 1);
    }
}

fn stepped(publisher: &Publisher, number: u64, weights: &mut Weights) -> Published {
    step(weights, 100 + number as usize);
    publish(publisher, number, weights)
}

#[test]
fn a_receiver_several_versions_behind_gets_the_deltas_between_in_one_chain() {
    let (publisher, behind, leaf, near) = (publisher(), receiver(), receiver(), receiver());
    let mut weights = Weights::new(12, 16);
    let first = publish(&publisher, 1, &weights);
    let fetch = |r: &Receiver, published: &Published| {
        let v = published.version;
        r.fetcher.fetch_blocking(&request(v, vec![from(&publisher, v)])).expect("fetched")
    };
    let old = (fetch(&behind, &first), fetch(&leaf, &first));
    let deltas: Vec<u64> = (2..5)
        .map(|n| stepped(&publisher, n, &mut weights).delta_bytes.expect("a delta"))
        .collect();
    let fifth = stepped(&publisher, 5, &mut weights);
    let at_fifth = fetch(&near, &fifth);
    let last = stepped(&publisher, 6, &mut weights);
    let newer = [&fifth, &last].map(|p| p.delta_bytes.expect("a delta"));
    let chain = deltas.iter().chain(&newer).sum::<u64>();
    let staged = fetch(&behind, &last);
    assert_holds(staged.dir(), &weights);
    assert_eq!((staged.report.delta_bytes, staged.report.received_bytes), (chain, chain));
    assert!(chain * 8 < last.bytes, "{chain} of {}", last.bytes);

    // A relay hands the chain on to a receiver that is as far behind, and its newest part to another.
    let server =
        Server::start(([127, 0, 0, 1], 0).into(), behind.holder.clone(), ServeLimits::default());
    let server = server.expect("server");
    let (v, sent) = (last.version, last.sent_bytes());
    let by_relay = vec![source("relay", server.addr().to_string(), v)];
    let at_leaf = leaf.fetcher.fetch_blocking(&request(v, by_relay)).expect("from the relay");
    assert_holds(at_leaf.dir(), &weights);
    assert_eq!((at_leaf.report.delta_bytes, last.sent_bytes()), (chain, sent));
    let by_relay = vec![source("relay", server.addr().to_string(), v)];
    let at_near = near.fetcher.fetch_blocking(&request(v, by_relay)).expect("from the relay");
    assert_holds(at_near.dir(), &weights);
    assert_eq!((at_near.report.delta_bytes, last.sent_bytes()), (newer[1], sent));
    drop((old, at_fifth));

    // From here on one version behind again.
    let next = stepped(&publisher, 7, &mut weights);
    let staged = (fetch(&behind, &next), staged).0;
    assert_holds(staged.dir(), &weights);
    assert_eq!(Some(staged.report.delta_bytes), next.delta_bytes);
}

#[test]
fn a_chain_that_would_cost_too_much_is_dropped_and_the_version_comes_in_full() {
    let (publisher, behind, near) = (publisher(), receiver(), receiver());
    let mut weights = Weights::new(12, 3);
    let first = publish(&publisher, 1, &weights);
    let fetch = |r: &Receiver, published: &Published| {
        let v = published.version;
        r.fetcher.fetch_blocking(&request(v, vec![from(&publisher, v)])).expect("fetched")
    };
    let old = fetch(&behind, &first);
    // Every value: an eighth of the bytes each time, which is worth it once, but not three times.
    let mut dense = |number: u64| {
        for (_, _, _, data) in &mut weights.tensors {
            data.iter_mut().step_by(2).for_each(|byte| *byte ^= number as u8);
        }
        publish(&publisher, number, &weights)
    };
    let third = (dense(2), dense(3), dense(4)).2;
    let kept = fetch(&near, &third);
    let last = stepped(&publisher, 5, &mut weights);
    let full = fetch(&behind, &last);
    assert_holds(full.dir(), &weights);
    assert_eq!((full.report.delta_bytes, full.report.received_bytes), (0, last.bytes));
    let by_delta = fetch(&near, &last);
    assert_holds(by_delta.dir(), &weights);
    assert_eq!(Some(by_delta.report.delta_bytes), last.delta_bytes);
    drop((old, kept));
}

#[test]
fn a_delta_that_leads_elsewhere_costs_its_bytes_and_the_version_still_comes_right() {
    let (exports, receiver) = (tempfile::tempdir().expect("dir"), receiver());
    let publisher = publisher_with(|c| c.export = Some(exports.path().to_owned()));
    let mut weights = Weights::new(8, 5);
    let first = publish(&publisher, 1, &weights);
    let exported = |v| {
        let addrs = publisher.addresses();
        let file = addrs.iter().find(|a| matches!(a, Address::File(_))).expect("exported");
        request(v, vec![source("export", file, v)])
    };
    let old = receiver.fetcher.fetch_blocking(&exported(first.version)).expect("v1");
    let second = stepped(&publisher, 2, &mut weights);
    let dir = second.export.clone().expect("exported").expect("written");
    lie(&dir);
    let staged = receiver.fetcher.fetch_blocking(&exported(second.version)).expect("v2");
    assert_holds(staged.dir(), &weights);
    assert!(staged.report.delta_bytes > 0, "it was tried");
    assert!(staged.report.received_bytes > staged.report.delta_bytes, "and the rest came in full");
    drop(old);
}

/// Changes a payload of the delta and the manifest with it: a well-formed delta to something else.
fn lie(dir: &std::path::Path) {
    let (blob, manifest) = (dir.join("delta"), dir.join("delta.manifest"));
    let mut bytes = std::fs::read(&blob).expect("delta");
    let at = bytes.len() - 100;
    bytes[at] ^= 0x08;
    std::fs::write(&blob, &bytes).expect("written");
    let mut of = Manifest::decode(&std::fs::read(&manifest).expect("manifest")).expect("decoded");
    let chunks = bytes.chunks(of.chunk_bytes as usize);
    of.chunk_hashes = chunks.map(|c| *blake3::hash(c).as_bytes()).collect();
    std::fs::write(&manifest, of.encode()).expect("written");
}
