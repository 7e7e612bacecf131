//! The core bench: what the manager's deciding core and its token ledger cost, in CPU time, for fleets of different size.
//! The real core and ledger without sockets, in virtual time; the fleet and the trainer are cheap models whose own time is
//! not counted. Owns the list of runs; a run's course is `course`, its figures are `judge`.
//!
//! In reading order:

use std::path::PathBuf;

// what one run is
mod course;
mod world;
// the models
mod fleet;
mod trainer;
// the manager's types
mod actions;
mod events;
// what is measured and shown
mod judge;
mod meter;

use course::{Length, Measured};
use judge::Runs;
use world::Scale;

/// A window this long sees one version and three mode switches in full.
const FULL_PACE_SECONDS: f64 = 30.0;

#[derive(Clone, Debug, clap::Args)]
pub struct CoreArgs {
    /// Sizes of the fleet, from small to large
    #[arg(long, value_delimiter = ',', default_value = "100,1000", value_name = "N,...")]
    pub engines: Vec<usize>,
    /// File for the report, as JSON
    #[arg(long)]
    pub report: Option<PathBuf>,
    /// Virtual seconds that are measured; waits shrink with windows under 30 s
    #[arg(long, default_value_t = 30.0)]
    pub seconds: f64,
    /// Virtual seconds before them
    #[arg(long, default_value_t = 5.0)]
    pub warm: f64,
    /// Measured virtual seconds of the pair with once and twice the token rate; 0: without it
    #[arg(long, default_value_t = 10.0)]
    pub rate_seconds: f64,
    /// Samples that each engine runs
    #[arg(long, default_value_t = 256)]
    pub running: u32,
    /// Places of the queue, each a group whose first sample waits
    #[arg(long, default_value_t = 20_000)]
    pub queued: u64,
    /// Tokens of a chunk
    #[arg(long, default_value_t = 8)]
    pub chunk: u32,
    /// CPU seconds of core and ledger after which a warm-up or a window ends early
    #[arg(long)]
    pub cpu_limit: Option<f64>,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Exits with 1 where a gate is missed
    #[arg(long)]
    pub gate: bool,
}

/// Runs, prints the tables, writes the report; false where a gate was missed and `--gate` was given.
#[allow(clippy::print_stdout)]
pub fn run(args: &CoreArgs) -> anyhow::Result<bool> {
    let runs = measure(args)?;
    let report = judge::report(&runs);
    print!("{}\n{}", judge::table(&runs), report.table());
    if let Some(file) = &args.report {
        report.write(file)?;
        println!("report: {}", file.display());
    }
    Ok(report.pass || !args.gate)
}

fn measure(args: &CoreArgs) -> anyhow::Result<Runs> {
    anyhow::ensure!(args.engines.is_sorted(), "--engines must go from small to large");
    anyhow::ensure!(
        args.running >= 4 && args.chunk > 0,
        "--running of 4 and --chunk of 1 at least"
    );
    let fleet = |engines: &usize| one(args, *engines, args.chunk, args.seconds);
    let fleets = args.engines.iter().map(fleet).collect::<anyhow::Result<Vec<Measured>>>()?;
    let rates = match args.engines.last() {
        Some(&engines) if args.rate_seconds > 0.0 => Some([
            one(args, engines, args.chunk, args.rate_seconds)?,
            one(args, engines, 2 * args.chunk, args.rate_seconds)?,
        ]),
        _ => None,
    };
    Ok(Runs { fleets, rates })
}

fn one(args: &CoreArgs, engines: usize, chunk: u32, seconds: f64) -> anyhow::Result<Measured> {
    let ms = |seconds: f64| (seconds * 1e3) as u64;
    let pace = (seconds / FULL_PACE_SECONDS).min(1.0);
    let (seats, queued, seed) = (args.running, args.queued, args.seed);
    let scale = Scale { engines, seats, chunk, queued, pace, seed };
    let cpu_limit_ns = args.cpu_limit.map_or(u64::MAX, |seconds| (seconds * 1e9) as u64);
    course::run(scale, Length { warm_ms: ms(args.warm), measured_ms: ms(seconds), cpu_limit_ns })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> CoreArgs {
        CoreArgs {
            engines: vec![5, 10],
            report: None,
            seconds: 1.0,
            warm: 0.2,
            rate_seconds: 0.2,
            running: 32,
            queued: 500,
            chunk: 8,
            cpu_limit: None,
            seed: 1,
            gate: false,
        }
    }

    #[test]
    fn a_small_fleet_gives_a_report_with_every_kind_of_event() {
        let runs = measure(&small()).expect("the core takes what the bench gives it");
        let large = &runs.fleets[1];
        assert!(large.running_samples >= 256, "{} of 320 run", large.running_samples);
        assert!(large.queued_groups >= 400, "{}", large.queued_groups);
        assert_eq!(large.virtual_seconds, 1.0);
        for kind in [
            "engine beat",
            "facts, some finished",
            "facts, some ended",
            "engine lost",
            "version made current",
            "mode requested",
            "mode reported",
            "batch committed",
            "page of state",
        ] {
            assert!(large.rows.iter().any(|row| row.kind.event == kind), "no {kind}");
        }
        let report = judge::report(&runs);
        for id in ["core_share.5", "core_share.10", "double_rate", "max_loss", "memory"] {
            assert!(report.figures.iter().any(|figure| figure.id == id), "no {id}");
        }
        assert!(judge::table(&runs).contains("engine beat"));
    }

    #[test]
    fn a_seed_gives_the_same_events_and_visits_again() {
        let counts = |run: &Measured| -> Vec<_> {
            run.rows.iter().map(|row| (row.kind, row.count, row.visited, row.moved)).collect()
        };
        let args = CoreArgs { rate_seconds: 0.0, ..small() };
        let [once, again] = [(); 2].map(|()| measure(&args).expect("it runs").fleets);
        for (once, again) in once.iter().zip(&again) {
            assert_eq!(counts(once), counts(again));
        }
    }
}
