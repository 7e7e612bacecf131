//! Weight versions as people see them.

use std::collections::BTreeMap;

use anabranch_proto::{LoadStage, Version, VersionState};
use serde::{Deserialize, Serialize};

use crate::lenient::Lenient;

/// One published version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VersionView {
    /// Name of the version.
    pub version: Version,
    /// State of the version.
    pub state: Lenient<VersionState>,
    /// Size of the weights.
    pub bytes: u64,
    /// Every engine that can serve it serves it or a newer one.
    pub settled: bool,
    /// A publisher still serves it.
    pub at_trainer: bool,
    /// Engines by the stage of their load, over the whole fleet, whatever page is shown.
    pub stages: BTreeMap<Lenient<LoadStage>, u32>,
    /// Progress by engine, for the engines of the page.
    pub engines: BTreeMap<String, ProgressView>,
}

/// Progress of one engine with one version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProgressView {
    /// Stage that the load has reached.
    pub stage: Lenient<LoadStage>,
    /// Bytes fetched and verified.
    pub bytes: u64,
    /// Time from the seal to the last report.
    pub since_sealed_ms: u64,
    /// Why the load failed; empty while it has not.
    pub error: String,
    /// Planned parents, by stripe.
    pub parents: Vec<String>,
    /// Bytes by the holder that gave them, once all are here.
    pub fetched_from: BTreeMap<String, u64>,
    /// Bytes given to peers until the engine's own load was done.
    pub served: u64,
}
