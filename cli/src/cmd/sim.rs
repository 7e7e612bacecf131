//! `anabranch sim`: the deciding cores through seeded schedules of failures, in virtual time.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anabranch_runtime::Exit;
use anabranch_sim::{Coverage, Digests, Failure as Broken, Outcome as Ended, Scenario};
use serde_json::json;

use crate::failure::{Failure, OrExit, Outcome};
use crate::progress::Progress;

/// Flags of `anabranch sim`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Number of seeds [default: 200]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// The first seed; alone, only this one is run and its outcome shown
    #[arg(long)]
    seed: Option<u64>,
    /// The same worlds without faults
    #[arg(long)]
    calm: bool,
    /// Threads [default: one per core]
    #[arg(long)]
    threads: Option<usize>,
    /// One JSON object, for scripts
    #[arg(long)]
    json: bool,
    /// Write a digest of everything the manager decided in each seed's world: one line `seed digest` each
    #[arg(long, value_name = "FILE")]
    digests: Option<PathBuf>,
    /// Compare with the digests in that file instead: says which seeds differ, and exits with 1 if any does
    #[arg(long, requires = "digests")]
    compare: bool,
    /// Count each event, action and state edge of the manager's core; those under 20 are marked
    #[arg(long)]
    coverage: bool,
}

/// Outcomes of the seeds in their order.
#[derive(Default)]
struct Worlds {
    ended: Vec<Result<Ended, Box<Broken>>>,
    coverage: Coverage,
}

/// Sums over all worlds that ended well.
#[derive(Debug, Default, serde::Serialize)]
struct Sums {
    worlds: u64,
    events: u64,
    delivered: u64,
    checked_tokens: u64,
    migrations: u64,
    regenerated_tokens: u64,
    abandoned: u64,
    versions: u64,
    faults: u64,
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    let only_one = args.seed.is_some() && args.seeds.is_none();
    let (first, count) =
        (args.seed.unwrap_or(1), if only_one { 1 } else { args.seeds.unwrap_or(200) });
    let base = match (&args.digests, args.compare) {
        (Some(file), true) => Some(read_digests(file)?),
        _ => None,
    };
    let (calm, as_json) = (args.calm, args.json);
    let threads = args.threads.unwrap_or_else(cores).max(1);
    let plan = Plan { first, count, calm, covered: args.coverage };
    let worlds = tokio::task::spawn_blocking(move || all(plan, threads, as_json));
    let Worlds { ended, coverage } = worlds.await.or_exit(Exit::Internal)?;
    let digests = digests_of(first, &ended);
    if let (Some(file), None) = (&args.digests, &base) {
        std::fs::write(file, digests.to_string())
            .map_err(|error| format!("{}: {error}", file.display()))
            .or_exit(Exit::CannotCreate)?;
    }
    let coverage = args.coverage.then_some(&coverage);
    let exit = report(&ended, coverage, as_json, only_one)?;
    match base {
        Some(base) => compared(&digests, &base),
        None => Ok(exit),
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[derive(Clone, Copy)]
struct Plan {
    first: u64,
    count: u64,
    calm: bool,
    covered: bool,
}

/// Runs the world of every seed of the plan.
fn all(plan: Plan, threads: usize, quiet: bool) -> Worlds {
    let next = AtomicU64::new(0);
    let progress = std::sync::Mutex::new((0, Progress::new("seeds", plan.count, quiet)));
    let work = || {
        let (mut ended, mut coverage) = (Vec::new(), Coverage::default());
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= plan.count {
                return (ended, coverage);
            }
            ended.push((at, world(plan, plan.first + at, &mut coverage)));
            let mut progress = progress.lock().expect("no code panics while it holds this lock");
            progress.0 += 1;
            let done = progress.0;
            progress.1.set(done, "");
        }
    };
    let mut worlds = Worlds::default();
    let mut ended = Vec::new();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let (some, coverage) = worker.join().expect("a world does not panic");
            ended.extend(some);
            worlds.coverage.add(&coverage);
        }
    });
    progress.lock().expect("no code panics while it holds this lock").1.finish();
    ended.sort_by_key(|(at, _)| *at);
    worlds.ended = ended.into_iter().map(|(_, ended)| ended).collect();
    worlds
}

