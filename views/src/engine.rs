//! Engines as people see them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use anabranch_proto::{LoadStage, Version};
use serde::{Deserialize, Serialize};

use crate::lenient::Lenient;

/// Counts over all engines, whatever page is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FleetView {
    /// Attachments in the list, with the last 64 that are gone.
    pub engines: usize,
    /// Engines by the name of their state. A state without engines may be missing.
    pub states: BTreeMap<Cow<'static, str>, u32>,
    /// GPUs of the engines that serve.
    pub serving_gpus: u32,
}

/// One attachment of an engine. An engine that left and came back has one for each time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineView {
    /// Name of the engine, stable over restarts.
    pub id: String,
    /// Number of the engine process's life; a restart is a new one.
    pub incarnation: u64,
    /// Number of the attachment; pages are cut by it.
    pub session: u64,
    /// State, with its data in the fields beside it.
    #[serde(flatten)]
    pub state: EngineState,
    /// Version that the engine's weights have; none before its first load and while memory is released.
    pub version: Option<Version>,
    /// The agent's link is open.
    pub connected: bool,
    /// Engine software and version, as the agent reports it.
    pub kind: String,
    /// GPUs of the engine; 0: it runs on a CPU.
    pub gpus: u32,
    /// The engine shares its GPUs with the trainer.
    pub colocated: bool,
    /// Samples placed on the engine now.
    pub running: usize,
    /// Tokens that the placed samples may need at most.
    pub committed_tokens: u64,
    /// Tokens that the KV cache holds.
    pub kv_tokens: u64,
    /// Used part of the KV cache, 0 to 1, as the last beat reported.
    pub kv_used: f32,
    /// Tokens generated since the attachment.
    pub tokens: u64,
    /// Age of the attachment.
    pub joined_ms: u64,
    /// Silence of the agent.
    pub heard_ms: u64,
    /// Load of a version in progress.
    pub load: Option<LoadView>,
    /// Why the last load failed; empty once a load succeeds.
    pub load_error: String,
    /// Versions whose bytes the agent holds and can give to others.
    pub holds: Vec<Version>,
    /// The engine may be taken away at short notice.
    pub preemptible: bool,
    /// Bytes per second that its fetches reached; none before the first measured one.
    pub ingress: Option<u64>,
    /// Bytes per second that it gave to peers; none before the first measured one.
    pub egress: Option<u64>,
    /// A seat is kept free for a suspected poison sample, which runs alone.
    pub reserved: bool,
}

/// State of an engine. `Display` gives the name that stands in the JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum EngineState {
    /// Attached; there is no version to load yet, or no job.
    Joining,
    /// Loads its first version, or the first one after its memory was released.
    Syncing {
        /// Version that is loaded.
        #[serde(default)]
        to: Version,
    },
    /// Generates.
    Serving {
        /// Version of the weights.
        #[serde(default)]
        at: Version,
    },
    /// Replaces its weights; no sample starts meanwhile.
    Updating {
        /// Version that is replaced.
        #[serde(default)]
        from: Version,
        /// Version that is loaded.
        #[serde(default)]
        to: Version,
    },
    /// Silent: gets no new work, and its samples wait for it to come back.
    Suspect {
        /// Reason, for a person.
        #[serde(default)]
        why: String,
    },
    /// The trainer takes the GPU: samples are being moved off.
    Releasing,
    /// The trainer has the GPU.
    Released,
    /// Leaves: samples end or are moved off until a deadline.
    Draining {
        /// Reason, for a person.
        #[serde(default)]
        why: String,
    },
    /// Died too often and must stay away for a while.
    Quarantined,
    /// The attachment is over.
    Gone {
        /// Reason, for a person.
        #[serde(default)]
        why: String,
    },
    /// A state that this version of the reader does not know. No manager sends it.
    #[default]
    #[serde(other)]
    Unknown,
}

/// Load of a version by one engine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadView {
    /// Version that is loaded.
    pub version: Version,
    /// Stage that the load has reached.
    pub stage: Lenient<LoadStage>,
    /// Bytes fetched and verified.
    pub bytes: u64,
    /// Bytes of the version; 0: not known yet.
    pub total: u64,
    /// Time since the order.
    pub ms: u64,
    /// Planned parents, by stripe.
    pub parents: Vec<String>,
    /// Bytes by the holder that gave them.
    pub fetched_from: BTreeMap<String, u64>,
    /// Why the load failed; empty while it has not.
    pub error: String,
}

// === impl EngineState ===

impl EngineState {
    /// Name of the state, as the JSON has it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Syncing { .. } => "syncing",
            Self::Serving { .. } => "serving",
            Self::Updating { .. } => "updating",
            Self::Suspect { .. } => "suspect",
            Self::Releasing => "releasing",
            Self::Released => "released",
            Self::Draining { .. } => "draining",
            Self::Quarantined => "quarantined",
            Self::Gone { .. } => "gone",
            Self::Unknown => "unknown",
        }
    }

    /// Reason of a state that has one; empty for the others.
    pub fn why(&self) -> &str {
        match self {
            Self::Suspect { why } | Self::Draining { why } | Self::Gone { why } => why,
            _ => "",
        }
    }

    /// True for an engine that generates.
    pub fn is_serving(&self) -> bool {
        matches!(self, Self::Serving { .. })
    }

    /// True for an attachment that is over.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }
}

impl fmt::Display for EngineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

// === impl EngineView ===

impl EngineView {
    /// Version for a table; `-` where the engine has none.
    pub fn version_text(&self) -> String {
        self.version.as_ref().map_or_else(|| "-".to_owned(), Version::to_string)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_every_state_is_the_one_in_the_json() {
        let (v, why) = (Version::default(), || "x".to_owned());
        for state in [
            EngineState::Joining,
            EngineState::Syncing { to: v },
            EngineState::Serving { at: v },
            EngineState::Updating { from: v, to: v },
            EngineState::Suspect { why: why() },
            EngineState::Releasing,
            EngineState::Released,
            EngineState::Draining { why: why() },
            EngineState::Quarantined,
            EngineState::Gone { why: why() },
            EngineState::Unknown,
        ] {
            let json = serde_json::to_value(&state).expect("plain data");
            assert_eq!(json["state"], state.name());
            assert_eq!(serde_json::from_value::<EngineState>(json).expect("read"), state);
        }
    }
}
