//! What a run leaves behind: `report.json` for scripts, `report.html` for people.
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

/// All times in seconds; `*_s` of happenings count from the demo's start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub seed: u64,
    pub task: String,
    /// The learning rule, named as what it is.
    pub algorithm: String,
    pub deterministic: bool,
    /// False for the control, whose engines keep version 0.
    pub publishing: bool,
    pub wall_s: f64,
    pub warmup_s: f64,
    pub steps: u64,
    /// Held-out greedy exact match before RL and after.
    pub exact_before: f64,
    pub exact_after: f64,
    pub trajectories: u64,
    pub tokens: u64,
    /// Times that a sample went on on another engine.
    pub migrations: u64,
    pub lost: u64,
    pub duplicated: u64,
    /// Made by an engine, never received.
    pub discarded_tokens: u64,
    /// Trajectories whose tokens come from more than one engine, or version.
    pub across_engines: u64,
    pub across_versions: u64,
    pub mode_switches: u64,
    pub digest: String,
    pub engines: Vec<EngineRow>,
    pub versions: Vec<VersionRow>,
    pub curve: Vec<CurvePoint>,
    pub story: Vec<Happening>,
    /// What should not have happened, as it was told.
    pub complaints: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineRow {
    pub id: String,
    pub joined_s: f64,
    pub left_s: Option<f64>,
    /// Why it left.
    pub why: Option<String>,
    /// Received from it.
    pub tokens: u64,
    pub colocated: bool,
    pub phases: Vec<PhaseSpan>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseSpan {
    pub from_s: f64,
    pub to_s: f64,
    #[serde(flatten)]
    pub phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    Joining,
    Serving { version: u64 },
    Loading { version: u64 },
    Released,
    Suspect,
    Draining,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VersionRow {
    pub version: u64,
    pub bytes: u64,
    /// When its publication began.
    pub published_at_s: f64,
    /// How long the trainer was kept by it.
    pub publish_s: f64,
    /// Time between the beginning of the publication and serving the version, by engine.
    pub active_s: BTreeMap<String, f64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    pub step: u64,
    /// When the step ended.
    pub t_s: f64,
    pub reward: f64,
    /// Share of the step's samples that were right as a whole.
    pub exact: f64,
    /// Tokens of the step's samples over the step's time.
    pub tokens_per_s: f64,
    pub samples: u64,
    pub microbatches: u64,
    /// Largest lag of a token in the step, in versions.
    pub lag: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Happening {
    pub at_s: f64,
    pub kind: HappeningKind,
    pub engine: Option<String>,
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HappeningKind {
    Joined,
    Killed,
    Drained,
    Note,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every sample came back exactly once.
    Kept,
    /// Samples were lost or came twice.
    Broken,
}

impl Report {
    pub fn verdict(&self) -> Verdict {
        match (self.lost, self.duplicated) {
            (0, 0) => Verdict::Kept,
            _ => Verdict::Broken,
        }
    }

    pub fn to_json(&self) -> String {
        let json = serde_json::to_string_pretty(self).expect("a report has only string keys");
        json + "\n"
    }

    /// Writes `report.json` and `report.html`; on failure says which file.
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