fn world(plan: Plan, seed: u64, coverage: &mut Coverage) -> Result<Ended, Box<Broken>> {
    let scenario = Scenario::of_seed(seed);
    let scenario = if plan.calm { scenario.calm() } else { scenario };
    if !plan.covered {
        return anabranch_sim::run(scenario);
    }
    let (ended, seen) = anabranch_sim::run_covered(scenario);
    coverage.add(&seen);
    ended
}

fn report(
    ended: &[Result<Ended, Box<Broken>>],
    coverage: Option<&Coverage>,
    as_json: bool,
    only_one: bool,
) -> Outcome {
    let mut sums = Sums::default();
    ended.iter().flatten().for_each(|outcome| sums.add(outcome));
    let broken: Vec<&Broken> =
        ended.iter().filter_map(|e| e.as_ref().err().map(|b| &**b)).collect();
    if as_json {
        let failures: Vec<_> = broken
            .iter()
            .map(|b| json!({"seed": b.seed, "at_ms": b.at_ms, "what": b.what, "story": b.story}))
            .collect();
        let coverage = coverage.map(Coverage::rows);
        println!(
            "{}",
            json!({"passed": broken.is_empty(), "sums": sums, "failures": failures, "coverage": coverage})
        );
    } else {
        for one in ended.iter().flatten().filter(|_| only_one) {
            println!("{}", serde_json::to_string_pretty(one).expect("an outcome is plain data"));
        }
        coverage.iter().for_each(|table| print!("{table}"));
        println!(
            "{} worlds held: {} samples delivered, {} tokens checked, {} migrations, {} faults, {} versions",
            sums.worlds,
            sums.delivered,
            sums.checked_tokens,
            sums.migrations,
            sums.faults,
            sums.versions
        );
    }
    match broken.first() {
        None => Ok(Exit::Ok),
        Some(first) => Err(tell(first, broken.len())),
    }
}

/// Digests by seed; `first` is the seed of the first world.
fn digests_of(first: u64, ended: &[Result<Ended, Box<Broken>>]) -> Digests {
    let mut digests = Digests::default();
    for (seed, ended) in (first..).zip(ended) {
        digests.insert(seed, ended.as_ref().ok().map(|ended| ended.digest.as_str()));
    }
    digests
}

fn read_digests(file: &Path) -> Result<Digests, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("{}: {error}", file.display()))
        .or_exit(Exit::Io)?;
    text.parse().map_err(|bad| format!("{}: {bad}", file.display())).or_exit(Exit::Data)
}

fn compared(digests: &Digests, base: &Digests) -> Outcome {
    let differing = digests.differing(base);
    if differing.is_empty() {
        eprintln!("all {} digests are equal", digests.len());
        return Ok(Exit::Ok);
    }
    let (count, of) = (differing.len(), digests.len());
    let seeds: Vec<String> = differing.iter().map(u64::to_string).collect();
    let text = format!("{count} of {of} digests differ, those of seeds {}", seeds.join(" "));
    Err(Failure::new(Exit::Failed, text))
}

fn tell(broken: &Broken, count: usize) -> Failure {
    let Broken { seed, at_ms, what, story } = broken;
    let story = story.join("\n  ");
    let text = format!(
        "{count} worlds broke a promise; the first is seed {seed} at {at_ms} ms: {what}\n  {story}\n\
         see it again with: anabranch sim --seed {seed}"
    );
    Failure::new(Exit::Failed, text)
}

// === impl Sums ===

impl Sums {
    fn add(&mut self, outcome: &Ended) {
        self.worlds += 1;
        self.events += outcome.events;
        self.delivered += outcome.delivered;
        self.checked_tokens += outcome.checked_tokens;
        self.migrations += outcome.migrations;
        self.regenerated_tokens += outcome.regenerated_tokens;
        self.abandoned += outcome.abandoned;
        self.versions += outcome.versions;
        self.faults += outcome.faults.values().sum::<u64>();
    }
}
