//! `anabranch demo`: the whole job, from random weights to the report. Owns its flags, its start and
//! its end; the loop in between is the session's.

mod compute;
mod plan;
mod session;
mod summary;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_runtime::Drain;
use anabranch_runtime::signal::shutdown_signal;
use anabranch_trainer as sdk;
use anabranch_trainer::Version;

use crate::cluster::{Cluster, ClusterError, Dirs, Place};
use crate::colocated::{Colocated, ColocatedError};
use crate::gsm8k::{Gsm8k, Gsm8kError};
use crate::model::{CheckpointError, Model, ModelConfig};
use crate::progress::View;
use crate::recipe::Recipe;
use crate::report::Report;
use crate::rollouts::{RolloutError, Rollouts};
use crate::script::{FIRST, Script, ScriptError};
use crate::task::{Strand, Task};
use crate::trainer::Trainer;
use crate::warmup::warm_up;
use crate::watch::{WatchError, Watcher};

use compute::Compute;

pub use compute::Learner;
pub use plan::{COLOCATED, Plan};
pub use session::{Publication, Session, StepRecord};
pub use summary::DemoOutcome;

/// Longest time that the first engines may take to serve.
const FLEET_START: Duration = Duration::from_secs(30);
/// Time between two looks at processes that start.
const LOOK: Duration = Duration::from_millis(500);
/// Time that the tasks of the run have to end.
const STOP_DEADLINE: Duration = Duration::from_secs(3);

/// Flags of `anabranch demo`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct DemoArgs {
    /// Seed of weights, problems and sampling
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Optimizer steps; the script of joins and kills needs 8
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub steps: Option<u64>,
    /// Publish no weights: the engines keep version 0 (the control)
    #[arg(long)]
    pub no_publish: bool,
    /// No kills, on-policy, whole groups: twice the same digest of all trajectories
    #[arg(long)]
    pub deterministic: bool,
    /// GSM8K-style problems (JSON lines with question, and answer after ####) as workload
    #[arg(long, value_name = "FILE.jsonl")]
    pub data: Option<PathBuf>,
    /// Folder for report.html, report.json and the logs
    #[arg(long, value_name = "DIR", default_value = "anabranch-demo")]
    pub report_dir: PathBuf,
    /// Print report.json to stdout, and nothing else
    #[arg(long)]
    pub json: bool,
    /// Leave manager and engines up for so many seconds after the run, or until Ctrl-C
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub keep: u64,
}

impl Default for DemoArgs {
    fn default() -> Self {
        Self {
            seed: 1,
            steps: None,
            no_publish: false,
            deterministic: false,
            data: None,
            report_dir: PathBuf::from("anabranch-demo"),
            json: false,
            keep: 0,
        }
    }
}

