//! What each link costs against plain TCP, sender and receiver in this process, over loopback. Prints.
#![allow(clippy::err_expect)]

mod common;

use std::time::Duration;

use anabranch_transfer::{LinkKind, Publisher};
use common::*;

const MIB: usize = 256;
const ROUNDS: u64 = 5;
const LINKS: [LinkKind; 3] = [LinkKind::Tcp, LinkKind::Tls, LinkKind::Quic];

#[derive(Clone, Copy, Default)]
struct Cost {
    mib_per_s: f64,
    cpu_s_per_gib: f64,
}

/// User and system time of this process, in ticks of 10 ms.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("stat");
    let after = stat.rsplit_once(')').expect("a name").1;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<f64>().expect("a count");
    (ticks(11) + ticks(12)) / 100.0
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A version in which every chunk differs from all before it, over one link.
fn transfer(
    publisher: &Publisher,
    receiver: &Receiver,
    weights: &mut Weights,
    number: u64,
    link: usize,
) -> Cost {
    for (_, _, _, data) in &mut weights.tensors {
        for at in (0..data.len()).step_by(64 << 10) {
            data[at] = data[at].wrapping_add(1 + number as u8);
        }
    }
    let v = publish(publisher, number, weights).version;
    let sources = vec![source("trainer", &publisher.addresses()[link], v)];
    let before = cpu_s();
    let staged = receiver.fetcher.fetch_blocking(&request(v, sources)).expect("fetch");
    let (cpu, took) = (cpu_s() - before, staged.report.took.as_secs_f64());
    let bytes = staged.report.received_bytes as f64;
    assert!(bytes > 0.9 * staged.report.bytes as f64, "{:?}", staged.report);
    Cost {
        mib_per_s: bytes / took / f64::from(1 << 20),
        cpu_s_per_gib: cpu / bytes * f64::from(1 << 30),
    }
}

#[test]
#[ignore = "prints figures: cargo test --release -p anabranch-transfer --test links_cost -- --ignored --nocapture"]
fn links_against_plain_tcp() {
    let publisher = publisher_with(|c| {
        (c.links, c.delta, c.chunk_bytes, c.hash_threads) = (LINKS.to_vec(), false, 1 << 20, 2);
    });
    let receiver = receiver_with(|r| r.progress = Duration::from_secs(20));
    let mut weights = Weights::new(MIB, 1);
    // Both slots are in memory after two versions.
    for number in 1..=2 {
        transfer(&publisher, &receiver, &mut weights, number, 0);
    }
    let mut costs = vec![Vec::new(); LINKS.len()];
    for round in 0..ROUNDS {
        for (link, costs) in costs.iter_mut().enumerate() {
            let number = 3 + round * LINKS.len() as u64 + link as u64;
            costs.push(transfer(&publisher, &receiver, &mut weights, number, link));
        }
    }
    let of = |link: usize| Cost {
        mib_per_s: median(costs[link].iter().map(|c| c.mib_per_s)),
        cpu_s_per_gib: median(costs[link].iter().map(|c| c.cpu_s_per_gib)),
    };
    let tcp = of(0);
    eprintln!("{MIB} MiB, 4 streams, hashed, median of {ROUNDS} interleaved rounds");
    eprintln!("link   MiB/s  of tcp  CPU s/GiB  of tcp");
    for (link, kind) in LINKS.iter().enumerate() {
        let at = of(link);
        eprintln!(
            "{:<5} {:>6.0} {:>6.2}x {:>10.2} {:>6.1}x",
            kind.to_string(),
            at.mib_per_s,
            at.mib_per_s / tcp.mib_per_s,
            at.cpu_s_per_gib,
            at.cpu_s_per_gib / tcp.cpu_s_per_gib
        );
    }
}
