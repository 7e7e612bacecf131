//! The data plane in virtual time: hosts with rated links, chunks as flows that share them fairly. Real are the
//! manager's plan and the receiver's chunk queue; links, streams and relaying are modelled.
//!
//! Checked in every world: every live receiver has everything in the end; no host passes on what it does not hold; a
//! ledger only grows.

mod flow;
mod node;
mod world;

use std::time::Duration;

use serde::Serialize;

use crate::rng::Rng;

/// Settings of one roll-out of one version.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// Receivers from the start, numbered from 0.
    pub receivers: usize,
    /// Size of the image.
    pub bytes: u64,
    /// Size of a chunk.
    pub chunk_bytes: u32,
    /// Rate of every host's link in each direction, in bytes per second.
    pub rate: u64,
    /// Receivers with another rate, each with its rate in bytes per second.
    pub slow: Vec<(usize, u64)>,
    /// Time of one way through the network.
    pub latency: Duration,
    /// Times at which late receivers join; they are numbered after the others.
    pub joins: Vec<Duration>,
    /// Time and receiver of each process that dies; its peers hear of it.
    pub kills: Vec<(Duration, usize)>,
    /// Time and receiver of each link that goes down; nobody hears of it.
    pub cuts: Vec<(Duration, usize)>,
    /// True if the manager has measured the rates, and so puts slow hosts at the ends.
    pub rates_known: bool,
}

/// Figures of one roll-out. `wire` is the time of one transfer at line rate.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FanOut {
    /// Receivers from the start.
    pub receivers: usize,
    /// Stripes that the plan cut the image into.
    pub stripes: usize,
    /// Time of one transfer at line rate, in milliseconds.
    pub wire_ms: f64,
    /// Time until the last live receiver of the first wave had everything, divided by `wire`.
    pub last_over_wire: f64,
    /// Time of each receiver, from its order on, divided by `wire`; without meaning for the dead.
    pub took_over_wire: Vec<f64>,
    /// Time of the slowest late joiner, from its join on, divided by `wire`.
    pub joiner_over_wire: f64,
    /// Bytes that the trainer sent, divided by the image's size.
    pub trainer_egress: f64,
    /// Bytes that the trainer sent to late joiners, divided by the image's size.
    pub trainer_to_joiners: f64,
    /// Most bytes that one live receiver got more than once, divided by the image's size.
    pub again: f64,
    /// Events that the world handled.
    pub events: u64,
}

/// Runs a fault-free roll-out to `receivers` at equal rates, in bytes per second.
pub fn fan_out(receivers: usize, bytes: u64, chunk_bytes: u32, rate: u64) -> FanOut {
    run(&Transfer::plain(receivers, bytes, chunk_bytes, rate)).expect("nothing fails in it")
}

/// Runs one roll-out. An error names the broken promise.
pub fn run(transfer: &Transfer) -> Result<FanOut, String> {
    world::World::new(transfer).run()
}

impl Transfer {
    /// A roll-out without faults, at one rate in bytes per second.
    pub fn plain(receivers: usize, bytes: u64, chunk_bytes: u32, rate: u64) -> Self {
        Self {
            receivers,
            bytes,
            chunk_bytes,
            rate,
            slow: Vec::new(),
            latency: Duration::from_micros(200),
            joins: Vec::new(),
            kills: Vec::new(),
            cuts: Vec::new(),
            rates_known: false,
        }
    }

    /// A roll-out of 256 MiB at 200 Mbit/s to a few receivers, of which up to two die on the way, and which another may
    /// join.
    pub fn of_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x7ab5);
        let receivers = rng.range(2, 13) as usize;
        let mut transfer = Self::plain(receivers, 256 << 20, 1 << 20, 25_000_000);
        let mut at = || Duration::from_millis(rng.range(1, 11_000));
        let (kill, second, join) = (at(), at(), at());
        let deaths = rng.range(0, 3).min(receivers as u64 - 1);
        let victim = rng.range(0, receivers as u64) as usize;
        for (n, when) in [kill, second].into_iter().enumerate().take(deaths as usize) {
            transfer.kills.push((when, (victim + n * 2 + 1) % receivers));
        }
        transfer.kills.dedup_by_key(|(_, victim)| *victim);
        if rng.chance(40) {
            transfer.joins.push(join);
        }
        transfer
    }
}
