//! The training loop over a live fleet: each step generates, takes the GPU back, trains while the rest
//! still comes, and publishes. Owns the order of these; each part is somebody else's.

use std::time::{Duration, Instant};

use anabranch_trainer::{Finish, Job, TensorRef, Trajectory, Version};

use super::{DemoError, Learner, Plan};
use crate::cluster::Cluster;
use crate::colocated::Colocated;
use crate::evaluate::exact_match;
use crate::model::NamedTensor;
use crate::progress::View;
use crate::rollouts::Rollouts;
use crate::script::{Script, Stage};
use crate::trainer::StepStats;
use crate::watch::{Story, Watcher};

/// Samples of one pass in the deterministic mode, whatever order they came in.
const FIXED_MICRO_BATCH: usize = 64;

/// Longest time that the last version may take to reach every engine.
const ROLLED: Duration = Duration::from_secs(10);

/// Everything that is alive while the demo runs.
pub struct Session {
    /// Plan of the run.
    pub plan: Plan,
    /// Time zero of the story and the report.
    pub started: Instant,
    /// Output on the screen.
    pub view: View,
    // Before the cluster: what talks to it is dropped first.
    /// Prompts to the fleet and trajectories back.
    pub rollouts: Rollouts,
    /// The job at the manager.
    pub job: Job,
    /// The manager's events.
    pub watcher: Watcher,
    /// The processes.
    pub cluster: Cluster,
    /// The engine on the trainer's GPU.
    pub colocated: Colocated,
    /// Joins, kills and drains.
    pub script: Script,
    /// The trainer.
    pub learner: Learner,
    /// Weight version that the engines serve, or will serve once it has reached them.
    pub version: Version,
    /// The newest step that was submitted.
    pub submitted: u64,
    /// Finished steps in their order.
    pub steps: Vec<StepRecord>,
    /// Published versions in their order.
    pub published: Vec<Publication>,
}

/// Figures of one finished step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRecord {
    /// Number of the step, from 1.
    pub step: u64,
    /// Time at which the step ended, in seconds since the demo's start.
    pub ended_s: f64,
    /// Duration of the step.
    pub took: Duration,
    /// Figures of its samples and of its optimizer step.
    pub stats: StepStats,
    /// Tokens of its samples.
    pub tokens: u64,
    /// Largest lag of a token, in versions.
    pub lag: u64,
}

/// Result of collecting a step's samples.
#[derive(Default)]
struct Collected {
    /// Samples that were not trained on yet.
    rest: Vec<Trajectory>,
    tokens: u64,
    lag: u64,
}

/// Figures of one published version.
#[derive(Debug, Clone, PartialEq)]
pub struct Publication {
    /// The version's number.
    pub number: u64,
    /// Size of the version's tensors in bytes.
    pub bytes: u64,
    /// Time at which the publication began, in seconds since the demo's start.
    pub at_s: f64,
    /// Time that the publication kept the trainer waiting.
    pub kept: Duration,
    /// Time until the manager had sealed the version.
    pub sealed: Duration,
}

impl Session {
    /// Share of held-out problems answered exactly at the current version. Takes the job's step `step`.
    pub async fn evaluate(&mut self, step: u64) -> Result<f64, DemoError> {
        self.view
            .update(|n| n.doing = format!("evaluating {} held-out problems", self.plan.held_out));
        let (task, count) = (self.plan.task.as_ref(), self.plan.held_out);
        Ok(exact_match(&mut self.rollouts, task, (step, count), self.version).await?)
    }

    /// Runs all training steps.
    pub async fn train(&mut self) -> Result<(), DemoError> {
        for step in 1..=self.plan.steps() {
            self.step(step).await?;
        }
        Ok(())
    }

    async fn step(&mut self, step: u64) -> Result<(), DemoError> {
        let begun = Instant::now();
        self.cluster.check()?;
        let (script, mut stage) = self.stage();
        script.begin_step(step, &mut stage).await?;
        self.lend().await?;
        self.submit(step).await?;
        let Collected { rest, tokens, lag } = self.collect(step).await?;
        self.view.update(|n| n.doing = "training".to_owned());
        self.learn(step, rest)?;
        self.submit_ahead(step + 1).await?;
        let stats = self.learner.step()?;
        self.publish(stats.version).await?;
        self.rollouts.commit(step, self.version).await?;
        let (ended_s, took) = (self.started.elapsed().as_secs_f64(), begun.elapsed());
        self.steps.push(StepRecord { step, ended_s, took, stats, tokens, lag });
        self.show_step();
        Ok(())
    }

