//! Several agents on one host: one fetches, the others take its memory over, and nobody writes to memory that
//! another one still uses.

// What a fetch gives has no Debug: `expect` on its error would ask for it.
#![allow(clippy::err_expect)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anabranch_proto::address::Address;
use anabranch_proto::version::Version;
use anabranch_transfer::{FetchRequest, ServeLimits, Server, SourceRef, Staged};
use common::*;

/// Fetches for its host, and lends to its housemates at a socket.
struct Landlord {
    receiver: Receiver,
    address: Address,
    server: Server,
}

fn landlord() -> Landlord {
    let receiver = agent();
    let (socket, _) = receiver.fetcher.staging().sharing().expect("this kernel knows leases");
    let mut server = Server::within_host(receiver.holder.clone(), ServeLimits::default());
    server.as_mut().expect("server").share(&socket).expect("shared");
    let server = server.expect("server");
    Landlord { receiver, address: Address::Shm(socket), server }
}

/// Sources tell once a second that they live.
fn agent() -> Receiver {
    receiver_with(|rules| rules.progress = Duration::from_secs(5))
}

impl Landlord {
    fn as_source(&self, version: Version) -> SourceRef {
        SourceRef { stripes: vec![0], ..source("landlord", &self.address, version) }
    }

    fn fetch(&self, request: FetchRequest) -> Staged {
        self.receiver.fetcher.fetch_blocking(&request).expect("landlord")
    }
}

fn inode(staged: &Staged) -> u64 {
    fs::metadata(staged.dir().join("model.safetensors")).expect("model").ino()
}

/// Slots by their inodes.
fn slots(receiver: &Receiver) -> Vec<u64> {
    let root = receiver.fetcher.staging().root();
    let slot = |n: u32| fs::metadata(root.join(format!("slot-{n}"))).map(|m| m.ino());
    (0..2).filter_map(|n| slot(n).ok()).collect()
}

#[test]
fn one_of_a_host_fetches_and_the_others_take_its_memory_over() {
    let (publisher, weights) = (publisher(), Weights::new(24, 1));
    let (landlord, guests) = (landlord(), [agent(), agent()]);
    for number in 1..=4 {
        let published = publish(&publisher, number, &weights);
        let v = published.version;
        // They begin first: one that is about to fetch it is waited for.
        let sources = || vec![landlord.as_source(v), from(&publisher, v)];
        let fetch = &|guest: &Receiver| {
            let request = FetchRequest { stripe_count: 1, ..request(v, sources()) };
            guest.fetcher.fetch_blocking(&request).expect("guest")
        };
        std::thread::scope(|scope| {
            let waiting = guests.each_ref().map(|guest| scope.spawn(move || fetch(guest)));
            let own = landlord.fetch(request(v, vec![from(&publisher, v)]));
            for guest in waiting {
                let staged = guest.join().expect("guest");
                assert_holds(staged.dir(), &weights);
                assert_eq!((inode(&staged), staged.report.received_bytes), (inode(&own), 0));
                assert_eq!(staged.report.adopted_bytes, published.bytes);
            }
        });
        assert!(published.sent_bytes() <= published.bytes, "the trainer sends it once");
    }
    assert!(guests.iter().all(|guest| slots(guest).is_empty()), "they need no slots of their own");
    assert_eq!(landlord.server.addresses(), []);
}

#[test]
fn memory_that_a_housemate_uses_is_left_to_it_and_then_given_back() {
    let (publisher, landlord, guest) = (publisher(), landlord(), agent());
    let weights: Vec<Weights> = (0..5).map(|n| Weights::new(4, n)).collect();
    let mut own = None;
    let mut next = |number: u64| {
        let v = publish(&publisher, number, &weights[number as usize]).version;
        own = Some(landlord.fetch(request(v, vec![from(&publisher, v)])));
        v
    };
    let first = next(1);
    let adopted = guest.fetcher.fetch_blocking(&request(first, vec![landlord.as_source(first)]));
    let adopted = adopted.expect("guest");
    let before = slots(&landlord.receiver);
    assert!(before.contains(&inode(&adopted)));
    // Its own engine moved on, and both slots are needed again.
    next(2);
    next(3);
    assert!(!slots(&landlord.receiver).contains(&inode(&adopted)), "the slot has new memory");
    assert_holds(adopted.dir(), &weights[1]);
    drop(adopted);
    let after = slots(&landlord.receiver);
    next(4);
    assert_eq!(slots(&landlord.receiver), after, "nothing is used by others any more");
}

#[test]
fn what_a_dead_landlord_cannot_give_is_fetched_from_elsewhere() {
    let (publisher, weights) = (publisher(), Weights::new(4, 1));
    let v = publish(&publisher, 1, &weights).version;
    let (landlord, guest) = (landlord(), agent());
    let gone = landlord.as_source(v);
    drop(landlord);
    let staged = guest.fetcher.fetch_blocking(&request(v, vec![gone, from(&publisher, v)]));
    let staged = staged.expect("guest");
    assert_holds(staged.dir(), &weights);
    assert_eq!(staged.report.adopted_bytes, 0);
}

#[test]
fn agents_on_one_tmpfs_share_a_host_and_a_directory_elsewhere_is_another() {
    let (a, b) = (agent(), agent());
    let host = |receiver: &Receiver| receiver.fetcher.staging().sharing().expect("sharing").1;
    assert_eq!(host(&a), host(&b));
    let elsewhere = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("dir");
    let other = receiver_in(elsewhere.into(), |_| {});
    if let Some((_, apart)) = other.fetcher.staging().sharing() {
        assert_ne!(apart, host(&a));
    }
}
