//! The same promises over each link: what arrives, what is refused, and what a broken path costs.

// What a publisher or holder gives has no Debug: `expect_err` would ask for it.
#![allow(clippy::err_expect)]

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anabranch_proto::address::{Address, CertPin, HostPort};
use anabranch_proto::grant::{Grant, Role};
use anabranch_transfer::{
    FeedOrder, FetchError, Holder, LinkKind, Listen, Listener, Publisher, ServeLimits, Server,
};
use common::udp::{UdpFault, UdpProxy};
use common::*;

const ALL: [LinkKind; 3] = [LinkKind::Tcp, LinkKind::Tls, LinkKind::Quic];
const PINNED: [LinkKind; 2] = [LinkKind::Tls, LinkKind::Quic];

fn publisher_over(links: &[LinkKind]) -> Publisher {
    publisher_with(|c| c.links = links.to_vec())
}

fn address(publisher: &Publisher) -> Address {
    publisher.addresses().remove(0)
}

/// The address of the same listener by another way.
fn via(address: &Address, way: SocketAddr) -> Address {
    let way = way.into();
    match address {
        Address::Tls(_, pin) => Address::Tls(way, *pin),
        Address::Quic(_, pin) => Address::Quic(way, *pin),
        _ => Address::Tcp(way),
    }
}

