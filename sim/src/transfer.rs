//! The data plane in virtual time: hosts with rated links, chunks as flows that share them fairly. What is
//! real: the manager's plan and the receiver's chunk queue. What is modelled: links, streams, relaying.
//!
//! Checked in every world: whoever lives has everything in the end; nobody passes on what it does not hold;
//! a ledger only grows.

mod flow;
mod node;
mod world;

use std::time::Duration;

use serde::Serialize;

use crate::rng::Rng;

/// One roll-out of one version.
#[derive(Clone, Debug)]
pub struct Transfer {
    pub receivers: usize,
    pub bytes: u64,
    pub chunk_bytes: u32,
    /// Rate of every host's link in each direction, bytes/s.
    pub rate: u64,
    /// Receivers with another rate.
    pub slow: Vec<(usize, u64)>,
    /// One way.
    pub latency: Duration,
    /// Receivers that join only then; they are numbered after the others.
    pub joins: Vec<Duration>,
    /// A process dies: whoever talks to it hears so.
    pub kills: Vec<(Duration, usize)>,
    /// A link goes down: nobody hears anything.
    pub cuts: Vec<(Duration, usize)>,
    /// The manager has measured the rates and puts slow hosts at the ends.
    pub rates_known: bool,
}

/// How it went.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FanOut {
    pub receivers: usize,
    pub stripes: usize,
    pub wire_ms: f64,
    /// The last live receiver of the first wave, over one transfer at line rate.
    pub last_over_wire: f64,
    /// Each receiver's, from its order on; without meaning for the dead.
    pub took_over_wire: Vec<f64>,
    /// The slowest late joiner, from its join on, over the same.
    pub joiner_over_wire: f64,
    /// Bytes out of the trainer, over the image's.
    pub trainer_egress: f64,
    /// Part of the egress that went to late joiners, over the image's bytes.
    pub trainer_to_joiners: f64,
    /// The most bytes that one live receiver got more than once, over the image's.
    pub again: f64,
    pub events: u64,
}

/// A fault-free roll-out to `receivers` at equal rates (bytes/s).
pub fn fan_out(receivers: usize, bytes: u64, chunk_bytes: u32, rate: u64) -> FanOut {
    run(&Transfer::plain(receivers, bytes, chunk_bytes, rate)).expect("nothing fails in it")
}

/// `Err` names the broken promise.
pub fn run(transfer: &Transfer) -> Result<FanOut, String> {
    world::World::new(transfer).run()
}

impl Transfer {
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

    /// 256 MiB at 200 Mbit/s to a few receivers, of which one or two die on the way, while others join.
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
