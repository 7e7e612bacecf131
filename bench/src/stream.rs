//! The stream bench: what the manager and the agents cost per token at the length of real answers, and how late tokens
//! are. Real processes, paced engines, every token verified afterwards. Owns the run's course and its report.
//!
//! Answers of 8,000 tokens at 100 tokens a second take 80 s, so the first wave is staggered: its lengths are spread
//! evenly up to the full one. When the longest of it ends, every running answer is a full one and their positions
//! are spread evenly: that is the steady state, and the window starts there. What runs at the window's end is
//! cancelled with its tokens kept, and verified as far as it came.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_engine::synthetic::SyntheticParams;
use anabranch_runtime::Drain;
use anabranch_trainer::{Pack, Which};
use tokio::time::sleep;

use crate::cluster::{self, Cluster, Links};
use crate::delays::{Delays, quantile};
use crate::load::{Load, Progress, Spec};
use crate::meter::{Meter, monotonic_ns};
use crate::metrics::Scrape;
use crate::records::{Asked, Files, Job, WeightsLog};
use crate::report::{Bound, Report};
use crate::rng::Rng;
use crate::tap::Tap;
use crate::verify::Verdict;
use crate::{procfs, workdir};

/// Samples of a group.
const GROUP: u32 = 4;
/// Length of a prompt.
const PROMPT_TOKENS: u64 = 64;
/// Longest time until engines are attached and the first tokens come.
const ATTACH: Duration = Duration::from_secs(30);
/// Longest time until the last samples are back.
const COLLECT: Duration = Duration::from_secs(30);
/// Time without a sample after which no more are expected.
const QUIET: Duration = Duration::from_secs(2);
/// Time between two looks at the counters.
const LOOK: Duration = Duration::from_millis(200);

/// Flags of `anabranch bench stream`.
#[derive(Clone, Debug, clap::Args)]
pub struct StreamArgs {
    /// Length of every answer
    #[arg(long, default_value_t = 8000)]
    pub response_tokens: u32,
    /// File for the report, as JSON
    #[arg(long)]
    pub report: Option<PathBuf>,
    /// Samples that run at once, over all engines
    #[arg(long, default_value_t = 1024)]
    pub samples: u32,
    /// Engines, each with its agent
    #[arg(long, default_value_t = 4)]
    pub engines: u32,
    /// Tokens per second of each running sample
    #[arg(long, default_value_t = 100.0)]
    pub rate: f64,
    /// Tokens per chunk of an engine's stream
    #[arg(long, default_value_t = 8)]
    pub chunk: u32,
    /// Length of the measured window, after the steady state is reached
    #[arg(long, default_value_t = 40)]
    pub seconds: u64,
    /// Seed of the prompts
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Keep logs, prompts and trajectories here; without it they are removed after a run that passed
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Log filter of all processes
    #[arg(long, default_value = "info")]
    pub process_log: String,
}

/// All counters at one moment.
struct Mark {
    at: Instant,
    at_ns: u64,
    made: u64,
    manager: Duration,
    agents: Duration,
    engines: Duration,
    trainer: Duration,
}

struct Outcome {
    from: Mark,
    to: Mark,
    warm: Duration,
    made: u64,
    manager_rss_bytes: u64,
    delays: Delays,
    scrape: Scrape,
    verdict: Verdict,
    progress: Progress,
    restarts: u32,
}

/// Runs, prints the table, writes the report; true if every gate held.
pub async fn run(args: StreamArgs) -> anyhow::Result<bool> {
    let dir = workdir::WorkDir::new(args.dir.clone(), "stream")?;
    let outcome = execute(&args, dir.path()).await?;
    let report = judge(&args, &outcome);
    workdir::finish(&report, args.report.as_deref(), dir)?;
    Ok(report.pass)
}

