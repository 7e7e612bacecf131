//! The chaos run: real processes, one random fault a second, a version every few seconds; then everything is left to
//! finish and a process of its own verifies every token. Owns the run's course and its report; which fault comes
//! is `faults`'s, how it is done is `breaker`'s.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anabranch_engine::synthetic::SyntheticParams;
use anabranch_runtime::Drain;
use anabranch_trainer::Pack;
use tokio::time::{MissedTickBehavior, interval};

use crate::cluster::{self, Cluster, Links};
use crate::load::{Load, Spec};
use crate::publishing::Publishing;
use crate::records::{Asked, Files, Job};
use crate::report::{Bound, Report};
use crate::rng::Rng;
use crate::verify::{self, Verdict};
use crate::workdir;

mod breaker;
pub mod faults;

use breaker::Breaker;

/// Time between two looks at the cluster.
const LOOK: Duration = Duration::from_millis(50);
/// Time that a process stays down before it is started again.
const REST: Duration = Duration::from_millis(700);
/// Time before the first fault, in which engines attach and take their first samples.
const SETTLE: Duration = Duration::from_secs(2);
/// Time that the samples have to come back after the last fault.
const FINISH: Duration = Duration::from_secs(60);
/// Samples of a group.
const GROUP: u32 = 4;
/// Time between two sends of an agent, as the manager's default has it.
const TICK: Duration = Duration::from_millis(20);

/// Flags of `anabranch bench chaos`.
#[derive(Clone, Debug, clap::Args)]
pub struct ChaosArgs {
    /// How long faults are injected
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
    /// File for the report, as JSON
    #[arg(long)]
    pub report: Option<PathBuf>,
    /// Seed of the faults and the prompts
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Engines, each with its agent
    #[arg(long, default_value_t = 4)]
    pub engines: u32,
    /// Samples that each engine runs at once
    #[arg(long, default_value_t = 128)]
    pub running: u32,
    /// Tokens per second of each running sample
    #[arg(long, default_value_t = 150.0)]
    pub rate: f64,
    /// Tokens per chunk of an engine's stream
    #[arg(long, default_value_t = 8)]
    pub chunk: u32,
    /// A fault every so many milliseconds
    #[arg(long, default_value_t = 1000)]
    pub fault_ms: u64,
    /// A version every so many milliseconds
    #[arg(long, default_value_t = 3000)]
    pub publish_ms: u64,
    /// Size of a version
    #[arg(long, default_value_t = 16)]
    pub weights_mib: u64,
    /// Keep logs, prompts and trajectories here; without it they are removed after a run that passed
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Log filter of all processes
    #[arg(long, default_value = "info")]
    pub process_log: String,
}

/// Lowest figures that pass, in proportion to a run shorter than the gate's 60 seconds.
struct Gates {
    tokens: f64,
    versions: f64,
    migrations: f64,
}

