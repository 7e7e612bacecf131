//! The manager's state as far as the command line shows it. Fields that a manager of another version
//! lacks are empty, ones that it has more of are passed over: a viewer must not break on either.

use std::collections::BTreeMap;

use serde::Deserialize;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct State {
    pub uptime_ms: u64,
    pub job: Option<Job>,
    pub current: Version,
    pub pending: Option<Version>,
    pub training: bool,
    pub engines: Vec<Engine>,
    pub versions: Vec<VersionRow>,
    pub steps: Vec<Step>,
    pub samples: Samples,
    pub queue: Queue,
    pub counters: Counters,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Version {
    pub epoch: u32,
    pub number: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Job {
    pub name: String,
    pub epoch: u32,
    pub trainers: usize,
    pub paused: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Engine {
    pub id: String,
    pub state: String,
    /// Of a state that has one: why it is suspect, draining or gone.
    pub why: String,
    pub version: Option<Version>,
    pub kind: String,
    pub gpus: u32,
    pub colocated: bool,
    pub running: usize,
    pub kv_used: f32,
    pub tokens: u64,
    pub heard_ms: u64,
    pub load: Option<Load>,
    /// Why the last load failed, until one succeeds.
    pub load_error: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Load {
    pub version: Version,
    pub stage: String,
    pub bytes: u64,
    pub total: u64,
    pub ms: u64,
    pub error: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct VersionRow {
    pub version: Version,
    pub state: String,
    pub bytes: u64,
    pub settled: bool,
    pub at_trainer: bool,
    pub engines: BTreeMap<String, OnEngine>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct OnEngine {
    pub stage: String,
    pub bytes: u64,
    pub since_sealed_ms: u64,
    pub error: String,
    /// Planned, by stripe.
    pub parents: Vec<String>,
    /// Holder -> bytes, once all is here.
    pub fetched_from: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Step {
    pub step: u64,
    pub is_final: bool,
    pub over: bool,
    pub groups: usize,
    pub open_groups: u32,
    pub delivered: u64,
    pub tokens: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Samples {
    pub waiting: u64,
    pub running: u64,
    pub finished: u64,
    pub delivered: u64,
    pub abandoned: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Queue {
    pub resumed: usize,
    pub fresh: usize,
    pub held: usize,
    pub blocked: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Counters {
    pub tokens: u64,
    pub delivered: u64,
    pub migrations: u64,
    pub engine_deaths: u64,
    pub regenerated_tokens: u64,
}

// === impl Version ===

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.epoch {
            0 => write!(f, "v{}", self.number),
            epoch => write!(f, "v{}@{epoch}", self.number),
        }
    }
}

// === impl Engine ===

impl Engine {
    pub fn version_text(&self) -> String {
        self.version.as_ref().map_or_else(|| "-".to_owned(), Version::to_string)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_of_another_manager_version_is_read_as_far_as_it_goes() {
        let text = r#"{"uptime_ms": 5, "novelty": {"a": 1}, "current": {"epoch": 2, "number": 7, "root": "00"},
            "engines": [{"id": "e1", "state": "updating", "from": {}, "to": {}, "version": null, "running": 3}],
            "versions": [{"version": {"number": 7}, "state": "current", "engines": {"e1": {"stage": "loading"}}}]}"#;
        let state: State = serde_json::from_str(text).expect("read");
        assert_eq!(state.current.to_string(), "v7@2");
        assert_eq!((state.engines[0].state.as_str(), state.engines[0].running), ("updating", 3));
        assert_eq!(state.versions[0].engines["e1"].stage, "loading");
        assert!(serde_json::from_str::<State>("{}").is_ok());
    }
}