async fn execute(args: &StreamArgs, dir: &Path) -> anyhow::Result<Outcome> {
    let drain = Drain::new();
    let files = Files::in_dir(dir);
    // No version is published: all tokens are of the start-up weights.
    drop(WeightsLog::create(&files.weights)?);
    let tap = Arc::new(Tap::default());
    let mut cluster = Cluster::start(cluster_config(args, dir, tap.clone())).await?;
    let load = Load::start(cluster.url(), &files, load_spec(args, &cluster), &drain).await?;

    let started = Instant::now();
    first_tokens(&mut cluster, &load).await?;
    let warm = Duration::from_secs_f64(f64::from(args.response_tokens) / args.rate * 1.02);
    watch("warming up", warm, &mut cluster, &load).await?;
    let warm = started.elapsed();
    let from = mark(&mut cluster)?;
    watch("measuring", Duration::from_secs(args.seconds), &mut cluster, &load).await?;
    let to = mark(&mut cluster)?;
    let scrape = Scrape::read(cluster.url()).await;
    let (manager, ..) = cluster.usage();

    load.stop_asking();
    while !load.counts().closed {
        load.check()?;
        sleep(LOOK).await;
    }
    load.job.cancel(Which::All, true).await?;
    // A cancelled sample without a token may not come back at all, so silence is the end.
    load.quiet(QUIET, Instant::now() + COLLECT).await?;
    let progress = load.progress();
    let delays = delays(&cluster, &tap, &progress, from.at_ns..to.at_ns)?;
    let made = cluster.made()?;
    let restarts =
        cluster.nodes.iter().map(|node| node.engine.lives() + node.agent.lives() - 2).sum();
    cluster.stop().await?;
    drain.token().cancel();
    let verdict = crate::verify::in_a_process(&files, &["--allow-partial"]).await?;
    let manager_rss_bytes = manager.peak_rss_bytes;
    Ok(Outcome {
        from,
        to,
        warm,
        made,
        manager_rss_bytes,
        delays,
        scrape,
        verdict,
        progress,
        restarts,
    })
}

async fn first_tokens(cluster: &mut Cluster, load: &Load) -> anyhow::Result<()> {
    let deadline = Instant::now() + ATTACH;
    while cluster.made()? == 0 {
        anyhow::ensure!(
            Instant::now() < deadline,
            "no engine made a token within {ATTACH:?}; the logs say why"
        );
        load.check()?;
        cluster.tend(LOOK).await?;
        sleep(LOOK).await;
    }
    Ok(())
}

async fn watch(
    what: &str,
    time: Duration,
    cluster: &mut Cluster,
    load: &Load,
) -> anyhow::Result<()> {
    let (started, mut before, mut told) = (Instant::now(), cluster.made()?, 0);
    while started.elapsed() < time {
        sleep(LOOK.min(time - started.elapsed().min(time))).await;
        load.check()?;
        cluster.tend(LOOK).await?;
        if started.elapsed().as_secs() > told {
            told = started.elapsed().as_secs();
            let made = cluster.made()?;
            let counts = load.counts();
            crate::progress::line(&format!(
                "{what} {told:3}/{}s  {:>7} tok/s  {}/{} samples back",
                time.as_secs(),
                made - before,
                counts.back_samples,
                counts.asked_samples,
            ));
            before = made;
        }
    }
    Ok(())
}

fn mark(cluster: &mut Cluster) -> anyhow::Result<Mark> {
    let (manager, agents, engines) = cluster.usage();
    Ok(Mark {
        at: Instant::now(),
        at_ns: monotonic_ns(),
        made: cluster.made()?,
        manager: manager.cpu,
        agents: agents.cpu,
        engines: engines.cpu,
        trainer: procfs::cpu_time(std::process::id()).unwrap_or_default(),
    })
}

fn delays(
    cluster: &Cluster,
    tap: &Tap,
    progress: &Progress,
    window: std::ops::Range<u64>,
) -> anyhow::Result<Delays> {
    let mut chunks = Vec::new();
    for meter in cluster.nodes.iter().flat_map(|node| &node.meters) {
        chunks.extend(Meter::chunks(meter)?);
    }
    Ok(Delays::new(&chunks, &tap.passed(), &progress.arrivals, window))
}

fn cluster_config(args: &StreamArgs, dir: &Path, tap: Arc<Tap>) -> cluster::Config {
    cluster::Config {
        dir: dir.to_owned(),
        engines: args.engines,
        model: SyntheticParams { mean_len: None, ..SyntheticParams::default() },
        rate: args.rate,
        chunk: args.chunk,
        max_running: args.samples.div_ceil(args.engines),
        context: args.response_tokens + 2 * PROMPT_TOKENS as u32,
        links: Links::FirstTapped(tap),
        log: args.process_log.clone(),
    }
}

fn load_spec(args: &StreamArgs, cluster: &Cluster) -> Spec {
    let config = cluster.config();
    let mut rng = Rng::new(args.seed);
    let (vocab, full) = (config.model.vocab, args.response_tokens);
    let first_wave = u64::from(args.samples / GROUP).max(1);
    let make = move |index: u64| {
        let share = (index + 1).min(first_wave) as f64 / first_wave as f64;
        Asked {
            key: format!("g{index}"),
            n: GROUP,
            prompt: rng.prompt(PROMPT_TOKENS, vocab),
            max_tokens: ((f64::from(full) * share) as u32).max(1),
            min_tokens: 0,
            ignore_eos: false,
        }
    };
    Spec {
        job: Job { seed: args.seed, model: config.model, engines: config.engine_ids() },
        // Some more than can run, so that the engines are full while an answer is on its way back.
        in_flight: (args.samples + args.samples / 16).next_multiple_of(GROUP) as usize,
        pack: Pack { min: 1, ..Pack::default() },
        make: Box::new(make),
    }
}

