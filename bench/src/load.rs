//! The trainer's side of a run: keeps a number of samples in flight, writes requests and results to disk, acknowledges.
//! Two tasks over one job. The run decides what is asked, and when to stop.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anabranch_runtime::Drain;
use anabranch_trainer::{
    Batch, Client, Consumer, Delivery, Group, Job as TrainerJob, JobConfig, OnRunning, Pack,
    Sampling, Shard, Staleness, Version,
};
use anyhow::{Context, bail};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::meter::monotonic_ns;
use crate::records::{Asked, Files, Job, PromptLog, TrajectoryLog};

/// Groups of one submit call.
const SUBMIT_GROUPS: usize = 32;
/// Submit calls of one step.
const STEP_SUBMITS: u64 = 8;
const SUBMIT_WITHIN: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

/// Maker of the next group; called with 0, 1, 2, ...
pub type MakeGroup = Box<dyn FnMut(u64) -> Asked + Send>;

/// Settings of a load.
pub struct Spec {
    /// Facts that the verifier needs.
    pub job: Job,
    /// Samples that are asked for and not yet back.
    pub in_flight: usize,
    /// Rules by which the manager packs batches.
    pub pack: Pack,
    /// Maker of the groups.
    pub make: MakeGroup,
}

/// The two tasks that submit and receive.
pub struct Load {
    /// The job at the manager.
    pub job: TrainerJob,
    state: Arc<Shared>,
    stop: CancellationToken,
}

struct Shared {
    progress: Mutex<Progress>,
    room: Semaphore,
}

/// Counts of a load so far.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Samples asked for.
    pub asked_samples: u64,
    /// Samples that came back.
    pub back_samples: u64,
    /// Tokens of these samples.
    pub back_tokens: u64,
    /// Batches received.
    pub batches: u64,
    /// Steps that are complete.
    pub steps_done: u64,
    /// Each sample's seed, and the time at which its batch was in this process, in monotonic nanoseconds.
    pub arrivals: Vec<(u64, u64)>,
    /// First error of a task; the run cannot continue after it.
    pub failed: Option<String>,
    /// True if no more groups will be asked for.
    pub closed: bool,
}

impl Load {
    /// Opens the job and starts both tasks.
    pub async fn start(
        manager: &str,
        files: &Files,
        spec: Spec,
        drain: &Drain,
    ) -> anyhow::Result<Self> {
        let client = Client::connect(manager, None).await?;
        let config = JobConfig {
            seed: spec.job.seed,
            staleness: Staleness::UNBOUNDED,
            on_running: OnRunning::Continue,
            ..JobConfig::new(format!("bench-{}", std::process::id()))
        };
        let job = client.open(config).await.context("opening the job")?;
        let consumer = job.consume(spec.pack, Shard::ALL).context("attaching to the stream")?;
        let prompts = PromptLog::create(&files.prompts, &spec.job)?;
        let trajectories = TrajectoryLog::create(&files.trajectories)?;
        let state =
            Arc::new(Shared { progress: Mutex::default(), room: Semaphore::new(spec.in_flight) });
        let stop = CancellationToken::new();
        let submitter = Submitter {
            job: job.clone(),
            state: state.clone(),
            prompts,
            make: spec.make,
            next: 0,
            submits: 0,
        };
        drain.spawn("submit", submitter.run(stop.clone()));
        let receiver = Receiver { state: state.clone(), trajectories, consumer };
        drain.spawn("consume", receiver.run(drain.token()));
        Ok(Self { job, state, stop })
    }

    /// The counts so far.
    pub fn progress(&self) -> Progress {
        self.state.lock().clone()
    }

    /// Like [`Load::progress`] without the arrivals, and so cheaper.
    pub fn counts(&self) -> Progress {
        let p = self.state.lock();
        Progress { arrivals: Vec::new(), failed: p.failed.clone(), ..*p }
    }

    /// Fails if a task failed.
    pub fn check(&self) -> anyhow::Result<()> {
        match &self.state.lock().failed {
            Some(why) => bail!("the load failed: {why}"),
            None => Ok(()),
        }
    }

    /// Asks for no more samples.
    pub fn stop_asking(&self) {
        self.stop.cancel();
    }

