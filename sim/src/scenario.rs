//! Choices that a seed makes before the world starts.

use std::time::Duration;

use anabranch_manager::event::{OnExceed, OnRunning, Pack, Staleness};

use crate::rng::Rng;

/// Settings of one world, all drawn from its seed.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The seed, also of everything that is drawn later.
    pub seed: u64,
    /// Number of engines.
    pub engines: usize,
    /// Steps of the job.
    pub steps: u64,
    /// Groups of a step.
    pub groups_per_step: u64,
    /// Samples of a group.
    pub n: u32,
    /// Mean length of an answer, in tokens.
    pub mean_len: u32,
    /// Longest answer, in tokens.
    pub max_tokens: u32,
    /// Tokens per second of one sample.
    pub rate: u64,
    /// True if one engine is on the trainer's GPU.
    pub colocated: bool,
    /// The job's bound on the lag of delivered tokens.
    pub staleness: Staleness,
    /// Treatment of running samples when a load begins.
    pub on_running: OnRunning,
    /// Engines that load at a time; all at once if `None`.
    pub rolling: Option<u32>,
    /// Rules by which the manager packs batches.
    pub pack: Pack,
    /// Consumers of the trainer.
    pub shards: u32,
    /// Mean time between faults; zero for none.
    pub fault_every: Duration,
    /// Time after which no more faults come.
    pub faults_until: Duration,
    /// True if the trainer may restart.
    pub restarts: bool,
    /// True if some groups are pinned to a weight version.
    pub pinned_groups: bool,
    /// Choices about the trainer.
    pub trainer: TrainerSide,
    /// Choices about the engines.
    pub fleet: FleetSide,
}

/// Choices of a seed about the trainer, beside the job itself.
#[derive(Clone, Debug)]
pub struct TrainerSide {
    /// Time from the begin of the world until the trainer opens the job.
    pub opens_after: Duration,
    /// Value of `OpenJob::on_trainer_lost`.
    pub on_lost: Duration,
    /// Most shards of a restarted trainer; their number is drawn.
    pub max_shards: u32,
    /// Time between two shards that attach, counted from the opening of the job.
    pub stagger: Duration,
    /// Percent of groups with penalties or stop strings, that restart from their prompt.
    pub replayed: u64,
    /// Percent of groups that have a deadline.
    pub deadlines: u64,
    /// True if groups get one of three priorities.
    pub priorities: bool,
    /// Way by which engines get a version.
    pub publishes: Publishes,
    /// Processes that publish each version together.
    pub senders: u32,
    /// True if each sender has a part of the tensors only.
    pub parts: bool,
    /// True if the trainer submits the next step first and publishes meanwhile, so that versions come while samples
    /// run.
    pub overlaps: bool,
    /// True if the trainer closes the job at its end.
    pub closes: bool,
    /// True if the manager admits little more than one step.
    pub tight_admission: bool,
    /// Time that training takes, if the trainer has taken back GPUs of its own.
    pub trains: Duration,
}

/// Way by which engines get a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publishes {
    /// The trainer listens; receivers dial it.
    Listens,
    /// The trainer cannot be dialled: it dials receivers.
    Dials,
    /// The trainer writes into a directory that every engine reads.
    Directory,
}

/// Choices of a seed about the engines.
#[derive(Clone, Debug)]
pub struct FleetSide {
    /// Agents without an engine, which only pass versions on.
    pub relays: usize,
    /// True if two engines share a host.
    pub shares_hosts: bool,
    /// Value of `CoreConfig::load_deadline_ms`.
    pub load_deadline: Duration,
    /// True if engines keep what they loaded for their peers.
    pub holds: bool,
    /// True if the engine on the trainer's GPU gets its weights from the manager.
    pub colocated_loads: bool,
    /// Value of `CoreConfig::quarantine_deaths`.
    pub quarantine_deaths: u32,
}

impl Scenario {
    /// Draws the settings of the world `seed`.
    pub fn of_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let whole_groups = rng.chance(50);
        let n = *rng.pick(&[1, 2, 4, 5]).unwrap_or(&1);
        let max_lag = *rng.pick(&[None, Some(0), Some(1), Some(2)]).unwrap_or(&None);
        let on_exceed = *rng
            .pick(&[OnExceed::Wait, OnExceed::Restart, OnExceed::Drop])
            .unwrap_or(&OnExceed::Wait);
        let max_wait = rng.chance(50).then(|| Duration::from_millis(rng.range(50, 900)));
        let multiple_of = rng.range(1, 4) as u32;
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
            on_running: *rng
                .pick(&[OnRunning::Continue, OnRunning::Abort, OnRunning::Finish])
                .unwrap_or(&OnRunning::Continue),
            rolling: rng.chance(50).then(|| rng.range(1, 3) as u32),
            pack: Pack { min: rng.range(1, 9) as u32, multiple_of, whole_groups, max_wait },
            shards: if rng.chance(30) { 2 } else { 1 },
            fault_every: Duration::from_millis(rng.range(150, 2500)),
            faults_until: Duration::from_secs(rng.range(3, 20)),
            restarts: rng.chance(40),
            pinned_groups: rng.chance(30),
            trainer: TrainerSide::of(&mut rng),
            fleet: FleetSide::of(&mut rng),
        }
        .held_back()
    }

    /// Takes out what a known defect of the manager breaks; `docs/design/0004-house.md` lists these defects.
    fn held_back(mut self) -> Self {
        // A relay is ordered to load the version that a group is pinned to, again and again, and no engine is.
        if self.pinned_groups {
            self.fleet.relays = 0;
        }
        self
    }

    /// The same world without faults.
    pub fn calm(mut self) -> Self {
        self.fault_every = Duration::ZERO;
        self.restarts = false;
        self
    }
}

impl TrainerSide {
    fn of(rng: &mut Rng) -> Self {
        let ms = Duration::from_millis;
        Self {
            opens_after: if rng.chance(20) { ms(rng.range(50, 6_000)) } else { Duration::ZERO },
            on_lost: ms(if rng.chance(30) { rng.range(300, 2_000) } else { 60_000 }),
            max_shards: 3,
            stagger: if rng.chance(30) { ms(rng.range(1, 3_000)) } else { Duration::ZERO },
            replayed: if rng.chance(40) { rng.range(10, 101) } else { 0 },
            deadlines: if rng.chance(20) { rng.range(5, 60) } else { 0 },
            priorities: rng.chance(50),
            publishes: *rng
                .pick(&[Publishes::Listens, Publishes::Dials, Publishes::Directory])
                .unwrap_or(&Publishes::Listens),
            senders: if rng.chance(30) { rng.range(2, 4) as u32 } else { 1 },
            parts: rng.chance(50),
            overlaps: rng.chance(60),
            closes: rng.chance(50),
            tight_admission: rng.chance(20),
            trains: if rng.chance(50) { ms(rng.range(0, 8_000)) } else { Duration::ZERO },
        }
    }
}

impl FleetSide {
    fn of(rng: &mut Rng) -> Self {
        let slow = Duration::from_secs(600);
        Self {
            relays: usize::from(rng.chance(25)),
            shares_hosts: rng.chance(30),
            load_deadline: if rng.chance(30) { Duration::from_secs(3) } else { slow },
            holds: rng.chance(50),
            colocated_loads: rng.chance(40),
            quarantine_deaths: *rng.pick(&[1, 2, 3, 5]).unwrap_or(&5),
        }
    }
}
