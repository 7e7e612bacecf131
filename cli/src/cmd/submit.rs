//! `anabranch submit`: reads prompts and writes trajectories, one JSON object a line.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anabranch_runtime::Exit;
use anabranch_runtime::signal::ShutdownSignals;
use anabranch_trainer::{
    Consumer, Delivery, Finish, Group, Job, JobConfig, Pack, Sampling, Shard, Step, StepDone,
    Trajectory, Verdict, Version, Which,
};
use serde::Serialize;
use tokenizers::Tokenizer;

use crate::failure::{Failure, OrExit, Outcome};
use crate::link::ManagerArgs;
use crate::progress::Progress;
use crate::prompts::{self, Prompt};

/// Flags of `anabranch submit`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    manager: ManagerArgs,
    /// Prompts, one JSON object a line: {"prompt": "text"} or {"input_ids": [1, 2]}, and perhaps "key"; - is stdin
    #[arg(default_value = "-")]
    prompts: PathBuf,
    /// File for the trajectories, one JSON object a line; - is stdout
    #[arg(short, long, default_value = "-")]
    out: PathBuf,
    /// tokenizer.json, or a directory with it; needed for text prompts, gives "text" in the output
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Job to open, or to join if it runs
    #[arg(long, default_value = "default")]
    job: String,
    #[arg(long, default_value_t = 0)]
    epoch: u32,
    /// Samples of each prompt
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    n: u32,
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    #[arg(long, default_value_t = 0)]
    min_tokens: u32,
    /// Temperature of the sampling; 0 takes the likeliest token
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Number of likeliest tokens to sample from; 0 is off
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// Text that ends a sample; may be given more than once
    #[arg(long)]
    stop: Vec<String>,
    /// Token that ends a sample; may be given more than once
    #[arg(long)]
    stop_id: Vec<u32>,
    /// Seed of the job; each sample's own is derived from it
    #[arg(long)]
    seed: Option<u64>,
    /// Run on after the model's EOS
    #[arg(long)]
    ignore_eos: bool,
    /// Only this version of the weights may make the tokens
    #[arg(long)]
    pin: Option<u64>,
    /// Seconds to wait for a manager that is full
    #[arg(long, default_value_t = 3600)]
    patience: u64,
    /// No progress on stderr
    #[arg(short, long)]
    quiet: bool,
}

/// One line of the output.
#[derive(Serialize)]
struct Line<'a> {
    key: &'a str,
    index: u32,
    tokens: &'a [u32],
    logprobs: &'a [f32],
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    finish: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    detail: &'a str,
    attempts: u32,
    seed: u64,
    discarded_tokens: u32,
    /// Numbers of the weight versions that made the tokens, in order.
    versions: Vec<u64>,
    spans: Vec<SpanLine<'a>>,
}

#[derive(Serialize)]
struct SpanLine<'a> {
    start: u32,
    len: u32,
    engine: &'a str,
    incarnation: u64,
    version: u64,
    epoch: u32,
    exact: bool,
    kv_recomputed: bool,
}

/// Counts of what has come so far.
struct Tally {
    step: Step,
    started: Instant,
    samples: u64,
    tokens: u64,
    moved: u64,
    abandoned: u64,
    out: Box<dyn Write + Send>,
    tokenizer: Option<Tokenizer>,
    progress: Progress,
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    let tokenizer = args.tokenizer.as_deref().map(prompts::load_tokenizer).transpose()?;
    let prompts = args.read(tokenizer.as_ref())?;
    let groups = args.groups(prompts)?;
    let out = args.open_out()?;
    let mut signals = ShutdownSignals::install().or_exit(Exit::Io)?;
    let mut config = JobConfig { epoch: args.epoch, join: true, ..JobConfig::new(&args.job) };
    config.seed = args.seed.unwrap_or(0);
    let job = args.manager.trainer().await?.open(config).await?;
    let total = groups.iter().map(|group| u64::from(group.n())).sum();
    let progress = Progress::new("trajectories", total, args.quiet);
    let mut tally = Tally::new(out, tokenizer, progress);
    let ended = tokio::select! {
        ended = work(&job, groups, &mut tally, Duration::from_secs(args.patience)) => ended,
        signal = signals.recv() => {
            tally.progress.say(&format!("{signal}: giving up what is still open"));
            job.cancel(Which::Step(tally.step), false).await?;
            Err(Failure::new(Exit::TryAgain, format!("stopped by {signal} after {}", tally.note())))
        }
    };
    tally.progress.finish();
    job.close(false).await?;
    ended.map(|good| if good { Exit::Ok } else { Exit::Failed })
}