fn judge(args: &StreamArgs, outcome: &Outcome) -> Report {
    let (from, to) = (&outcome.from, &outcome.to);
    let tokens = to.made.saturating_sub(from.made) as f64;
    let window = to.at.duration_since(from.at).as_secs_f64();
    let spent = |f: fn(&Mark) -> Duration| (f(to).saturating_sub(f(from))).as_secs_f64();
    let (manager, agents) = (spent(|m| m.manager), spent(|m| m.agents));
    let mut report = Report::new("stream");
    report
        .goal(
            "tokens_per_cpu_second",
            tokens / (manager + agents),
            "tok/CPU-s",
            Bound::AtLeast,
            300_000.0,
        )
        .detail("manager + agents");
    report.goal(
        "tokens_per_manager_cpu_second",
        tokens / manager,
        "tok/CPU-s",
        Bound::AtLeast,
        1_000_000.0,
    );
    delay_figures(&mut report, outcome);
    let rss = outcome.manager_rss_bytes as f64 / 1e6;
    report.goal("manager_peak_rss", rss, "MB", Bound::AtMost, 200.0);
    report.figure("tokens_per_second", tokens / window, "tok/s").detail(format!(
        "{} asked for: {} samples x {} tok/s",
        f64::from(args.samples) * args.rate,
        args.samples,
        args.rate
    ));
    report
        .figure("window", window, "s")
        .detail(format!("after {:.0} s of warming up", outcome.warm.as_secs_f64()));
    report.figure("manager_cpu", manager, "CPU-s");
    report.figure("agents_cpu", agents, "CPU-s").detail(format!("{} agents", args.engines));
    report.figure("engines_cpu", spent(|m| m.engines), "CPU-s").detail("not in the goals");
    report
        .figure("trainer_cpu", spent(|m| m.trainer), "CPU-s")
        .detail("this process: not in the goals");
    correctness(&mut report, outcome);
    report.note(format!(
        "first wave staggered to {} tokens, window starts when it is through: answers of full length at evenly \
         spread positions; the rest is cancelled at the end, kept and verified",
        args.response_tokens
    ));
    report.detail =
        serde_json::json!({ "verdict": outcome.verdict, "metrics": outcome.scrape.quantiles });
    report
}

fn delay_figures(report: &mut Report, outcome: &Outcome) {
    let Delays { link_ms, acked_ms, delivery_ms, unmatched } = &outcome.delays;
    let at = quantile;
    let what = format!(
        "a chunk is ready at the engine -> its tick is in the manager's socket, on the first agent's link; {} chunks, \
         {unmatched} never came",
        link_ms.len()
    );
    report.figure("engine_to_manager_delay_p50", at(link_ms, 0.5), "ms").detail(what.as_str());
    report
        .goal("engine_to_manager_delay_p99", at(link_ms, 0.99), "ms", Bound::AtMost, 60.0)
        .detail(what);
    report
        .figure("engine_to_ack_p99", at(acked_ms, 0.99), "ms")
        .detail("until the manager's acknowledgement, which it sends lazily, passes the same link");
    report.figure("last_token_to_delivery_p50", at(delivery_ms, 0.5), "ms");
    report
        .goal("last_token_to_delivery_p99", at(delivery_ms, 0.99), "ms", Bound::AtMost, 50.0)
        .detail(format!(
            "the last chunk is ready at the engine -> the batch is in the trainer's hands; {} answers",
            delivery_ms.len()
        ));
    for (id, value) in &outcome.scrape.quantiles {
        report.figure(id, *value, "ms").detail("the manager's own histogram");
    }
}

fn correctness(report: &mut Report, outcome: &Outcome) {
    let verdict = &outcome.verdict;
    report
        .gate("provenance_errors", verdict.provenance_errors as f64, "samples", Bound::AtMost, 0.0)
        .detail(verdict.examples.first().cloned().unwrap_or_default());
    report.gate("duplicated", verdict.duplicated as f64, "samples", Bound::AtMost, 0.0);
    let missing =
        verdict.samples_asked.saturating_sub(verdict.samples_verified + verdict.samples_partial);
    // Samples that had no token yet when they were cancelled come back empty or not at all.
    report.figure("samples_not_back", missing as f64, "samples").detail(format!(
        "{} asked, {} back",
        outcome.progress.asked_samples, outcome.progress.back_samples
    ));
    report.figure("verified_tokens", verdict.verified_tokens as f64, "tokens");
    report
        .figure("made_tokens", outcome.made as f64, "tokens")
        .detail("by the engines, in the whole run");
    report.figure("restarted_processes", f64::from(outcome.restarts), "processes");
}
