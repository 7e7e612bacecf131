//! State of an engine's session.
//!
//! ```text
//!              order          loaded, probed            quiescing
//! Joining ────────────▶ Syncing{to} ──────▶ Serving{at} ◀────────▶ Updating{from,to}
//!                          ▲                   │  │        active / failed
//!                          │ resume            │  └─ release ─▶ Releasing ─▶ Released ─┐
//!                          └───────────────────┼──────────────────────────────────────┘
//!        link lost, lease over                 ▼
//!  (any state above) ──────▶ Suspect{why} ──heard again──▶ the state that the loaded version proves
//!                               │ grace over        drain ─▶ Draining{why} ─▶ Gone{why}
//!                               ▼                            too many deaths ─▶ Quarantined ─▶ Gone{why}
//!                             Gone{why}
//! ```

use anabranch_proto::Version;

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum EngineState {
    /// Attached; no version to load yet, or no job.
    Joining,
    Syncing {
        to: Version,
    },
    Serving {
        at: Version,
    },
    /// Loads `to`: the engine is given no sample until the load has ended.
    Updating {
        from: Version,
        to: Version,
    },
    /// Link lost or lease over: no new work, samples wait for `reattach_grace`.
    Suspect {
        why: String,
    },
    /// Mode switch: the engine's samples are being aborted.
    Releasing,
    /// The GPU belongs to the trainer now; the engine comes back through Syncing.
    Released,
    Draining {
        why: String,
    },
    /// Died too often; may attach again when the quarantine is over.
    Quarantined,
    Gone {
        why: String,
    },
}

impl EngineState {
    /// One value of each state.
    pub(crate) fn all() -> [Self; 10] {
        let (v, why) = (Version::default(), String::new);
        [
            Self::Joining,
            Self::Syncing { to: v },
            Self::Serving { at: v },
            Self::Updating { from: v, to: v },
            Self::Suspect { why: why() },
            Self::Releasing,
            Self::Released,
            Self::Draining { why: why() },
            Self::Quarantined,
            Self::Gone { why: why() },
        ]
    }

    /// The graph above.
    pub fn may_become(&self, to: &Self) -> bool {
        use EngineState::*;
        match (self, to) {
            (Gone { .. }, Quarantined) | (Quarantined | Draining { .. }, Gone { .. }) => true,
            (Gone { .. } | Quarantined | Draining { .. }, _) => false,
            (Releasing, Releasing) => false,
            (_, Gone { .. } | Draining { .. } | Releasing) => true,
            (Suspect { .. }, Suspect { .. }) => false,
            (_, Suspect { .. }) => true,
            (Joining | Syncing { .. } | Serving { .. } | Suspect { .. }, Syncing { .. }) => true,
            (Updating { .. } | Released, Syncing { .. }) => true,
            (Releasing | Suspect { .. }, Released) => true,
            (Serving { .. }, Updating { .. }) => true,
            (Releasing | Released, _) => false,
            (_, Serving { .. }) => true,
            _ => false,
        }
    }

    /// True in the states from which the job may set the engine to work: attached, and not leaving.
    pub fn is_live(&self) -> bool {
        matches!(
            self,
            Self::Joining
                | Self::Syncing { .. }
                | Self::Serving { .. }
                | Self::Updating { .. }
                | Self::Suspect { .. }
        )
    }

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
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_graph_has_these_edges_and_no_others() {
        let states = EngineState::all();
        let line = |from: &EngineState| {
            let to = states.iter().filter(|to| from.may_become(to)).map(|to| to.name());
            format!("{}: {}", from.name(), to.collect::<Vec<_>>().join(" "))
        };
        let graph: Vec<String> = states.iter().map(line).collect();
        assert_eq!(
            graph,
            [
                "joining: syncing serving suspect releasing draining gone",
                "syncing: syncing serving suspect releasing draining gone",
                "serving: syncing serving updating suspect releasing draining gone",
                "updating: syncing serving suspect releasing draining gone",
                "suspect: syncing serving releasing released draining gone",
                "releasing: suspect released draining gone",
                "released: syncing suspect releasing draining gone",
                "draining: gone",
                "quarantined: gone",
                "gone: quarantined",
            ]
        );
    }
}
