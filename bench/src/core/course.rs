//! The course of one run: engines attach, load a first version and are filled with samples of all ages; then a warm-up
//! and the measured window. Owns when things happen; what they do is the world's.

use anyhow::{Context, bail};
use serde::Serialize;

use super::events;
use super::meter::{self, Kind, Row};
use super::trainer::N;
use super::world::{Due, Scale, World};
use crate::{procfs, progress};

/// The fleet must be full by then, in virtual milliseconds.
const FILL_MS: u64 = 60_000;
/// Two chunks of every sample: leaders that had ended before the run began are gone, their siblings run.
const SETTLE_MS: u64 = 160;
/// Half a minute of the window: a version, three mode switches.
const PERIOD_MS: u64 = 30_000;
const REPORT_EVERY_MS: u64 = 1000;

/// How long a run is.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    pub warm_ms: u64,
    pub measured_ms: u64,
    /// The warm-up and the window each end early after so much CPU time of core and ledger.
    pub cpu_limit_ns: u64,
}

/// Result of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    pub engines: usize,
    /// Tokens of a chunk.
    pub chunk: u32,
    /// The measured window; shorter than asked for where the CPU limit ended it.
    pub virtual_seconds: f64,
    pub asked_seconds: f64,
    /// CPU seconds a second: handling events, and a page of state each second.
    pub core_share: f64,
    /// The pages' part of it.
    pub state_share: f64,
    pub ledger_share: f64,
    pub longest_turn_us: f64,
    pub rows: Vec<Row>,
    /// One row: a call of the ledger for each tick.
    pub ledger: Row,
    /// One row: a look of the ledger for silent samples.
    pub sweep: Row,
    pub running_samples: usize,
    pub queued_groups: u64,
    pub tokens_made: u64,
    /// The highest resident memory once all samples run and the queue is full, before tokens come in numbers.
    pub filled_bytes: u64,
    /// The highest resident memory of the run.
    pub peak_bytes: u64,
    /// Tokens and log-probabilities in the ledger at the end.
    pub column_bytes: u64,
}

pub fn run(scale: Scale, length: Length) -> anyhow::Result<Measured> {
    forget_peak();
    let mut world = World::new(scale);
    fill(&mut world)?;
    let filled_bytes = peak_bytes();
    world.submits = true;
    pass(&mut world, length.warm_ms, length.cpu_limit_ns, "warming up")?;
    world.meter.reset();
    schedule(&mut world);
    let made = world.ledger.stats().tokens;
    let passed = pass(&mut world, length.measured_ms, length.cpu_limit_ns, "measuring")?;
    let virtual_seconds = passed as f64 / 1e3;
    let share = |ns: u64| ns as f64 / 1e9 / virtual_seconds.max(1e-3);
    let rows = world.meter.rows();
    let pages = rows.iter().filter(|row| row.kind.event == meter::STATE);
    let state_ns = pages.map(|row| row.total_ms * 1e6).sum::<f64>() as u64;
    let tokens = world.ledger.stats().tokens;
    Ok(Measured {
        engines: scale.engines,
        chunk: scale.chunk,
        virtual_seconds,
        asked_seconds: length.measured_ms as f64 / 1e3,
        core_share: share(world.meter.core_ns()),
        state_share: share(state_ns),
        ledger_share: share(world.meter.ledger.total_ns + world.meter.sweep.total_ns),
        longest_turn_us: world.meter.longest_turn_ns as f64 / 1e3,
        rows,
        sweep: world.meter.sweep.row(Kind { event: "sweep", waiting: false }),
        ledger: world.meter.ledger.row(Kind { event: "tick", waiting: false }),
        running_samples: world.running(),
        queued_groups: world.trainer.queued(),
        tokens_made: tokens - made,
        filled_bytes,
        peak_bytes: peak_bytes(),
        column_bytes: (tokens - world.forgotten_tokens) * 8,
    })
}

/// Engines at version 1, every seat taken, the queue full.
fn fill(world: &mut World) -> anyhow::Result<()> {
    world.input(events::job_opened(world.scale.seed));
    let session = world.trainer.session;
    world.input(events::consumer_attached(session));
    world.input(events::Event::CreditGranted {
        consumer: events::CONSUMER,
        bytes: events::CREDIT_BYTES,
        samples: events::CREDIT_SAMPLES,
    });
    for engine in 0..world.scale.engines {
        world.attach(engine);
    }
    world.after(1, Due::Announce);
    world.after(1, Due::TrainerHeard);
    world.after(1, Due::Commit);
    let version = events::version(1);
    until(world, "every engine has the first version", |world| {
        world.agents.iter().all(|agent| agent.loaded == version && agent.load.is_none())
    })?;
    let seats = world.scale.seats as usize * world.scale.engines;
    let first = world.lives.first_groups(N, seats as u64);
    while world.trainer.submitted() < first {
        let left = first - world.trainer.submitted();
        let request = world.trainer.submit(left.min(256));
        world.input(request);
    }
    until(world, "every seat is taken", |world| world.running() * 100 >= seats * 99)?;
    let settled = world.ms() + SETTLE_MS;
    until(world, "leaders of old groups have ended", |world| world.ms() >= settled)?;
    world.end_first_wave();
    while let Some(request) = world.trainer.top_up(world.scale.queued) {
        world.input(request);
    }
    Ok(())
}

fn until(world: &mut World, what: &str, done: impl Fn(&World) -> bool) -> anyhow::Result<()> {
    let end = world.ms() + FILL_MS;
    while !done(world) {
        world.slice();
        if let Some(trouble) = &world.trouble {
            bail!("{trouble}");
        }
        if world.ms() > end {
            bail!("not within {FILL_MS} virtual ms: {what}; {} samples run", world.running());
        }
    }
    Ok(())
}

/// Virtual time goes by; how much of it did.
fn pass(world: &mut World, ms: u64, cpu_limit_ns: u64, what: &str) -> anyhow::Result<u64> {
    let from = world.ms();
    let before = world.meter.total_ns();
    let mut used = 0;
    while world.ms() < from + ms && used < cpu_limit_ns {
        world.slice();
        let passed = world.ms() - from;
        if passed.is_multiple_of(10) || used > 0 {
            used = world.meter.total_ns() - before;
        }
        if passed.is_multiple_of(REPORT_EVERY_MS) {
            let (engines, cpu) = (world.scale.engines, used as f64 / 1e9);
            progress::line(&format!(
                "{engines} engines, {what}: {passed} of {ms} ms, {cpu:.1} s CPU"
            ));
        }
        if let Some(trouble) = world.trouble.take() {
            return Err(anyhow::anyhow!(trouble))
                .with_context(|| format!("{what}, at {passed} ms"));
        }
    }
    Ok(world.ms() - from)
}

/// Times of the events besides the steady load, from here on.
fn schedule(world: &mut World) {
    let at = |ms: u64| (ms as f64 * world.scale.pace) as u64;
    let mut dues = vec![(at(2500), Due::Lose { round: 0 }), (at(900), Due::Page)];
    for period in 0..20 {
        let start = period * PERIOD_MS;
        dues.push((at(start + 1000), Due::Announce));
        for switch in [4000, 12_000, 22_000] {
            dues.push((at(start + switch), Due::Switch { train: true }));
            dues.push((at(start + switch + 1800), Due::Switch { train: false }));
        }
    }
    for (ms, due) in dues {
        world.after(ms, due);
    }
}

fn peak_bytes() -> u64 {
    procfs::peak_rss_bytes(std::process::id()).unwrap_or(0)
}

/// The kernel counts the peak anew from here; where it does not, the peak is that of the process.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
