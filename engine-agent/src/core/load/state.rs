//! The states of a load. Pure.

use super::order::LoadOrder;
use crate::core::event::StagedVersion;

/// Progress of the engine's weights from one version to the next.
///
/// ```text
///            order              verified             streams quiet         paused
///   Active ────────► Fetching ───────────► Quiescing ─────────────► Pausing ─────► Loading
///     ▲ ▲               │ failed               │ gave up               │ failed       │  │ loaded
///     │ └───────────────┴──────────────────────┘                       │              │  ▼
///     │                                            ┌───────────────────┴─── failed ───┘ Continuing
///     │                                            ▼                                     │ continued
///     ├──────────────── continued ─────────── Restoring ◄──────── disagrees ───────── Probing
///     └────────────────────────────────────────────────────────── agrees ──────────────┘
/// ```
///
/// Any state becomes `Active` when the engine dies, and when the agent stops because nobody vouches
/// for the engine's weights.
#[derive(Clone, Debug, Default)]
pub enum LoadState {
    /// No load is under way.
    #[default]
    Active,
    /// The version is being fetched and verified; the engine is not disturbed.
    Fetching(LoadOrder),
    /// The version is on this host; streams are ending.
    Quiescing(LoadOrder, StagedVersion),
    /// The engine was told to pause.
    Pausing(LoadOrder, StagedVersion),
    /// The engine was told to load.
    Loading(LoadOrder, StagedVersion),
    /// The engine has the new weights and was told to continue; what it generates is withheld.
    Continuing(LoadOrder, StagedVersion),
    /// The probe runs; what the engine generates is withheld.
    Probing(LoadOrder, StagedVersion),
    /// The engine is brought back to the old version.
    Restoring {
        /// The load that failed.
        order: LoadOrder,
        /// Reason of the failure, reported once the engine continues.
        why: String,
        /// True while the old weights are being loaded again; false while only the pause is being
        /// ended.
        reload: bool,
    },
}

impl LoadState {
    /// True if the graph has an edge from this state to `next`.
    pub fn may_become(&self, next: &LoadState) -> bool {
        use LoadState::{
            Active, Continuing, Fetching, Loading, Pausing, Probing, Quiescing, Restoring,
        };
        matches!(
            (self, next),
            (_, Active)
                | (Active, Fetching(_))
                | (Fetching(_), Quiescing(..))
                | (Quiescing(..), Pausing(..))
                | (Pausing(..), Loading(..))
                | (Pausing(..) | Loading(..), Restoring { reload: false, .. })
                | (Loading(..), Continuing(..))
                | (Continuing(..), Probing(..))
                | (Probing(..), Restoring { reload: true, .. })
                | (Restoring { reload: true, .. }, Restoring { reload: false, .. })
        )
    }

    /// The order under way; `None` in `Active`.
    pub fn order(&self) -> Option<&LoadOrder> {
        match self {
            LoadState::Active => None,
            LoadState::Fetching(order)
            | LoadState::Quiescing(order, _)
            | LoadState::Pausing(order, _)
            | LoadState::Loading(order, _)
            | LoadState::Continuing(order, _)
            | LoadState::Probing(order, _)
            | LoadState::Restoring { order, .. } => Some(order),
        }
    }
}