    /// Waits for all samples; true if they came back before `deadline`.
    pub async fn all_back(&self, deadline: Instant) -> anyhow::Result<bool> {
        loop {
            self.check()?;
            if self.counts().is_all_back() {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until nothing came back for `quiet`, all samples are back, or `deadline` is over.
    pub async fn quiet(&self, quiet: Duration, deadline: Instant) -> anyhow::Result<()> {
        let (mut seen, mut since) = (self.counts().back_samples, Instant::now());
        while since.elapsed() < quiet && Instant::now() < deadline {
            self.check()?;
            let counts = self.counts();
            if counts.is_all_back() {
                break;
            }
            if counts.back_samples != seen {
                (seen, since) = (counts.back_samples, Instant::now());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }
}

impl Progress {
    /// True if all samples that were asked for are back, and no more will be.
    pub fn is_all_back(&self) -> bool {
        self.closed && self.back_samples >= self.asked_samples
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().expect("no code panics while it holds this lock")
    }

    fn ended(&self, what: &str, result: anyhow::Result<()>) {
        if let Err(error) = result {
            self.lock().failed.get_or_insert(format!("{what}: {error:#}"));
        }
    }
}

// === submitting ===

struct Submitter {
    job: TrainerJob,
    state: Arc<Shared>,
    prompts: PromptLog,
    make: MakeGroup,
    next: u64,
    submits: u64,
}

impl Submitter {
    async fn run(mut self, stop: CancellationToken) {
        let state = self.state.clone();
        let mut result = Ok(());
        while result.is_ok() && !stop.is_cancelled() {
            let asked = tokio::select! {
                asked = self.gather() => asked,
                () = stop.cancelled() => break,
            };
            result = self.submit(asked).await;
        }
        if result.is_ok() {
            result = self.close_step().await;
        }
        state.ended("submitting", result);
        state.lock().closed = true;
    }

    /// Makes as many groups as there is room for, at least one.
    async fn gather(&mut self) -> Vec<Asked> {
        let mut out = Vec::new();
        let first = (self.make)(self.next);
        let room = self.state.room.acquire_many(first.n).await.expect("never closed");
        room.forget();
        out.push(first);
        self.next += 1;
        while out.len() < SUBMIT_GROUPS {
            let n = out[0].n;
            let Ok(room) = self.state.room.try_acquire_many(n) else { break };
            room.forget();
            out.push((self.make)(self.next));
            self.next += 1;
        }
        out
    }

    async fn submit(&mut self, asked: Vec<Asked>) -> anyhow::Result<()> {
        for group in &asked {
            self.prompts.append(group)?;
            self.state.lock().asked_samples += u64::from(group.n);
        }
        self.submits += 1;
        let (step, last) = (self.step(), self.submits.is_multiple_of(STEP_SUBMITS));
        let submit = self.job.submit(step).groups(asked.into_iter().map(group));
        let submit = if last { submit.last() } else { submit };
        let submitted = submit.timeout(SUBMIT_WITHIN).send().await?;
        if let Some(key) = submitted.duplicates().next() {
            bail!("group {key} was submitted before");
        }
        Ok(())
    }

    async fn close_step(&mut self) -> anyhow::Result<()> {
        if !self.submits.is_multiple_of(STEP_SUBMITS) {
            self.job.submit(self.step()).last().timeout(SUBMIT_WITHIN).send().await?;
        }
        Ok(())
    }

    /// Current step, from 1; `submits` has counted the call that is being made.
    fn step(&self) -> u64 {
        self.submits.div_ceil(STEP_SUBMITS)
    }
}

fn group(asked: Asked) -> Group {
    let sampling =
        Sampling::new(asked.max_tokens).min_tokens(asked.min_tokens).ignore_eos(asked.ignore_eos);
    Group::new(asked.key, asked.prompt, asked.n, sampling)
}

// === receiving ===

struct Receiver {
    state: Arc<Shared>,
    trajectories: TrajectoryLog,
    consumer: Consumer,
}

impl Receiver {
    async fn run(mut self, stop: CancellationToken) {
        let state = self.state.clone();
        tokio::select! {
            result = self.receive() => state.ended("consuming", result),
            () = stop.cancelled() => {}
        }
    }

    async fn receive(&mut self) -> anyhow::Result<()> {
        loop {
            match self.consumer.next().await? {
                Delivery::Batch(batch) => self.take(batch).await?,
                Delivery::StepDone(done) => {
                    let mut progress = self.state.lock();
                    progress.steps_done += 1;
                    if !done.short.is_empty() || !done.dropped.is_empty() {
                        let (short, dropped) = (&done.short, &done.dropped);
                        tracing::debug!(step = done.step.0, ?short, ?dropped, "a step came short");
                    }
                }
            }
        }
    }

    async fn take(&mut self, batch: Batch) -> anyhow::Result<()> {
        let now_ns = monotonic_ns();
        for trajectory in &batch.trajectories {
            self.trajectories.append(trajectory)?;
        }
        self.trajectories.flush()?;
        self.consumer.commit(batch.seq, Version::default()).await?;
        let mut progress = self.state.lock();
        progress.batches += 1;
        for trajectory in &batch.trajectories {
            progress.back_samples += 1;
            progress.back_tokens += trajectory.tokens.len() as u64;
            progress.arrivals.push((trajectory.seed, now_ns));
        }
        self.state.room.add_permits(batch.trajectories.len());
        Ok(())
    }
}