    /// Takes the step's samples as they come. When enough of them are here, takes the GPU back and trains while the
    /// rest comes from the other engines.
    async fn collect(&mut self, step: u64) -> Result<Collected, DemoError> {
        self.view.update(|n| n.doing = "generating".to_owned());
        let enough = self.plan.recipe.samples_per_step() as f64 * self.plan.take_back_share;
        let (mut collected, mut received) = (Collected::default(), 0);
        while let Some(batch) = self.rollouts.next(step).await? {
            received += batch.len();
            collected.add(batch);
            self.show_samples();
            let (script, mut stage) = self.stage();
            script.amid_step(step, &mut stage).await?;
            script.settle(step, &mut stage).await?;
            if self.plan.deterministic {
                continue;
            }
            if self.colocated.is_lent() && received as f64 >= enough {
                self.colocated.take_back(&self.job).await?;
                self.view.update(|n| n.doing = "training while the rest comes".to_owned());
            }
            if !self.colocated.is_lent() {
                self.learn(step, std::mem::take(&mut collected.rest))?;
            }
        }
        if self.colocated.is_lent() {
            self.colocated.take_back(&self.job).await?;
        }
        Ok(collected)
    }

    fn learn(&mut self, step: u64, mut samples: Vec<Trajectory>) -> Result<(), DemoError> {
        samples.retain(|t| !matches!(t.finish, Finish::Abandoned(_)));
        if self.plan.deterministic {
            samples.sort_by(|a, b| (&a.key, a.index).cmp(&(&b.key, b.index)));
        }
        let graded: Vec<_> = samples.into_iter().filter_map(|t| self.plan.grade(step, t)).collect();
        let size = if self.plan.deterministic { FIXED_MICRO_BATCH } else { graded.len().max(1) };
        Ok(self.learner.add(&graded, size)?)
    }

    async fn lend(&mut self) -> Result<(), DemoError> {
        if self.colocated.is_lent() {
            return Ok(());
        }
        let model = self.plan.publish.then(|| self.learner.model());
        Ok(self.colocated.lend(&self.job, model, self.version).await?)
    }

    async fn submit(&mut self, step: u64) -> Result<(), DemoError> {
        if self.submitted < step {
            self.rollouts.submit(step, self.plan.asks(step)).await?;
            self.submitted = step;
        }
        Ok(())
    }

    /// Submits the next step while the optimizer makes its version, so that the spare engines have work; those samples
    /// continue with the new version in the middle.
    async fn submit_ahead(&mut self, step: u64) -> Result<(), DemoError> {
        match step <= self.plan.steps() && !self.plan.deterministic {
            true => self.submit(step).await,
            false => Ok(()),
        }
    }

    async fn publish(&mut self, number: u64) -> Result<(), DemoError> {
        if !self.plan.publish {
            return Ok(());
        }
        let (begun, at_s) = (Instant::now(), self.started.elapsed().as_secs_f64());
        let tensors = self.learner.tensors()?;
        let tensors: Vec<TensorRef<'_>> = tensors.iter().map(NamedTensor::borrow).collect();
        let published = self.job.publish(number, &tensors).await?;
        self.version = published.sealed().await?;
        let (bytes, kept, sealed) = (published.bytes, published.copied_in, begun.elapsed());
        self.published.push(Publication { number, bytes, at_s, kept, sealed });
        Ok(())
    }

    /// Ends the training: waits until the fleet serves the last version, and tells the rest of the script.
    pub async fn finish(&mut self) -> Result<(), DemoError> {
        self.lend().await?;
        let (step, number) = (self.plan.steps(), self.version.number);
        let all = |story: &Story| story.all_serve(number).then_some(());
        let what = format!("every engine serves v{number}");
        // One is enough to evaluate; the report shows who was late.
        if let Err(late) = self.watcher.until(what, ROLLED, all).await {
            self.view.say(&format!("not waited for any longer: {late}"));
        }
        let (script, mut stage) = self.stage();
        Ok(script.settle(step, &mut stage).await?)
    }

    /// Ends the job and every process.
    pub async fn close(self) -> Result<(), DemoError> {
        drop(self.rollouts);
        self.job.close(false).await?;
        Ok(self.cluster.stop().await?)
    }

    fn stage(&mut self) -> (&mut Script, Stage<'_>) {
        let stage = Stage { cluster: &mut self.cluster, watcher: &self.watcher, view: &self.view };
        (&mut self.script, stage)
    }

    fn show_samples(&self) {
        let totals = self.rollouts.book().totals();
        self.view.update(|n| (n.tokens, n.migrations) = (totals.tokens, totals.migrations));
    }

    fn show_step(&self) {
        let Some(last) = self.steps.last() else { return };
        let (reward, exact) = (last.stats.batch.mean_reward(), last.stats.batch.exact_share());
        self.view.update(|n| {
            n.step = last.step;
            n.rewards.push(reward);
        });
        let rate = last.tokens as f64 / last.took.as_secs_f64();
        let migrations = self.rollouts.book().totals().migrations;
        let kl = last.stats.batch.mean_kl();
        self.view.say_plain(&format!(
            "step {}/{}: reward {reward:.3}, exact {exact:.3}, kl {kl:.4}, {rate:.0} tokens/s, {migrations} migrations, {}",
            last.step,
            self.plan.steps(),
            self.watcher.with(crate::progress::fleet),
        ));
    }
}

impl Collected {
    fn add(&mut self, batch: Vec<Trajectory>) {
        self.tokens += batch.iter().map(|t| t.tokens.len() as u64).sum::<u64>();
        self.lag = batch.iter().filter_map(Trajectory::lag).fold(self.lag, u64::max);
        self.rest.extend(batch);
    }
}
