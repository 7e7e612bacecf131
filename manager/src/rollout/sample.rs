//! Sample: one of the `n` answers to a prompt, and its way from the queue to the trainer.
//!
//! ```text
//!            place                       stop condition
//! Waiting ──────────▶ Running            ┌────────────▶ Finished ──batch──▶ Delivered
//!    │ ▲                 │               │                 │
//!    │ └─────────────────┘               │                 └── group dropped ─▶ Abandoned
//!    │   engine lost, aborted, silent,   │
//!    │   or finished: off its engine     │
//!    ├───────────────────────────────────┘
//!    └── poison, refused, cancelled ───────────────────────────────────────────▶ Abandoned
//! ```

use anabranch_proto::{Attempt, BatchSeq, SessionId};

use crate::action::Finish;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum SampleState {
    /// In the queue, or behind its group's leader until that has a token.
    Waiting,
    Running {
        session: SessionId,
        attempt: Attempt,
    },
    Finished {
        how: Finish,
    },
    Delivered {
        seq: BatchSeq,
    },
    Abandoned {
        why: String,
    },
}

/// Durable part of a sample, and beside it what is known of it for now.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// Assigned by `Books::apply` only.
    pub(super) state: SampleState,
    pub(super) attempts: u32,
    pub(super) seed: u64,
    /// Tokens thrown away by restarts from the prompt.
    pub(super) discarded: u32,
    /// Tokens of a sample that has ended.
    pub(super) made: Option<u32>,
    pub live: SampleLive,
}

/// Volatile part of a sample: a mirror of the ledger, and suspicions.
#[derive(Clone, Debug)]
pub(crate) struct SampleLive {
    /// Tokens in the ledger, as last heard: above half of what there is, and exact at an end.
    pub kept: u32,
    /// Lowest version number among the kept tokens; `u64::MAX` without tokens.
    pub oldest: u64,
    /// True once the running attempt has made a token.
    pub had_token: bool,
    /// True once the ledger was told to end the sample as it is: the answer is on its way.
    pub ending: bool,
    /// Last attempt before the sample's restart from its prompt: what is still told of growth up to it is of tokens that
    /// were thrown away.
    pub fence: u32,
    /// True once the ledger was told to open a page.
    pub has_page: bool,
    /// Engine deaths while the sample ran, since its last token.
    pub deaths: u32,
    /// Broken streams of the sample, since its last token.
    pub losses: u32,
}

impl Default for SampleLive {
    fn default() -> Self {
        Self {
            kept: 0,
            oldest: u64::MAX,
            had_token: false,
            ending: false,
            fence: 0,
            has_page: false,
            deaths: 0,
            losses: 0,
        }
    }
}

impl SampleState {
    pub const NAMES: [&str; 5] = ["waiting", "running", "finished", "delivered", "abandoned"];

    /// One value of each state.
    pub fn all() -> [Self; 5] {
        [
            Self::Waiting,
            Self::Running { session: SessionId(1), attempt: Attempt(1) },
            Self::Finished { how: Finish::Length },
            Self::Delivered { seq: BatchSeq(1) },
            Self::Abandoned { why: String::new() },
        ]
    }

    pub fn index(&self) -> usize {
        match self {
            Self::Waiting => 0,
            Self::Running { .. } => 1,
            Self::Finished { .. } => 2,
            Self::Delivered { .. } => 3,
            Self::Abandoned { .. } => 4,
        }
    }

    pub fn name(&self) -> &'static str {
        Self::NAMES[self.index()]
    }

    pub fn is_open(&self) -> bool {
        matches!(self, Self::Waiting | Self::Running { .. })
    }

    /// The graph above.
    pub fn may_become(&self, to: &Self) -> bool {
        matches!(
            (self, to),
            (Self::Waiting, Self::Running { .. } | Self::Finished { .. } | Self::Abandoned { .. })
                | (Self::Running { .. }, Self::Waiting)
                | (Self::Finished { .. }, Self::Delivered { .. } | Self::Abandoned { .. })
        )
    }
}

impl Sample {
    pub fn new(seed: u64) -> Self {
        let live = SampleLive::default();
        Self { state: SampleState::Waiting, attempts: 0, seed, discarded: 0, made: None, live }
    }

    pub fn state(&self) -> &SampleState {
        &self.state
    }

    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    pub fn is_open(&self) -> bool {
        self.state.is_open()
    }

    pub fn running_on(&self) -> Option<(SessionId, Attempt)> {
        match self.state {
            SampleState::Running { session, attempt, .. } => Some((session, attempt)),
            _ => None,
        }
    }

    /// True where the durable parts are equal.
    pub fn same_books(&self, other: &Self) -> bool {
        (&self.state, self.attempts, self.seed, self.discarded, self.made)
            == (&other.state, other.attempts, other.seed, other.discarded, other.made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_graph_has_these_edges_and_no_others() {
        let mut edges = Vec::new();
        for from in SampleState::all() {
            for to in SampleState::all().iter().filter(|to| from.may_become(to)) {
                edges.push(format!("{}-{}", from.name(), to.name()));
            }
        }
        assert_eq!(
            edges,
            [
                "waiting-running",
                "waiting-finished",
                "waiting-abandoned",
                "running-waiting",
                "finished-delivered",
                "finished-abandoned",
            ]
        );
    }
}