/// Reason why the demo ended early.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The problems of `--data` cannot be used.
    #[error(transparent)]
    Data(#[from] Gsm8kError),
    /// A process does not run.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The manager's events did not come, or not in time.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// A join, kill or drain failed.
    #[error(transparent)]
    Script(#[from] ScriptError),
    /// No rollouts come.
    #[error(transparent)]
    Rollouts(#[from] RolloutError),
    /// The colocated engine could not be lent or taken back.
    #[error(transparent)]
    Colocated(#[from] ColocatedError),
    /// The manager failed a call.
    #[error(transparent)]
    Sdk(#[from] sdk::Error),
    /// The start-up weights cannot be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The trainer's thread cannot be started.
    #[error("cannot start the trainer's thread: {0}")]
    Thread(#[from] rayon::ThreadPoolBuildError),
    /// A tensor operation failed.
    #[error("a tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A file of the report cannot be written.
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    /// A signal stopped the run.
    #[error("stopped by {0}")]
    Interrupted(&'static str),
}

/// Runs the whole demo on this machine; needs a multi-threaded runtime.
pub async fn run(args: DemoArgs) -> Result<DemoOutcome, DemoError> {
    let started = Instant::now();
    let plan = planned(&args)?;
    let view = View::new(plan.steps(), args.json);
    let dirs = Arc::new(Dirs::make(&args.report_dir)?);
    let compute = Compute::start()?;
    let (trainer, warmup_s) = compute.run(|| warmed_up(&plan, &dirs, &view))?;
    let learner = Learner { trainer, compute };
    let drain = Drain::new();
    let ended = tokio::select! {
        ended = live(plan, (dirs.clone(), started), (view.clone(), &drain), (learner, warmup_s), args.keep) => ended,
        signal = shutdown_signal() => Err(interrupted(signal)),
    };
    view.finish();
    if let Err(late) = drain.close(STOP_DEADLINE).await {
        tracing::debug!(%late, "the demo's own tasks did not end");
    }
    summary::conclude(ended?, &dirs)
}

fn planned(args: &DemoArgs) -> Result<Plan, DemoError> {
    let (task, recipe): (Box<dyn Task>, _) = match &args.data {
        Some(path) => (Box::new(Gsm8k::read(path, args.seed)?), Recipe::workload()),
        None => (Box::new(Strand::new(args.seed)), Recipe::default()),
    };
    Ok(Plan::new(args, task, recipe))
}

fn interrupted(signal: std::io::Result<&'static str>) -> DemoError {
    DemoError::Interrupted(signal.unwrap_or("a signal"))
}

/// Makes random weights, teaches them the form of an answer, and saves them as the start-up weights of all engines.
fn warmed_up(plan: &Plan, dirs: &Dirs, view: &View) -> Result<(Trainer, f64), DemoError> {
    let task = plan.task.as_ref();
    let model = Model::random(ModelConfig::for_task(task), plan.seed)?;
    let count = model.parameter_count();
    view.say(&format!("{count} parameters from random weights; warming up"));
    let begun = Instant::now();
    warm_up(&model, task, &plan.recipe.warmup)?;
    let warmup_s = begun.elapsed().as_secs_f64();
    model.save(&dirs.model())?;
    Ok((Trainer::new(model, plan.recipe.trainer(task))?, warmup_s))
}

async fn live(
    plan: Plan,
    (dirs, started): (Arc<Dirs>, Instant),
    (view, drain): (View, &Drain),
    (learner, warmup_s): (Learner, f64),
    keep: u64,
) -> Result<Report, DemoError> {
    let mut session = begin(plan, (dirs, started), (view, drain), learner).await?;
    let exact_before = session.evaluate(0).await?;
    session.view.say(&format!("held-out exact match before RL: {exact_before:.3}"));
    session.train().await?;
    session.finish().await?;
    let exact_after = session.evaluate(session.plan.last_evaluation()).await?;
    session.view.say(&format!("held-out exact match after RL: {exact_after:.3}"));
    let report = summary::gather(&session, warmup_s, (exact_before, exact_after));
    if keep > 0 {
        session.view.say(&format!("kept up for {keep} s; Ctrl-C ends it sooner"));
        let ended = tokio::time::timeout(Duration::from_secs(keep), shutdown_signal()).await;
        tracing::debug!(?ended, "kept up long enough");
    }
    session.close().await?;
    Ok(report)
}

/// Starts manager and engines, opens the job, and waits until all of them serve.
async fn begin(
    plan: Plan,
    (dirs, started): (Arc<Dirs>, Instant),
    (view, drain): (View, &Drain),
    learner: Learner,
) -> Result<Session, DemoError> {
    let mut cluster = Cluster::start(dirs.clone(), plan.engines, "info").await?;
    let watcher = Watcher::start(cluster.url(), started, drain).await?;
    view.follow(watcher.clone(), drain);
    introduce(&plan, &cluster, &view);
    let job = sdk::Client::connect(cluster.url(), None).await?.open(plan.job()).await?;
    cluster.attach(COLOCATED, Place::Colocated).await?;
    for id in FIRST {
        cluster.attach(id, Place::Spare).await?;
    }
    fleet_serves(&mut cluster, &watcher).await?;
    let url = cluster.engine_url(COLOCATED).expect("it was attached above");
    let colocated = Colocated::new(COLOCATED, url, dirs.model(), dirs.shm());
    Ok(Session {
        script: Script::new(&plan.cues, started),
        rollouts: Rollouts::start(job.clone())?,
        version: Version::base(job.config().epoch),
        submitted: 0,
        steps: Vec::new(),
        published: Vec::new(),
        plan,
        started,
        view,
        cluster,
        watcher,
        job,
        colocated,
        learner,
    })
}

/// Says what the user can do in another terminal meanwhile.
fn introduce(plan: &Plan, cluster: &Cluster, view: &View) {
    let dirs = cluster.dirs();
    let manager = format!("--manager file:{}", dirs.announce().display());
    let (model, rate) = (dirs.model(), plan.engines.rate);
    view.say(&format!(
        "manager at {}; report and logs in {}",
        cluster.url(),
        dirs.report().display()
    ));
    view.say("meanwhile, from another terminal:");
    view.say(&format!("  anabranch watch {manager}"));
    view.say(&format!(
        "  anabranch agent {manager} -- anabranch engine --model hf:{} --rate {rate}",
        model.display()
    ));
}

async fn fleet_serves(cluster: &mut Cluster, watcher: &Watcher) -> Result<(), DemoError> {
    let ids = || FIRST.iter().copied().chain([COLOCATED]);
    let given_up = Instant::now() + FLEET_START;
    loop {
        let what = "every engine serves";
        let all = |story: &crate::watch::Story| ids().all(|id| story.is_serving(id)).then_some(());
        match watcher.until(what, LOOK, all).await {
            Ok(()) => return Ok(()),
            Err(late) if Instant::now() > given_up => return Err(late.into()),
            Err(_) => ids().try_for_each(|id| cluster.check_node(id))?,
        }
    }
}