struct Outcome {
    verdict: Verdict,
    faults: BTreeMap<&'static str, u64>,
    kills: u64,
    torn: u64,
    killed_fetching: u64,
    made: u64,
    published: u64,
    finished_in_time: bool,
    wall: Duration,
    surprises: Vec<String>,
    cpu: [(&'static str, Duration); 3],
}

/// Runs, prints the table, writes the report; true if every gate held.
pub async fn run(args: ChaosArgs) -> anyhow::Result<bool> {
    let dir = workdir::WorkDir::new(args.dir.clone(), "chaos")?;
    let outcome = execute(&args, dir.path()).await?;
    let mut report = judge(&args, &outcome);
    report.note(format!("work directory: {}", dir.path().display()));
    workdir::finish(&report, args.report.as_deref(), dir)?;
    Ok(report.pass)
}

async fn execute(args: &ChaosArgs, dir: &std::path::Path) -> anyhow::Result<Outcome> {
    let drain = Drain::new();
    let started = Instant::now();
    let files = Files::in_dir(dir);
    let mut cluster = Cluster::start(cluster_config(args, dir)).await?;
    let load = Load::start(cluster.url(), &files, load_spec(args, &cluster), &drain).await?;
    let mut publishing =
        Publishing::start(load.job.clone(), &files.weights, args.seed, args.weights_mib << 20)?;
    let mut breaker = Breaker::new(args.seed);

    storm(args, &mut cluster, &load, &mut publishing, &mut breaker).await?;
    breaker.mend_all(&mut cluster).await?;
    load.stop_asking();
    let finished_in_time = finish(&mut cluster, &load).await?;
    let published = publishing.count();

    let wall = started.elapsed();
    let (manager, agents, engines) = cluster.usage();
    let made = cluster.made()?;
    cluster.stop().await?;
    drain.token().cancel();
    let verdict = verify::in_a_process(&files, &[]).await?;
    Ok(Outcome {
        verdict,
        faults: breaker.counts(),
        kills: breaker.kills(),
        torn: breaker.torn(),
        killed_fetching: breaker.killed_fetching(),
        made,
        published,
        finished_in_time,
        wall,
        surprises: cluster.manager.surprises().to_vec(),
        cpu: [("manager", manager.cpu), ("agents", agents.cpu), ("engines", engines.cpu)],
    })
}

/// Injects faults, publishes versions and restarts processes until the time is up.
async fn storm(
    args: &ChaosArgs,
    cluster: &mut Cluster,
    load: &Load,
    publishing: &mut Publishing,
    breaker: &mut Breaker,
) -> anyhow::Result<()> {
    let ticker = |ms: u64| {
        let mut ticker = interval(Duration::from_millis(ms.max(1)));
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticker
    };
    let (mut look, mut second) = (ticker(LOOK.as_millis() as u64), ticker(1000));
    let (mut fault, mut version) = (ticker(args.fault_ms), ticker(args.publish_ms));
    let started = Instant::now();
    let end = SETTLE + Duration::from_secs(args.seconds);
    while started.elapsed() < end {
        tokio::select! {
            _ = look.tick() => {
                load.check()?;
                cluster.tend(REST).await?;
                breaker.mend_due(cluster).await?;
            }
            _ = fault.tick(), if started.elapsed() >= SETTLE => breaker.strike(cluster).await?,
            _ = version.tick(), if started.elapsed() >= SETTLE / 2 => {
                publishing.next().await?;
                breaker.kill_in_fetch(cluster, publishing).await?;
            }
            _ = second.tick() => progress_line(started.elapsed(), cluster, load, breaker, publishing.count()),
        }
    }
    Ok(())
}

async fn finish(cluster: &mut Cluster, load: &Load) -> anyhow::Result<bool> {
    let deadline = Instant::now() + FINISH;
    loop {
        cluster.tend(REST).await?;
        if load.all_back(Instant::now() + LOOK).await? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
    }
}

fn progress_line(at: Duration, cluster: &Cluster, load: &Load, breaker: &Breaker, versions: u64) {
    let counts = load.counts();
    let up = cluster.nodes.iter().filter(|node| node.engine.is_up() && node.agent.is_up()).count();
    let line = format!(
        "{:3}s  {:>9} tokens  {:>6}/{} samples back  {up}/{} engines up  v{versions}  {} faults, last {}",
        at.as_secs(),
        counts.back_tokens,
        counts.back_samples,
        counts.asked_samples,
        cluster.nodes.len(),
        breaker.total(),
        breaker.last(),
    );
    crate::progress::line(&line);
}

fn cluster_config(args: &ChaosArgs, dir: &std::path::Path) -> cluster::Config {
    cluster::Config {
        dir: dir.to_owned(),
        engines: args.engines,
        model: SyntheticParams { mean_len: Some(1200), ..SyntheticParams::default() },
        rate: args.rate,
        chunk: args.chunk,
        max_running: args.running,
        context: 8192,
        links: Links::Proxied,
        log: args.process_log.clone(),
    }
}

fn load_spec(args: &ChaosArgs, cluster: &Cluster) -> Spec {
    let config = cluster.config();
    let mut rng = Rng::new(args.seed ^ 0x5eed);
    let vocab = config.model.vocab;
    let make = move |index| {
        let (prompt_len, max_tokens) = (rng.range(16, 256), rng.range(200, 2000) as u32);
        let prompt = rng.prompt(prompt_len, vocab);
        Asked {
            key: format!("g{index}"),
            n: GROUP,
            prompt,
            max_tokens,
            min_tokens: 0,
            ignore_eos: false,
        }
    };
    // A little more than all engines together can run: some always wait.
    let capacity = (args.engines * args.running) as usize;
    Spec {
        job: Job { seed: args.seed, model: config.model, engines: config.engine_ids() },
        in_flight: capacity + capacity / 8,
        pack: Pack { min: 8, max_wait: Some(Duration::from_millis(100)), ..Pack::default() },
        make: Box::new(make),
    }
}

fn judge(args: &ChaosArgs, outcome: &Outcome) -> Report {
    let share = args.seconds as f64 / 60.0;
    let full = args.seconds >= 60;
    let gates = Gates {
        tokens: if full { 2e6 } else { (2e6 * share / 4.0).floor() },
        versions: if full { 10.0 } else { 1.0 },
        migrations: if full { 40.0 } else { 1.0 },
    };
    let verdict = &outcome.verdict;
    let mut report = Report::new("chaos");
    report.gate("lost", verdict.lost as f64, "samples", Bound::AtMost, 0.0);
    report.gate("duplicated", verdict.duplicated as f64, "samples", Bound::AtMost, 0.0);
    report
        .gate("provenance_errors", verdict.provenance_errors as f64, "samples", Bound::AtMost, 0.0)
        .detail(verdict.examples.first().cloned().unwrap_or_default());
    discarded_figures(args, outcome, &mut report);
    report.gate(
        "regenerated_tokens",
        verdict.regenerated_tokens as f64,
        "tokens",
        Bound::AtMost,
        0.0,
    );
    report.gate(
        "verified_tokens",
        verdict.verified_tokens as f64,
        "tokens",
        Bound::AtLeast,
        gates.tokens,
    );
    let versions = verdict.tokens_by_version.keys().filter(|&&number| number > 0).count();
    report.gate("versions", versions as f64, "versions", Bound::AtLeast, gates.versions).detail(
        format!("{} published; counted are those that made verified tokens", outcome.published),
    );
    report
        .gate("migrations", verdict.migrations as f64, "moves", Bound::AtLeast, gates.migrations)
        .detail("seams between engine lives inside verified trajectories");
    let late = f64::from(u8::from(!outcome.finished_in_time));
    report
        .gate("unfinished_at_deadline", late, "", Bound::AtMost, 0.0)
        .detail("60 s after the last fault");
    report.figure("samples", verdict.samples_verified as f64, "samples");
    let faults: u64 = outcome.faults.values().sum();
    report.figure("faults", faults as f64, "faults").detail(format!("{:?}", outcome.faults));
    report
        .figure("agents_killed_mid_fetch", outcome.killed_fetching as f64, "kills")
        .detail("the manager saw them fetch at that moment");
    report.figure("engine_lives", verdict.engine_lives as f64, "lives");
    report.figure("wall", outcome.wall.as_secs_f64(), "s");
    for (who, cpu) in outcome.cpu {
        report.figure(&format!("{who}_cpu"), cpu.as_secs_f64(), "CPU-s");
    }
    if !outcome.surprises.is_empty() {
        report.note(format!("processes that ended by themselves: {:?}", outcome.surprises));
    }
    if !full {
        report.note("shorter than 60 s: the gates on amounts are scaled down");
    }
    report.detail =
        serde_json::json!({ "verdict": verdict, "faults": outcome.faults, "kills": outcome.kills });
    report
}

/// Adds the tokens that were lost, with their bound: a kill costs each stream of one engine at most the chunk that was
/// being made and the tick that was being filled.
fn discarded_figures(args: &ChaosArgs, outcome: &Outcome, report: &mut Report) {
    let (discarded, torn) = (discarded(outcome), discarded_bound(args, outcome.torn));
    report.gate("discarded_tokens", discarded, "tokens", Bound::AtMost, torn).detail(format!(
        "{} made; bound = {} kills x (tick + chunk interval) x rate; kills: SIGKILLs, and resets and clean ends of all \
         streams of an engine",
        outcome.made, outcome.torn
    ));
    report
        .goal(
            "discarded_tokens_strict",
            discarded,
            "tokens",
            Bound::AtMost,
            discarded_bound(args, outcome.kills),
        )
        .detail(format!("the same against the {} SIGKILLs alone", outcome.kills));
}

/// Tokens that an engine made for a stream and that are in no trajectory; as every sample came back, all received
/// tokens are in one. NaN, which passes no gate, if the engines' own counts are missing.
fn discarded(outcome: &Outcome) -> f64 {
    match outcome.made.checked_sub(outcome.verdict.verified_tokens) {
        Some(discarded) => discarded as f64,
        None => f64::NAN,
    }
}

fn discarded_bound(args: &ChaosArgs, kills: u64) -> f64 {
    let rate = f64::from(args.running) * args.rate;
    let chunk = f64::from(args.chunk) / args.rate;
    kills as f64 * (TICK.as_secs_f64() + chunk) * rate
}
