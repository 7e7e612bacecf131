//! What a seed chooses before the world starts.

use std::time::Duration;

use anabranch_manager::event::{OnExceed, OnRunning, Pack, Staleness};

use crate::rng::Rng;

#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    pub engines: usize,
    pub steps: u64,
    pub groups_per_step: u64,
    pub n: u32,
    pub mean_len: u32,
    pub max_tokens: u32,
    /// Tokens per second of one sample.
    pub rate: u64,
    pub colocated: bool,
    pub staleness: Staleness,
    pub on_running: OnRunning,
    pub rolling: Option<u32>,
    pub pack: Pack,
    pub shards: u32,
    /// Mean time between faults; zero: none.
    pub fault_every: Duration,
    pub faults_until: Duration,
    pub restarts: bool,
    pub pinned_groups: bool,
}

impl Scenario {
    pub fn of_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let whole_groups = rng.chance(50);
        let n = *rng.pick(&[1, 2, 4, 5]).unwrap_or(&1);
        let max_lag = *rng.pick(&[None, Some(0), Some(1), Some(2)]).unwrap_or(&None);
        let on_exceed = *rng
            .pick(&[OnExceed::Wait, OnExceed::Restart, OnExceed::Drop])
            .unwrap_or(&OnExceed::Wait);
        let max_wait = rng.chance(50).then(|| Duration::from_millis(rng.range(50, 900)));
        let multiple_of = if whole_groups { 1 } else { rng.range(1, 4) as u32 };
        Self {
            seed,
            engines: rng.range(1, 6) as usize,
            steps: rng.range(2, 6),
            groups_per_step: rng.range(2, 9),
            n,
            mean_len: rng.range(20, 400) as u32,
            max_tokens: rng.range(30, 600) as u32,
            rate: rng.range(50, 400),
            colocated: rng.chance(50),
            staleness: Staleness { max_lag, on_exceed },
            on_running: if rng.chance(60) { OnRunning::Continue } else { OnRunning::Abort },
            rolling: rng.chance(50).then(|| rng.range(1, 3) as u32),
            pack: Pack { min: rng.range(1, 9) as u32, multiple_of, whole_groups, max_wait },
            shards: if rng.chance(30) { 2 } else { 1 },
            fault_every: Duration::from_millis(rng.range(150, 2500)),
            faults_until: Duration::from_secs(rng.range(3, 20)),
            restarts: rng.chance(40),
            pinned_groups: rng.chance(30),
        }
    }

    /// The same world without faults.
    pub fn calm(mut self) -> Self {
        self.fault_every = Duration::ZERO;
        self.restarts = false;
        self
    }
}