/// Submits while it consumes: a manager with room for few groups accepts more as samples are delivered.
async fn work(
    job: &Job,
    groups: Vec<Group>,
    tally: &mut Tally,
    patience: Duration,
) -> Result<bool, Failure> {
    let wanted = groups.len();
    // Written as they come, but not one by one.
    let pack = Pack { min: 32, max_wait: Some(Duration::from_millis(100)), ..Pack::default() };
    let consumer = job.consume(pack, Shard::ALL)?;
    let step = tally.step;
    let current = job.version_at_open().await;
    let submit = job.submit(step).groups(groups).last().timeout(patience).allow_rejected();
    let mut submit = std::pin::pin!(submit.send());
    let mut receive = std::pin::pin!(receive(consumer, tally, current));
    let submitted = tokio::select! {
        submitted = &mut submit => submitted?,
        done = &mut receive => return done.map(|done| report_step(&done)),
    };
    let refused = report(submitted.rejected());
    if refused == wanted {
        return Err(Failure::new(Exit::Failed, "the manager took none of the prompts"));
    }
    if !submitted.closed {
        // No more will come: what was taken is all that the step has.
        job.submit(step).last().timeout(patience).send().await?;
    }
    let done = receive.await?;
    Ok(report_step(&done) && refused == 0)
}

async fn receive(
    mut consumer: Consumer,
    tally: &mut Tally,
    current: Version,
) -> Result<StepDone, Failure> {
    loop {
        match consumer.next().await? {
            Delivery::Batch(batch) => {
                if batch.step == tally.step {
                    tally.write(&batch.trajectories).or_exit(Exit::Io)?;
                }
                consumer.commit(batch.seq, current).await?;
            }
            Delivery::StepDone(done) if done.step == tally.step => {
                tally.progress.say(&format!("done: {}", tally.note()));
                return Ok(done);
            }
            Delivery::StepDone(_) => {}
        }
    }
}

/// Says which prompts were not taken; returns how many.
fn report<'a>(rejected: impl Iterator<Item = &'a Verdict>) -> usize {
    let say = |verdict: &Verdict| {
        let why = verdict.why_not().unwrap_or_default();
        eprintln!("prompt {:?} was refused: {why}", verdict.key);
    };
    rejected.inspect(|verdict| say(verdict)).count()
}

/// Says what is missing from the step; true if nothing is.
fn report_step(done: &StepDone) -> bool {
    for short in done.short.iter().chain(&done.dropped) {
        eprintln!(
            "prompt {:?}: {} of {} samples: {}",
            short.key, short.delivered, short.n, short.why
        );
    }
    done.short.is_empty() && done.dropped.is_empty()
}

// === impl Args ===

impl Args {
    fn read(&self, tokenizer: Option<&Tokenizer>) -> Result<Vec<Prompt>, Failure> {
        let run = format!("{:x}", since_1970().as_millis());
        if self.prompts.as_os_str() == "-" {
            return prompts::read(io::stdin().lock(), "stdin", tokenizer, &run);
        }
        let origin = self.prompts.display().to_string();
        let file = File::open(&self.prompts);
        let file = file.map_err(|e| format!("cannot read {origin}: {e}")).or_exit(Exit::Usage)?;
        prompts::read(BufReader::new(file), &origin, tokenizer, &run)
    }

