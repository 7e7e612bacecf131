//! The separate verifier: recomputes every delivered trajectory from its prompt, its seed, its spans and the digests
//! of the weights. Shares nothing with the manager's ledger but the oracle function, and runs in its own process.
//! Owns the judgement; [`crate::records`] owns the files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use anabranch_proto::pb;
use anabranch_proto::pb::trajectory::Finish;
use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::records::{self, Asked, Files, Job, RecordError, Weights};

mod oracle;
#[cfg(test)]
mod tests;

pub use oracle::{Oracle, Wrong};

/// Largest number of wrong trajectories that are told in words; all are counted.
const EXAMPLES: usize = 20;

/// Flags of `anabranch bench verify`.
#[derive(Clone, Debug, clap::Args)]
pub struct VerifyArgs {
    /// What came back: length-delimited `Trajectory` messages
    #[arg(long)]
    pub trajectories: PathBuf,
    /// What was asked: JSON lines, the job first
    #[arg(long)]
    pub prompts: PathBuf,
    /// Digest of the content of each version: JSON lines
    #[arg(long)]
    pub weights: PathBuf,
    /// Cancelled samples are checked as far as they came, and a sample that never came is no loss
    #[arg(long)]
    pub allow_partial: bool,
}

/// Result of the verifier. If all counts but those of good work are zero, nothing was wrong.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Samples asked for.
    pub samples_asked: u64,
    /// Samples that are complete and right in every token.
    pub samples_verified: u64,
    /// Samples that the trainer cancelled and that are right as far as they came; only with `allow_partial`.
    pub samples_partial: u64,
    /// Tokens of these samples.
    pub verified_tokens: u64,
    /// Samples asked for and never delivered complete.
    pub lost: u64,
    /// Trajectories of a sample that had come before.
    pub duplicated: u64,
    /// Trajectories with anything wrong in them.
    pub provenance_errors: u64,
    /// Wrong trajectories by kind of the error.
    pub errors_by_kind: BTreeMap<String, u64>,
    /// Some of the wrong trajectories, in words.
    pub examples: Vec<String>,
    /// Tokens that the manager says it threw away by restarting samples from their prompts.
    pub regenerated_tokens: u64,
    /// Seams between spans at which a sample continued on another engine, or in another life of the same.
    pub migrations: u64,
    /// Placements beyond the first of each sample, by the manager's count.
    pub extra_placements: u64,
    /// Verified tokens by number of the version that made them.
    pub tokens_by_version: BTreeMap<u64, u64>,
    /// Verified tokens by engine, over all its lives.
    pub tokens_by_engine: BTreeMap<String, u64>,
    /// Lives of engines that made verified tokens.
    pub engine_lives: u64,
}

/// Runs `anabranch bench verify`: prints the verdict as JSON; true if nothing was wrong.
#[allow(clippy::print_stdout)]
pub fn print(args: &VerifyArgs) -> anyhow::Result<bool> {
    let verdict = run(args)?;
    println!("{}", serde_json::to_string_pretty(&verdict)?);
    Ok(verdict.is_clean())
}

/// Reads the three files and judges them. Fails if a file cannot be read; wrong content is a verdict.
pub fn run(args: &VerifyArgs) -> Result<Verdict, RecordError> {
    let (job, asked) = records::read_prompts(&args.prompts)?;
    let weights = records::read_weights(&args.weights)?;
    let trajectories = records::read_trajectories(&args.trajectories)?;
    Ok(judge(&job, &asked, &weights, &trajectories, args.allow_partial))
}

/// Starts this binary as `bench verify` and reads its verdict. Wrong content is a verdict, not an error.
pub async fn in_a_process(files: &Files, more: &[&str]) -> anyhow::Result<Verdict> {
    let mut command = Command::new(std::env::current_exe().context("finding this program")?);
    command.args(["bench", "verify", "--trajectories"]).arg(&files.trajectories);
    command.arg("--prompts").arg(&files.prompts).arg("--weights").arg(&files.weights).args(more);
    let output =
        tokio::process::Command::from(command).output().await.context("starting the verifier")?;
    serde_json::from_slice(&output.stdout).with_context(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        format!("the verifier ended with {} and said: {said}", output.status)
    })
}