fn authority(address: &Address) -> &HostPort {
    match address {
        Address::Tcp(at) | Address::Tls(at, _) | Address::Quic(at, _) => at,
        other => panic!("{other} has no port"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_arrives_over_each_link() {
    for link in ALL {
        let (publisher, receiver, weights) =
            (publisher_over(&[link]), receiver(), Weights::new(24, 1));
        let publishing = publisher.publish(1, &weights.refs()).expect("publish");
        let published = publishing.sealed().await.expect("sealed");
        let of_link = match address(&publisher) {
            Address::Tcp(_) => LinkKind::Tcp,
            Address::Tls(..) => LinkKind::Tls,
            Address::Quic(..) => LinkKind::Quic,
            other => panic!("{other}"),
        };
        assert_eq!(of_link, link);
        let sources = vec![from(&publisher, published.version)];
        let staged = receiver.fetcher.fetch(request(published.version, sources)).await;
        let staged = staged.unwrap_or_else(|error| panic!("{link}: {error}"));
        assert_holds(staged.dir(), &weights);
        assert_eq!(staged.report.received_bytes, published.bytes, "{link}");
        assert_eq!(published.sent_bytes(), published.bytes, "{link}");
        assert_eq!(staged.report.queue.lost_streams, 0, "{link}: {:?}", staged.report);
    }
}

#[test]
fn versions_follow_each_other_over_streams_that_are_kept() {
    for link in ALL {
        let (publisher, receiver) = (publisher_over(&[link]), receiver());
        for number in 1..=3 {
            let weights = Weights::new(4, number);
            let v = publish(&publisher, number, &weights).version;
            let fetched = receiver.fetcher.fetch_blocking(&request(v, vec![from(&publisher, v)]));
            assert_holds(fetched.unwrap_or_else(|error| panic!("{link}: {error}")).dir(), &weights);
        }
        let open = publisher.server().open_streams();
        assert!(open <= 5, "{link}: {open} streams are open");
    }
}

#[test]
fn one_listener_offers_all_links_and_a_receiver_takes_the_first_that_answers() {
    let order = [LinkKind::Quic, LinkKind::Tls, LinkKind::Tcp];
    let (publisher, receiver, weights) = (publisher_over(&order), receiver(), Weights::new(4, 2));
    let v = publish(&publisher, 1, &weights).version;
    let addrs = publisher.addresses();
    assert_eq!(addrs.len(), 3);
    for addr in &addrs {
        let staged = receiver.fetcher.fetch_blocking(&request(v, vec![source("t", addr, v)]));
        assert_holds(staged.expect("fetch").dir(), &weights);
    }
    // Nobody is at the first one: UDP is often blocked where TCP is not.
    let silent = UdpSocket::bind("127.0.0.1:0").expect("port");
    let mut at = source("trainer", &addrs[0], v);
    at.addrs = vec![via(&addrs[0], silent.local_addr().expect("addr")), addrs[1].clone()];
    let late = receiver_with(|rules| rules.connect = Duration::from_millis(400));
    let staged = late.fetcher.fetch_blocking(&request(v, vec![at])).expect("the second address");
    assert_holds(staged.dir(), &weights);
}

#[test]
fn a_listener_with_another_certificate_is_refused_and_both_are_named() {
    for link in PINNED {
        let (publisher, receiver, weights) =
            (publisher_over(&[link]), receiver(), Weights::new(2, 3));
        let published = publish(&publisher, 1, &weights);
        let (v, at) = (published.version, address(&publisher));
        let foreign = CertPin([0xab; 32]);
        let (pin, wrong) = match at {
            Address::Tls(at, pin) => (pin, Address::Tls(at, foreign)),
            Address::Quic(at, pin) => (pin, Address::Quic(at, foreign)),
            other => panic!("{other} is not pinned"),
        };
        let (pin, other) = (pin.to_string(), foreign.to_string());
        let sources = vec![source("trainer", wrong, v)];
        let error = receiver.fetcher.fetch_blocking(&request(v, sources)).err().expect("refused");
        let text = error.to_string();
        assert!(text.contains(&pin) && text.contains(&other), "{link}: {text}");
        assert_eq!(published.sent_bytes(), 0, "{link}");
    }
}

#[test]
fn without_a_valid_grant_not_one_byte_is_served_over_any_link() {
    for link in ALL {
        let (publisher, receiver, weights) =
            (publisher_over(&[link]), receiver(), Weights::new(2, 5));
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
        let grants = [
            (Vec::new(), "not a grant"),
            (good.mint(&[1; 32]).to_vec(), "another key"),
            (Grant { job: "other".into(), ..good.clone() }.mint(&KEY).to_vec(), "serves `math`"),
            (Grant { role: Role::Feed, ..good.clone() }.mint(&KEY).to_vec(), "Feed"),
        ];
        for (grant, want) in grants {
            let mut at = from(&publisher, v);
            at.grant = grant;
            let refused = receiver.fetcher.fetch_blocking(&request(v, vec![at])).err();
            let text = refused.expect("refused").to_string();
            assert!(text.contains(want), "{link}, {want}: {text}");
        }
        assert_eq!(published.sent_bytes(), 0, "{link}");
    }
}

#[test]
fn a_plain_receiver_at_a_listener_for_tls_is_told_what_to_dial_and_the_other_way_round() {
    let cases = [
        (LinkKind::Tls, LinkKind::Tcp, "this listener takes TLS only"),
        (LinkKind::Tcp, LinkKind::Tls, "this listener takes no TLS"),
    ];
    for (offered, dialled, want) in cases {
        let (publisher, receiver, weights) =
            (publisher_over(&[offered]), receiver(), Weights::new(2, 6));
        let published = publish(&publisher, 1, &weights);
        let v = published.version;
        let authority = authority(&address(&publisher)).clone();
        let wrong = match dialled {
            LinkKind::Tcp => Address::Tcp(authority),
            _ => Address::Tls(authority, CertPin([0xab; 32])),
        };
        let error =
            receiver.fetcher.fetch_blocking(&request(v, vec![source("trainer", &wrong, v)]));
        let text = error.err().expect("refused").to_string();
        assert!(text.contains(want) && text.contains("dial the address"), "{dialled}: {text}");
        assert_eq!(published.sent_bytes(), 0, "{dialled}");
    }
}

#[test]
fn a_cut_in_the_middle_costs_the_chunks_in_flight_and_goes_on_elsewhere() {
    for link in ALL {
        let (publisher, weights) = (publisher_over(&[link]), Weights::new(64, 7));
        let published = publish(&publisher, 1, &weights);
        let (v, at) = (published.version, address(&publisher));
        let receiver = receiver_with(|rules| rules.give_up = Duration::from_secs(20));
        let cut = 32 << 20;
        let (dying, passed) = match link {
            LinkKind::Quic => {
                let proxy = UdpProxy::start(authority(&at), UdpFault::SilentAfter(cut));
                (via(&at, proxy.addr), proxy.passed)
            }
            _ => {
                let proxy = Proxy::start(authority(&at), Fault::DieAfter(cut));
                (via(&at, proxy.addr), proxy.passed)
            }
        };
        let first = request(v, vec![source("dying", &dying, v)]);
        let error = receiver.fetcher.fetch_blocking(&first).err().expect("dies");
        assert!(
            matches!(error, FetchError::NoSource { .. } | FetchError::Stalled { .. }),
            "{link}: {error}"
        );
        assert!(passed.load(std::sync::atomic::Ordering::SeqCst) >= cut, "{link}");
        let resumed = receiver.fetcher.fetch_blocking(&request(v, vec![from(&publisher, v)]));
        let staged = resumed.unwrap_or_else(|error| panic!("{link}: {error}"));
        assert_holds(staged.dir(), &weights);
        let report = &staged.report;
        assert_eq!(report.received_bytes + report.carried_bytes, published.bytes, "{link}");
        assert!(report.carried_bytes > 24 << 20, "{link}: {report:?}");
    }
}

#[test]
fn a_path_that_stalls_costs_its_deadline_and_no_more() {
    for link in ALL {
        let (publisher, receiver, weights) =
            (publisher_over(&[link]), receiver(), Weights::new(16, 8));
        let v = publish(&publisher, 1, &weights).version;
        let at = address(&publisher);
        let stalled = match link {
            LinkKind::Quic => UdpProxy::start(authority(&at), UdpFault::SilentAfter(2 << 20)).addr,
            _ => Proxy::start(authority(&at), Fault::StallAfter(2 << 20)).addr,
        };
        let sources = vec![source("stalled", via(&at, stalled), v), from(&publisher, v)];
        let started = Instant::now();
        let staged = receiver.fetcher.fetch_blocking(&request(v, sources));
        assert_holds(staged.unwrap_or_else(|error| panic!("{link}: {error}")).dir(), &weights);
        assert!(started.elapsed() < Duration::from_secs(6), "{link}: {:?}", started.elapsed());
    }
}

#[test]
fn a_flipped_bit_is_found_by_the_cipher_and_the_bytes_come_from_elsewhere() {
    let (publisher, receiver) = (publisher_over(&[LinkKind::Tls]), receiver());
    let weights = Weights::new(16, 9);
    let v = publish(&publisher, 1, &weights).version;
    let at = address(&publisher);
    let flipping = Proxy::start(authority(&at), Fault::FlipEvery(3 << 20));
    let sources = vec![source("flipping", via(&at, flipping.addr), v), from(&publisher, v)];
    let staged = receiver.fetcher.fetch_blocking(&request(v, sources)).expect("fetch");
    assert_holds(staged.dir(), &weights);
    assert!(staged.report.queue.lost_streams > 0, "{:?}", staged.report);
    assert_eq!(staged.report.queue.bad_chunks, 0, "it never came as far as a hash");
}

#[test]
fn a_lossy_path_changes_nothing_for_quic() {
    let (publisher, weights) = (publisher_over(&[LinkKind::Quic]), Weights::new(8, 10));
    let receiver = receiver_with(|rules| rules.progress = Duration::from_secs(5));
    let v = publish(&publisher, 1, &weights).version;
    let at = address(&publisher);
    let lossy = UdpProxy::start(authority(&at), UdpFault::DropEvery(50));
    let sources = vec![source("far", via(&at, lossy.addr), v)];
    let staged = receiver.fetcher.fetch_blocking(&request(v, sources)).expect("fetch");
    assert_holds(staged.dir(), &weights);
    assert_eq!(staged.report.queue.lost_streams, 0, "{:?}", staged.report);
}

#[test]
fn a_handshake_that_stalls_ends_by_the_connect_deadline() {
    let (publisher, weights) = (publisher_over(&PINNED), Weights::new(1, 11));
    let v = publish(&publisher, 1, &weights).version;
    // They accept, or receive, and say nothing.
    let tcp = TcpListener::bind("127.0.0.1:0").expect("port");
    let udp = UdpSocket::bind("127.0.0.1:0").expect("port");
    let silent = [tcp.local_addr().expect("addr"), udp.local_addr().expect("addr")];
    for (at, silent) in publisher.addresses().iter().zip(silent) {
        let receiver = receiver_with(|rules| {
            (rules.connect, rules.strikes) = (Duration::from_millis(300), 1);
        });
        let sources = vec![source("silent", via(at, silent), v)];
        let started = Instant::now();
        let error = receiver.fetcher.fetch_blocking(&request(v, sources)).err().expect("stalls");
        assert!(started.elapsed() < Duration::from_secs(2), "{at}: {:?}", started.elapsed());
        let text = error.to_string();
        assert!(text.contains("300ms"), "{at}: {text}");
    }
}

#[test]
fn a_peer_that_says_nothing_does_not_keep_its_stream() {
    let limits = ServeLimits { progress: Duration::from_millis(200), ..ServeLimits::default() };
    let listen = Listen { links: ALL.to_vec(), ..Listen::at(([127, 0, 0, 1], 0).into()) };
    let listener = Listener::bind(&listen).expect("bound");
    let server = Server::serve(listener, Holder::new(JOB), limits).expect("server");
    let mut silent = TcpStream::connect(server.addr()).expect("connected");
    let mut dripping = TcpStream::connect(server.addr()).expect("connected");
    // The start of a TLS handshake that never goes on.
    std::io::Write::write_all(&mut dripping, &[0x16, 3, 1, 2, 0]).expect("sent");
    for stream in [&mut silent, &mut dripping] {
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("set");
        let read = std::io::Read::read(stream, &mut [0; 1]);
        assert!(matches!(read, Ok(0)) || read.is_err_and(|e| e.raw_os_error() == Some(104)));
    }
    let started = Instant::now();
    while server.open_streams() > 0 {
        assert!(started.elapsed() < Duration::from_secs(5), "{} are open", server.open_streams());
        std::thread::yield_now();
    }
}

#[test]
fn a_server_closes_at_once_while_receivers_keep_streams() {
    for link in ALL {
        let (publisher, receiver, weights) =
            (publisher_over(&[link]), receiver(), Weights::new(2, 12));
        let v = publish(&publisher, 1, &weights).version;
        let (at, addr) = (from(&publisher, v), publisher.server().addr());
        drop(receiver.fetcher.fetch_blocking(&request(v, vec![at.clone()])).expect("fetch"));
        let started = Instant::now();
        drop(publisher);
        assert!(started.elapsed() < Duration::from_secs(2), "{link}: {:?}", started.elapsed());
        // The next one on the same port is somebody else, and says so where it can be asked.
        let next = publisher_with(|c| (c.links, c.listen) = (vec![link], addr));
        let v2 = publish(&next, 1, &Weights::new(2, 13)).version;
        let mut old = at;
        old.grant = grant(v2, "engine-1");
        let fetched = receiver.fetcher.fetch_blocking(&request(v2, vec![old])).err();
        match link {
            LinkKind::Tcp => assert!(fetched.is_none()),
            _ => {
                let text = fetched.expect("another certificate").to_string();
                assert!(text.contains("started again since"), "{link}: {text}");
            }
        }
    }
}

#[test]
fn a_source_behind_nat_dials_and_is_asked_over_each_link() {
    for link in ALL {
        let (publisher, node) = (publisher(), receiver());
        let listen = Listen { links: vec![link], ..Listen::at(([127, 0, 0, 1], 0).into()) };
        let listener = Listener::bind(&listen).expect("bound");
        let server = Server::serve(listener, node.holder.clone(), ServeLimits::default());
        let server = server.expect("server");
        let weights = Weights::new(12, 15);
        let v = publish(&publisher, 1, &weights).version;
        let (job, receiver) = (JOB.to_owned(), "trainer".to_owned());
        let grant = Grant { job, version: v, receiver, role: Role::Feed, ttl_ms: 60_000, nonce: 7 };
        let order = FeedOrder {
            addrs: server.addresses(),
            grant: grant.mint(&KEY).to_vec(),
            streams: 4,
            connect: Duration::from_secs(2),
        };
        publisher.server().feed(order).expect("feed");
        let fed = request(v, vec![source("trainer", "feed:trainer", v)]);
        let staged = node.fetcher.fetch_blocking(&fed);
        assert_holds(staged.unwrap_or_else(|error| panic!("{link}: {error}")).dir(), &weights);
    }
}
