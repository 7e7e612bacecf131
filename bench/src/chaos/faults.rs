//! The plan of faults: kind and place of the next one, seeded, every kind equally often. Decides; breaks nothing
//! itself.

use std::time::Duration;

use serde::Serialize;

use crate::rng::Rng;

/// Kind of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The engine gets SIGKILL.
    EngineKill,
    /// The engine gets SIGSTOP, and SIGCONT after a while.
    EngineStop,
    /// The engine ends all its streams without an error, before the answers are complete.
    CleanEnd,
    /// The engine sends the last tokens of some streams without the finish.
    LostFinish,
    /// The engine resets the connections of all its streams.
    Reset,
    /// The agent gets SIGKILL.
    AgentKill,
    /// The agent gets SIGKILL while it fetches a version.
    AgentKillMidFetch,
    /// The engine is drained.
    Drain,
    /// The connections between agent and manager are closed, new ones too.
    LinkCut,
    /// Nothing passes between agent and manager.
    LinkStall,
    /// The engine generates slower.
    SlowEngine,
}

/// All kinds.
pub const KINDS: [Kind; 11] = [
    Kind::EngineKill,
    Kind::EngineStop,
    Kind::CleanEnd,
    Kind::LostFinish,
    Kind::Reset,
    Kind::AgentKill,
    Kind::AgentKillMidFetch,
    Kind::Drain,
    Kind::LinkCut,
    Kind::LinkStall,
    Kind::SlowEngine,
];

/// One fault, and where it is injected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fault {
    /// Kind of the fault.
    pub kind: Kind,
    /// Index of the engine.
    pub at: usize,
    /// Time until the fault is undone; zero if it is over at once.
    pub lasts: Duration,
    /// Divisor of the rate for `SlowEngine`; number of streams for `LostFinish`.
    pub much: u64,
}

/// The series of faults that one seed makes.
pub struct Plan {
    rng: Rng,
    /// Kinds that this round has not used yet.
    bag: Vec<Kind>,
}

impl Kind {
    /// Name of the kind in reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::EngineKill => "engine_kill",
            Kind::EngineStop => "engine_stop",
            Kind::CleanEnd => "clean_end",
            Kind::LostFinish => "lost_finish",
            Kind::Reset => "reset",
            Kind::AgentKill => "agent_kill",
            Kind::AgentKillMidFetch => "agent_kill_mid_fetch",
            Kind::Drain => "drain",
            Kind::LinkCut => "link_cut",
            Kind::LinkStall => "link_stall",
            Kind::SlowEngine => "slow_engine",
        }
    }

    /// True if a process dies by SIGKILL.
    pub fn is_kill(self) -> bool {
        matches!(self, Kind::EngineKill | Kind::AgentKill | Kind::AgentKillMidFetch)
    }

    /// True if all streams of an engine end at any token, without a chance to hand over what was made: to them it is a
    /// kill.
    pub fn tears_streams(self) -> bool {
        self.is_kill() || matches!(self, Kind::CleanEnd | Kind::Reset)
    }
}

impl Plan {
    /// Makes the plan of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng::new(seed), bag: Vec::new() }
    }

    /// Chooses the next fault. `whole` are the engines without a fault, out of `all`; an engine with one is hit only if
    /// `whole` is empty.
    pub fn next(&mut self, whole: &[usize], all: usize) -> Fault {
        if self.bag.is_empty() {
            self.bag = KINDS.to_vec();
            self.rng.shuffle(&mut self.bag);
        }
        let kind = self.bag.pop().expect("it was just filled");
        let at = match whole {
            [] => self.rng.range(0, all as u64) as usize,
            whole => whole[self.rng.range(0, whole.len() as u64) as usize],
        };
        let lasts_ms = match kind {
            Kind::LinkCut | Kind::LinkStall => 3000,
            Kind::EngineStop => self.rng.range(500, 5000),
            Kind::SlowEngine => self.rng.range(1000, 4000),
            _ => 0,
        };
        let much = match kind {
            Kind::SlowEngine => self.rng.range(3, 20),
            _ => self.rng.range(1, 8),
        };
        Fault { kind, at, lasts: Duration::from_millis(lasts_ms), much }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn every_kind_comes_equally_often_and_whole_engines_are_preferred() {
        let mut plan = Plan::new(1);
        let mut counts = BTreeMap::new();
        for _ in 0..KINDS.len() * 5 {
            let fault = plan.next(&[2], 4);
            assert_eq!(fault.at, 2);
            *counts.entry(fault.kind).or_insert(0) += 1;
        }
        assert!(
            counts.len() == KINDS.len() && counts.values().all(|&count| count == 5),
            "{counts:?}"
        );
        assert!((0..50).all(|_| plan.next(&[], 4).at < 4));
    }

    #[test]
    fn the_same_seed_plans_the_same_faults() {
        let series = |seed| {
            let mut plan = Plan::new(seed);
            (0..40).map(|_| plan.next(&[0, 1, 2, 3], 4)).collect::<Vec<_>>()
        };
        assert_eq!(series(5), series(5));
        assert_ne!(series(5), series(6));
    }
}