/// Judges what came back. `allow_partial`: a cancelled sample is checked as far as it came, and is not lost.
pub fn judge(
    job: &Job,
    asked: &[Asked],
    weights: &[Weights],
    trajectories: &[pb::Trajectory],
    allow_partial: bool,
) -> Verdict {
    let mut judge = Judge {
        oracle: Oracle::new(job, weights),
        asked: asked.iter().map(|a| (a.key.as_str(), a)).collect(),
        seen: BTreeSet::new(),
        complete: 0,
        lives: BTreeSet::new(),
        verdict: Verdict::default(),
    };
    for trajectory in trajectories {
        judge.take(trajectory, allow_partial);
    }
    judge.conclude(asked, allow_partial)
}

struct Judge<'a> {
    oracle: Oracle,
    asked: BTreeMap<&'a str, &'a Asked>,
    seen: BTreeSet<(&'a str, u32)>,
    /// Trajectories with a finish of their own, right or wrong.
    complete: u64,
    lives: BTreeSet<(String, u64)>,
    verdict: Verdict,
}

impl Verdict {
    /// True if nothing was lost, duplicated or wrong.
    pub fn is_clean(&self) -> bool {
        self.lost == 0 && self.duplicated == 0 && self.provenance_errors == 0
    }
}

impl<'a> Judge<'a> {
    fn take(&mut self, t: &pb::Trajectory, allow_partial: bool) {
        let asked = self.asked.get(t.key.as_str()).copied().filter(|asked| t.index < asked.n);
        let Some(asked) = asked else { return self.wrong(t, &Wrong::Foreign) };
        if !self.seen.insert((&asked.key, t.index)) {
            self.verdict.duplicated += 1;
            return;
        }
        self.verdict.regenerated_tokens += u64::from(t.discarded_tokens);
        self.verdict.extra_placements += u64::from(t.attempts.saturating_sub(1));
        match t.finish() {
            Finish::Stop | Finish::Length => self.complete += 1,
            Finish::Cancelled if allow_partial => {}
            // Counted as lost: it was asked for and did not come complete.
            Finish::Cancelled | Finish::Abandoned | Finish::Unspecified => {
                let why = format!(
                    "{}/{} came back {:?}: {}",
                    t.key,
                    t.index,
                    t.finish(),
                    t.finish_detail
                );
                return self.example(why);
            }
        }
        match self.oracle.check(asked, t) {
            Ok(()) => self.count(t),
            Err(wrong) => self.wrong(t, &wrong),
        }
    }

    fn count(&mut self, t: &pb::Trajectory) {
        match t.finish() {
            Finish::Cancelled => self.verdict.samples_partial += 1,
            _ => self.verdict.samples_verified += 1,
        }
        let mut before = None;
        for span in &t.spans {
            let (Some(engine), Some(version)) = (&span.engine, &span.version) else { continue };
            let life = (engine.id.clone(), engine.incarnation);
            let tokens = u64::from(span.len);
            self.verdict.verified_tokens += tokens;
            *self.verdict.tokens_by_version.entry(version.number).or_default() += tokens;
            *self.verdict.tokens_by_engine.entry(engine.id.clone()).or_default() += tokens;
            self.verdict.migrations += u64::from(before.as_ref().is_some_and(|b| *b != life));
            self.lives.insert(life.clone());
            before = Some(life);
        }
    }

    fn wrong(&mut self, t: &pb::Trajectory, wrong: &Wrong) {
        self.verdict.provenance_errors += 1;
        *self.verdict.errors_by_kind.entry(wrong.kind().to_owned()).or_default() += 1;
        self.example(format!("{}/{}: {wrong}", t.key, t.index));
    }

    fn example(&mut self, text: String) {
        if self.verdict.examples.len() < EXAMPLES {
            self.verdict.examples.push(text);
        }
    }

    fn conclude(mut self, asked: &[Asked], allow_partial: bool) -> Verdict {
        let total: u64 = asked.iter().map(|a| u64::from(a.n)).sum();
        self.verdict.samples_asked = total;
        self.verdict.engine_lives = self.lives.len() as u64;
        if !allow_partial {
            self.verdict.lost = total.saturating_sub(self.complete);
            self.name_the_missing(asked);
        }
        self.verdict
    }

    fn name_the_missing(&mut self, asked: &[Asked]) {
        let mut missing = Vec::new();
        for group in asked {
            missing.extend(
                (0..group.n)
                    .filter(|&index| !self.seen.contains(&(group.key.as_str(), index)))
                    .map(|index| format!("{}/{index} never came", group.key)),
            );
        }
        missing.into_iter().for_each(|text| self.example(text));
    }
}
