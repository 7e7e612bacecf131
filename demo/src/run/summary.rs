//! The summary of a run: facts gathered from the book, the manager's story and the engines' own counts, put into the
//! report's form, and a few lines for a person.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::{DemoError, Publication, Session, StepRecord};
use crate::cluster::{Dirs, tokens_made};
use crate::report::{CurvePoint, EngineRow, PhaseSpan, Report, Verdict, VersionRow};
use crate::watch::{EngineStory, Story, VersionStory};

const ALGORITHM: &str = "GRPO with process supervision: a token is compared with its siblings' tokens \
                         at the same position";
const ALGORITHM_OUTCOME: &str = "GRPO: an answer is compared with its siblings' answers";

/// Tokens that an engine makes for one probe of its agent; they belong to no sample.
const PROBE_TOKENS: u64 = 8;

/// Result of the demo, for its caller.
#[derive(Debug, Clone, PartialEq)]
pub struct DemoOutcome {
    /// All facts of the run.
    pub report: Report,
    /// Content of `report.json`.
    pub json: String,
    /// A few lines for a person.
    pub text: String,
    /// True if nothing was lost and nothing came twice.
    pub kept_promises: bool,
}

/// Makes the report of a session whose processes still run.
pub fn gather(session: &Session, warmup_s: f64, exact: (f64, f64)) -> Report {
    let (plan, book) = (&session.plan, session.rollouts.book());
    let (story, totals) = (session.watcher.with(Story::clone), book.totals());
    let wall_s = session.started.elapsed().as_secs_f64();
    let outcome_only = plan.recipe.grpo.process_weight == 0.0;
    let mut complaints = story.complaints.clone();
    if story.missed_events > 0 {
        complaints.push(format!("{} of the manager's events were missed", story.missed_events));
    }
    for cue in session.script.left() {
        complaints.push(format!("{} had no step {} to act in", cue.engine, cue.step));
    }
    Report {
        seed: plan.seed,
        task: plan.task.name().to_owned(),
        algorithm: if outcome_only { ALGORITHM_OUTCOME } else { ALGORITHM }.to_owned(),
        deterministic: plan.deterministic,
        publishing: plan.publish,
        wall_s,
        warmup_s,
        steps: session.steps.len() as u64,
        exact_before: exact.0,
        exact_after: exact.1,
        trajectories: totals.trajectories,
        tokens: totals.tokens,
        migrations: totals.migrations,
        lost: book.lost(),
        duplicated: book.duplicated(),
        discarded_tokens: discarded(&story, &totals.tokens_by_engine, session.cluster.dirs()),
        across_engines: totals.across_engines,
        across_versions: totals.across_versions,
        mode_switches: session.colocated.switches(),
        digest: book.digest(),
        engines: engines(&story, &totals.tokens_by_engine, wall_s),
        versions: versions(&session.published, &story.versions),
        curve: session.steps.iter().map(point).collect(),
        story: session.script.told().to_vec(),
        complaints,
    }
}

/// Tokens that our engines made for samples and that were never received. Engines of others have no count.
fn discarded(story: &Story, received: &BTreeMap<String, u64>, dirs: &Dirs) -> u64 {
    let of_engine = |(id, engine): (&String, &EngineStory)| {
        let wanted = received.get(id).copied().unwrap_or(0) + engine.probes * PROBE_TOKENS;
        tokens_made(dirs, id).map_or(0, |made| made.saturating_sub(wanted))
    };
    story.engines.iter().map(of_engine).sum()
}

fn engines(story: &Story, tokens: &BTreeMap<String, u64>, wall_s: f64) -> Vec<EngineRow> {
    let row = |(id, engine): (&String, &EngineStory)| EngineRow {
        id: id.clone(),
        joined_s: engine.joined_s,
        left_s: engine.left.as_ref().map(|(at_s, _)| *at_s),
        why: engine.left.as_ref().map(|(_, why)| why.clone()),
        tokens: tokens.get(id).copied().unwrap_or(0),
        colocated: engine.colocated,
        phases: phases(engine, wall_s),
    };
    story.engines.iter().map(row).collect()
}

/// The phases of an engine: each lasts until the next, the last one until the engine left or the run ended.
fn phases(engine: &EngineStory, wall_s: f64) -> Vec<PhaseSpan> {
    let end = engine.left.as_ref().map_or(wall_s, |(at_s, _)| *at_s);
    let ends = engine.phases.iter().skip(1).map(|(at_s, _)| *at_s).chain([end]);
    let span = |((from_s, phase), to_s): (&(f64, crate::report::Phase), f64)| PhaseSpan {
        from_s: *from_s,
        to_s: to_s.max(*from_s),
        phase: *phase,
    };
    engine.phases.iter().zip(ends).map(span).collect()
}

fn versions(published: &[Publication], story: &BTreeMap<u64, VersionStory>) -> Vec<VersionRow> {
    let row = |publication: &Publication| {
        let active = story.get(&publication.number).map(|version| &version.active_s);
        let since = |(id, at_s): (&String, &f64)| (id.clone(), at_s - publication.at_s);
        VersionRow {
            version: publication.number,
            bytes: publication.bytes,
            published_at_s: publication.at_s,
            publish_s: publication.kept.as_secs_f64(),
            active_s: active.into_iter().flatten().map(since).collect(),
        }
    };
    published.iter().map(row).collect()
}

fn point(step: &StepRecord) -> CurvePoint {
    let batch = &step.stats.batch;
    CurvePoint {
        step: step.step,
        t_s: step.ended_s,
        reward: batch.mean_reward(),
        exact: batch.exact_share(),
        tokens_per_s: step.tokens as f64 / step.took.as_secs_f64().max(1e-3),
        samples: batch.samples as u64,
        microbatches: batch.micro_batches as u64,
        lag: step.lag,
    }
}

/// Writes the report's files and makes the outcome.
pub fn conclude(report: Report, dirs: &Dirs) -> Result<DemoOutcome, DemoError> {
    report.write(dirs.report()).map_err(|(path, source)| DemoError::Write { path, source })?;
    Ok(DemoOutcome {
        json: report.to_json().trim_end().to_owned(),
        text: text(&report, dirs),
        kept_promises: report.verdict() == Verdict::Kept,
        report,
    })
}

fn text(report: &Report, dirs: &Dirs) -> String {
    let r = report;
    let mut text = String::new();
    let mut line =
        |text_of: String| writeln!(text, "{text_of}").expect("a String takes everything");
    line(String::new());
    line(format!(
        "{} steps in {:.0} s ({:.0} s of it warm-up), seed {}, task {}",
        r.steps, r.wall_s, r.warmup_s, r.seed, r.task
    ));
    line(format!("  held-out exact match   {:.3} -> {:.3}", r.exact_before, r.exact_after));
    line(format!("  trajectories           {} ({} tokens)", r.trajectories, r.tokens));
    line(format!("  lost / duplicated      {} / {}", r.lost, r.duplicated));
    line(format!(
        "  went on elsewhere      {} times; {} trajectories carry tokens of several engines, {} of \
         several versions",
        r.migrations, r.across_engines, r.across_versions
    ));
    line(format!("  made, never received   {} tokens", r.discarded_tokens));
    line(format!(
        "  versions published     {}, {} mode switches",
        r.versions.len(),
        r.mode_switches
    ));
    if r.deterministic {
        line(format!("  digest                 {}", r.digest));
    }
    for complaint in &r.complaints {
        line(format!("  note: {complaint}"));
    }
    text + &format!("  report                 {}", dirs.report().join("report.html").display())
}
