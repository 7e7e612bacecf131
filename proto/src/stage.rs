//! Stages of a weight version: one engine's way through a load, and the version's own states.

use serde::{Deserialize, Serialize};

use crate::invalid::Invalid;
use crate::pb;
use crate::wire_enum::words;

/// Stage that an engine has reached with a weight version.
///
/// ```text
/// Ordered ─▶ Fetching ─▶ Staged ─▶ Quiescing ─▶ Loading ─▶ Probing ─▶ Active
///     └──────────┴──────────┴──────────┴───────────┴──────────┴─▶ Failed
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadStage {
    /// The manager sent the order; the agent has not reported yet. Never on an agent's stream.
    Ordered,
    /// Chunks come in.
    Fetching,
    /// Every chunk is verified and the root is sealed; the engine does not know it yet.
    Staged,
    /// Running samples end, pause or move; the engine takes no new ones from here.
    Quiescing,
    /// The engine reads the weights.
    Loading,
    /// A probe compares the engine's log-probabilities.
    Probing,
    /// The engine serves the version.
    Active,
    /// The load was given up; the engine serves what it served before.
    Failed,
}

/// State of a weight version.
///
/// ```text
/// Announced ──seal──▶ Available ──(nobody is made too old)──▶ Current ──next──▶ Superseded ──no holder──▶ Retired
///                         └─────────────── a newer one is current ─────────────────▲
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VersionState {
    /// The trainer publishes it; its root is not known yet.
    Announced,
    /// The root is sealed and engines may load the version. The version becomes current when it makes
    /// no unfinished group too old.
    Available,
    /// New groups are measured against it.
    Current,
    /// A newer version is current.
    Superseded,
    /// No holder of its bytes is left.
    Retired,
}

impl VersionState {
    /// True for the edges of the graph above.
    pub const fn may_become(self, to: Self) -> bool {
        matches!(
            (self, to),
            (Self::Announced, Self::Available)
                | (Self::Available, Self::Current | Self::Superseded)
                | (Self::Current, Self::Superseded)
                | (Self::Superseded, Self::Retired)
        )
    }
}

words!(LoadStage, "stage", {
    Ordered => "ordered", Fetching => "fetching", Staged => "staged", Quiescing => "quiescing",
    Loading => "loading", Probing => "probing", Active => "active", Failed => "failed",
});
words!(VersionState, "state", {
    Announced => "announced", Available => "available", Current => "current",
    Superseded => "superseded", Retired => "retired",
});

// === impl LoadStage ===

impl LoadStage {
    /// True for the two stages that end a load.
    pub const fn is_end(self) -> bool {
        matches!(self, Self::Active | Self::Failed)
    }

    /// Reads the stage that an agent reports in `field`.
    pub fn from_wire(field: &str, code: i32) -> Result<Self, Invalid> {
        use pb::load_state::Stage as Code;
        match Code::try_from(code) {
            Ok(Code::Fetching) => Ok(Self::Fetching),
            Ok(Code::Staged) => Ok(Self::Staged),
            Ok(Code::Quiescing) => Ok(Self::Quiescing),
            Ok(Code::Loading) => Ok(Self::Loading),
            Ok(Code::Probing) => Ok(Self::Probing),
            Ok(Code::Active) => Ok(Self::Active),
            Ok(Code::Failed) => Ok(Self::Failed),
            Ok(Code::Unspecified) | Err(_) => {
                let known: Vec<&str> = Self::ALL[1..].iter().map(|stage| stage.name()).collect();
                Err(Invalid::unknown(field, code, &known))
            }
        }
    }
}

impl From<LoadStage> for pb::load_state::Stage {
    /// `Ordered` has no code: agents never report it.
    fn from(stage: LoadStage) -> Self {
        match stage {
            LoadStage::Ordered => Self::Unspecified,
            LoadStage::Fetching => Self::Fetching,
            LoadStage::Staged => Self::Staged,
            LoadStage::Quiescing => Self::Quiescing,
            LoadStage::Loading => Self::Loading,
            LoadStage::Probing => Self::Probing,
            LoadStage::Active => Self::Active,
            LoadStage::Failed => Self::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_but_ordered_goes_over_the_wire_and_back() {
        for stage in &LoadStage::ALL[1..] {
            let code = pb::load_state::Stage::from(*stage);
            assert_eq!(LoadStage::from_wire("stage", code.into()), Ok(*stage));
        }
        let unset = pb::load_state::Stage::from(LoadStage::Ordered);
        assert!(LoadStage::from_wire("stage", unset.into()).is_err());
        let error = LoadStage::from_wire("load_state.stage", 99).expect_err("unknown").to_string();
        assert!(error.starts_with("load_state.stage: 99 is unknown: fetching, "), "{error}");
    }
}
