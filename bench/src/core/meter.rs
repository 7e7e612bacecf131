//! CPU time and visited entities, by kind of event. Owns the clock of the thread and the sums; decides nothing.

use std::collections::BTreeMap;

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// Inputs that the driver takes in before it carries the core's actions out.
const TURN_INPUTS: u32 = 256;
const PAIRS: usize = 4097;

/// Row of a page of state.
pub const STATE: &str = "page of state";
/// Row of the event in which an engine with running samples was lost.
pub const LOSS: &str = "engine lost";
/// Row of the event in which a version became current.
pub const CURRENT: &str = "version made current";

/// CPU time that this thread has used.
pub fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Difference of two readings of the clock in a row: every measurement contains it once.
fn reading_ns() -> u64 {
    let pair = |_| {
        let from = cpu_ns();
        cpu_ns() - from
    };
    let mut pairs: Vec<u64> = (0..PAIRS).map(pair).collect();
    pairs.sort_unstable();
    pairs[PAIRS / 2]
}

/// A row: an event's kind, and whether a sealed version waited to become current.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Kind {
    pub event: &'static str,
    pub waiting: bool,
}

/// Cost of one call of the core.
#[derive(Clone, Copy, Debug)]
pub struct Sight {
    pub ns: u64,
    pub visited: u64,
    /// Samples and loads that the event itself moved.
    pub moved: u64,
}

#[derive(Clone, Debug, Default)]
pub struct Costs {
    /// One for each event.
    ns: Vec<u32>,
    pub total_ns: u64,
    pub visited: u64,
    pub moved: u64,
}

/// A row of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub kind: Kind,
    pub count: u64,
    pub total_ms: f64,
    pub mean_us: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
    /// A mean over the events.
    pub visited: f64,
    /// A mean over the events.
    pub moved: f64,
}

pub struct Meter {
    reading_ns: u64,
    kinds: BTreeMap<Kind, Costs>,
    /// Calls of `Ledger::apply`, one for each tick.
    pub ledger: Costs,
    /// Calls of `Ledger::sweep`; part of the driver's turn.
    pub sweep: Costs,
    turn_ns: u64,
    turn_inputs: u32,
    pub longest_turn_ns: u64,
}

// === impl Meter ===

impl Meter {
    pub fn new() -> Self {
        Self {
            reading_ns: reading_ns(),
            kinds: BTreeMap::new(),
            ledger: Costs::default(),
            sweep: Costs::default(),
            turn_ns: 0,
            turn_inputs: 0,
            longest_turn_ns: 0,
        }
    }

    /// Forgets what it has seen.
    pub fn reset(&mut self) {
        *self = Self { reading_ns: self.reading_ns, ..Self::new() };
    }

    /// CPU time since `from`, without that of reading the clock.
    pub fn since(&self, from: u64) -> u64 {
        (cpu_ns() - from).saturating_sub(self.reading_ns)
    }

    /// One input of the core.
    pub fn saw(&mut self, kind: Kind, sight: Sight) {
        self.kinds.entry(kind).or_default().add(sight);
        self.turn_ns += sight.ns;
        self.turn_inputs += 1;
        if self.turn_inputs == TURN_INPUTS {
            self.end_turn();
        }
    }

    /// The driver's look for silent samples, in its turn.
    pub fn swept(&mut self, ns: u64) {
        self.sweep.add(Sight { ns, visited: 0, moved: 0 });
        self.turn_ns += ns;
    }

    /// The inputs since the last end make one turn of the driver's loop.
    pub fn end_turn(&mut self) {
        self.longest_turn_ns = self.longest_turn_ns.max(self.turn_ns);
        (self.turn_ns, self.turn_inputs) = (0, 0);
    }

    pub fn core_ns(&self) -> u64 {
        self.kinds.values().map(|costs| costs.total_ns).sum()
    }

    /// All that it has measured.
    pub fn total_ns(&self) -> u64 {
        self.core_ns() + self.ledger.total_ns + self.sweep.total_ns
    }

    pub fn rows(&self) -> Vec<Row> {
        self.kinds.iter().map(|(kind, costs)| costs.row(*kind)).collect()
    }
}

// === impl Costs ===

impl Costs {
    pub fn add(&mut self, sight: Sight) {
        self.ns.push(u32::try_from(sight.ns).unwrap_or(u32::MAX));
        self.total_ns += sight.ns;
        self.visited += sight.visited;
        self.moved += sight.moved;
    }

    pub fn row(&self, kind: Kind) -> Row {
        let mut sorted = self.ns.clone();
        sorted.sort_unstable();
        let count = sorted.len();
        let us = |ns: u32| f64::from(ns) / 1e3;
        let at = |share: f64| {
            sorted.get((count.saturating_sub(1) as f64 * share) as usize).copied().map_or(0.0, us)
        };
        let mean = |sum: u64| sum as f64 / count.max(1) as f64;
        Row {
            kind,
            count: count as u64,
            total_ms: self.total_ns as f64 / 1e6,
            mean_us: mean(self.total_ns) / 1e3,
            p50_us: at(0.5),
            p99_us: at(0.99),
            max_us: at(1.0),
            visited: mean(self.visited),
            moved: mean(self.moved),
        }
    }
}

// === impl Row ===

impl Row {
    /// Entities that an event looked at beyond those that it moved.
    pub fn looked(&self) -> f64 {
        (self.visited - self.moved).max(0.0)
    }

    /// Visits for each entity that an event moved, and one for the event itself.
    pub fn per_moved(&self) -> f64 {
        self.visited / (1.0 + self.moved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_tells_mean_quantiles_and_the_most() {
        let mut costs = Costs::default();
        for us in 1..=100 {
            costs.add(Sight { ns: us * 1000, visited: 3, moved: 1 });
        }
        let row = costs.row(Kind { event: "beat", waiting: false });
        assert_eq!((row.count, row.mean_us, row.p50_us), (100, 50.5, 50.0));
        assert_eq!((row.p99_us, row.max_us, row.looked()), (99.0, 100.0, 2.0));
    }

    #[test]
    fn a_turn_ends_after_256_inputs() {
        let mut meter = Meter::new();
        let kind = Kind { event: "beat", waiting: false };
        for _ in 0..300 {
            meter.saw(kind, Sight { ns: 10, visited: 0, moved: 0 });
        }
        meter.end_turn();
        assert_eq!((meter.longest_turn_ns, meter.core_ns()), (2560, 3000));
    }
}