    fn groups(&self, prompts: Vec<Prompt>) -> Result<Vec<Group>, Failure> {
        let sampling = self.sampling();
        let pin =
            self.pin.map(|number| Version { epoch: self.epoch, number, ..Version::default() });
        let group = |prompt: Prompt| {
            let group = Group::new(prompt.key, prompt.ids, self.n, sampling.clone());
            let group = pin.into_iter().fold(group, Group::pin);
            group.check()?;
            Ok(group)
        };
        prompts.into_iter().map(group).collect()
    }

    fn sampling(&self) -> Sampling {
        let sampling = Sampling::new(self.max_tokens)
            .min_tokens(self.min_tokens)
            .temperature(self.temperature)
            .top_p(self.top_p)
            .top_k(self.top_k)
            .stop_ids(self.stop_id.iter().copied())
            .stop_strings(self.stop.iter().cloned())
            .ignore_eos(self.ignore_eos);
        self.seed.into_iter().fold(sampling, Sampling::seed)
    }

    fn open_out(&self) -> Result<Box<dyn Write + Send>, Failure> {
        if self.out.as_os_str() == "-" {
            return Ok(Box::new(BufWriter::new(io::stdout())));
        }
        let file = File::create(&self.out)
            .map_err(|error| format!("cannot write {}: {error}", self.out.display()))
            .or_exit(Exit::CannotCreate)?;
        Ok(Box::new(BufWriter::new(file)))
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

// === impl Tally ===

impl Tally {
    fn new(out: Box<dyn Write + Send>, tokenizer: Option<Tokenizer>, progress: Progress) -> Self {
        Self {
            // Unique among the runs that share a job; only its order matters.
            step: Step(since_1970().as_millis() as u64),
            started: Instant::now(),
            samples: 0,
            tokens: 0,
            moved: 0,
            abandoned: 0,
            out,
            tokenizer,
            progress,
        }
    }

    fn write(&mut self, trajectories: &[Trajectory]) -> io::Result<()> {
        for trajectory in trajectories {
            let line = Line::new(trajectory, self.tokenizer.as_ref());
            serde_json::to_writer(&mut self.out, &line)?;
            self.out.write_all(b"\n")?;
            self.samples += 1;
            self.tokens += trajectory.tokens.len() as u64;
            self.moved += u64::from(trajectory.migrations());
            self.abandoned += u64::from(matches!(trajectory.finish, Finish::Abandoned(_)));
        }
        self.out.flush()?;
        self.progress.set(self.samples, &self.note());
        Ok(())
    }

    fn note(&self) -> String {
        let rate = self.tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-3);
        let (samples, tokens, moved) = (self.samples, self.tokens, self.moved);
        let mut note = format!("{samples} trajectories, {tokens} tokens, {rate:.0} tokens/s");
        if moved > 0 {
            note += &format!(", {moved} moved to another engine");
        }
        if self.abandoned > 0 {
            note += &format!(", {} abandoned", self.abandoned);
        }
        note
    }
}

// === impl Line ===

impl<'a> Line<'a> {
    fn new(trajectory: &'a Trajectory, tokenizer: Option<&Tokenizer>) -> Self {
        let t = trajectory;
        let mut versions: Vec<u64> = t.spans.iter().map(|span| span.version.number).collect();
        versions.dedup();
        Self {
            key: &t.key,
            index: t.index,
            tokens: &t.tokens,
            logprobs: &t.logprobs,
            text: tokenizer.and_then(|tokenizer| tokenizer.decode(&t.tokens, true).ok()),
            finish: t.finish.name(),
            detail: t.finish.detail(),
            attempts: t.attempts,
            seed: t.seed,
            discarded_tokens: t.discarded_tokens,
            versions,
            spans: t.spans.iter().map(SpanLine::new).collect(),
        }
    }
}

impl<'a> SpanLine<'a> {
    fn new(span: &'a anabranch_trainer::Span) -> Self {
        Self {
            start: span.start,
            len: span.len,
            engine: &span.engine,
            incarnation: span.incarnation,
            version: span.version.number,
            epoch: span.version.epoch,
            exact: span.exact,
            kv_recomputed: span.kv_recomputed,
        }
    }
}
