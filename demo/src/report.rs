//! The results of a run: `report.json` for scripts, `report.html` for people.
//!
//! Owns the schema and the two files. Gathers nothing and judges nothing but [`Report::verdict`].

mod charts;
mod html;
mod prose;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use html::render;

/// All facts of a run, as `report.json` holds them. Times are seconds; `*_s` of events count from the demo's start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Seed of weights, problems and sampling.
    pub seed: u64,
    /// Name of the task.
    pub task: String,
    /// The learning rule in words.
    pub algorithm: String,
    /// True if the run was the deterministic one: no kills, on-policy, whole groups.
    pub deterministic: bool,
    /// True if versions were published; false for the control, whose engines keep version 0.
    pub publishing: bool,
    /// Duration of the whole run.
    pub wall_s: f64,
    /// Duration of the supervised warm-up.
    pub warmup_s: f64,
    /// Optimizer steps that were made.
    pub steps: u64,
    /// Share of held-out problems that are answered exactly (greedy), before RL.
    pub exact_before: f64,
    /// Share of held-out problems that are answered exactly (greedy), after RL.
    pub exact_after: f64,
    /// Samples that came back, each counted once.
    pub trajectories: u64,
    /// Tokens of these trajectories.
    pub tokens: u64,
    /// Times that a sample continued on another engine.
    pub migrations: u64,
    /// Samples that were asked for and did not come back whole.
    pub lost: u64,
    /// Samples that came more than once, or were never asked for.
    pub duplicated: u64,
    /// Tokens that an engine made for samples and that were never received.
    pub discarded_tokens: u64,
    /// Trajectories whose tokens come from more than one engine.
    pub across_engines: u64,
    /// Trajectories whose tokens come from more than one weight version.
    pub across_versions: u64,
    /// Mode switches of the colocated engine, in both directions.
    pub mode_switches: u64,
    /// BLAKE3 digest of all trajectories, in hexadecimal; equal for two deterministic runs with one seed.
    pub digest: String,
    /// The engines, by id.
    pub engines: Vec<EngineRow>,
    /// The published versions, by number.
    pub versions: Vec<VersionRow>,
    /// The steps in their order.
    pub curve: Vec<CurvePoint>,
    /// Events that the script caused, in their order.
    pub story: Vec<Happening>,
    /// Things that should not have happened, in the words that the user saw.
    pub complaints: Vec<String>,
}

/// One engine's life.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineRow {
    /// The engine's id.
    pub id: String,
    /// Time at which the engine attached.
    pub joined_s: f64,
    /// Time at which the engine left; `None` if it was there at the end.
    pub left_s: Option<f64>,
    /// Reason why the engine left.
    pub why: Option<String>,
    /// Tokens received from the engine.
    pub tokens: u64,
    /// True if the engine runs on the trainer's GPU.
    pub colocated: bool,
    /// The engine's phases in their order, without gaps.
    pub phases: Vec<PhaseSpan>,
}

/// One phase of an engine with its begin and end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseSpan {
    /// Begin of the phase.
    pub from_s: f64,
    /// End of the phase.
    pub to_s: f64,
    /// The phase.
    #[serde(flatten)]
    pub phase: Phase,
}

/// State of an engine during a part of its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// Attached, not serving yet.
    Joining,
    /// Serving a weight version.
    Serving { version: u64 },
    /// Stopped to load a weight version.
    Loading { version: u64 },
    /// Taken back by the trainer, memory released.
    Released,
    /// Lost its link; may still come back.
    Suspect,
    /// Leaving: takes no new samples.
    Draining,
}

/// One published weight version.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VersionRow {
    /// The version's number.
    pub version: u64,
    /// Size of the version's tensors in bytes.
    pub bytes: u64,
    /// Time at which the publication began.
    pub published_at_s: f64,
    /// Time that the publication kept the trainer waiting.
    pub publish_s: f64,
    /// Time from the begin of the publication until the engine served the version, by engine.
    pub active_s: BTreeMap<String, f64>,
}

/// Figures of one optimizer step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Number of the step, from 1.
    pub step: u64,
    /// Time at which the step ended.
    pub t_s: f64,
    /// Mean reward of the step's samples.
    pub reward: f64,
    /// Share of the step's samples that were right as a whole.
    pub exact: f64,
    /// Tokens of the step's samples, divided by the duration of the step.
    pub tokens_per_s: f64,
    /// Samples of the step.
    pub samples: u64,
    /// Micro-batches of the step.
    pub microbatches: u64,
    /// Largest lag of a token in the step, in versions.
    pub lag: u64,
}

/// One event of the script's engines, as the user was told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Happening {
    /// Time of the event.
    pub at_s: f64,
    /// Kind of the event.
    pub kind: HappeningKind,
    /// The engine concerned, if it is one engine.
    pub engine: Option<String>,
    /// The event in words.
    pub text: String,
}

/// Kind of an event, for its mark in the charts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HappeningKind {
    /// An engine serves for the first time.
    Joined,
    /// An engine was killed.
    Killed,
    /// An engine began to drain.
    Drained,
    /// Any other event.
    Note,
}

/// True if the run kept the promise of exactly-once delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every sample came back exactly once.
    Kept,
    /// Samples were lost or came twice.
    Broken,
}

impl Report {
    /// Judges the run by its lost and duplicated samples.
    pub fn verdict(&self) -> Verdict {
        match (self.lost, self.duplicated) {
            (0, 0) => Verdict::Kept,
            _ => Verdict::Broken,
        }
    }

    /// The content of `report.json`.
    pub fn to_json(&self) -> String {
        let json = serde_json::to_string_pretty(self).expect("a report has only string keys");
        json + "\n"
    }

    /// Writes `report.json` and `report.html` into `dir`; an error names the file that could not be written.
    pub fn write(&self, dir: &Path) -> Result<(), (PathBuf, std::io::Error)> {
        let put = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).map_err(|source| (path, source))
        };
        put("report.json", self.to_json())?;
        put("report.html", render(self))
    }
}

#[cfg(test)]
mod tests;
