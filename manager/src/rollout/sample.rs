//! One sample's way.
//!
//! ```text
//!            place                     stop condition
//! Waiting ──────────▶ Running ─────────────────────────▶ Finished ──batch──▶ Delivered
//!    ▲                   │                                  │
//!    └── engine lost, ───┘                                  └── group dropped ─▶ Abandoned
//!        aborted, silent      poison, refused, cancelled ──────────────────────▶ Abandoned
//! ```

use anabranch_proto::{Attempt, BatchSeq, SessionId};
use anabranch_runtime::clock::Now;

use crate::action::Finish;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum SampleState {
    /// Siblings wait outside the queue until their leader has a token.
    Waiting {
        queued: bool,
    },
    Running {
        session: SessionId,
        attempt: Attempt,
        last_progress: Now,
        had_token: bool,
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

#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub state: SampleState,
    /// Tokens in the ledger, as last heard.
    pub kept: u32,
    /// Lowest version number among them.
    pub oldest: u64,
    pub attempts: u32,
    pub seed: u64,
    /// Thrown away by restarts from the prompt.
    pub discarded: u32,
    /// The ledger has a page for it.
    pub has_page: bool,
    /// Engine deaths while it ran, since it last made progress.
    pub deaths: u32,
    /// Streams of it that broke, since it last made progress.
    pub losses: u32,
}

impl Sample {
    pub fn new(seed: u64) -> Self {
        Self {
            state: SampleState::Waiting { queued: false },
            kept: 0,
            oldest: u64::MAX,
            attempts: 0,
            seed,
            discarded: 0,
            has_page: false,
            deaths: 0,
            losses: 0,
        }
    }

    pub fn is_open(&self) -> bool {
        matches!(self.state, SampleState::Waiting { .. } | SampleState::Running { .. })
    }

    pub fn running_on(&self) -> Option<(SessionId, Attempt)> {
        match self.state {
            SampleState::Running { session, attempt, .. } => Some((session, attempt)),
            _ => None,
        }
    }

    /// It made progress, so it is not what breaks engines.
    pub fn grew(&mut self, now: Now, kept: u32, oldest: u64) {
        self.kept = kept;
        self.oldest = oldest;
        self.deaths = 0;
        self.losses = 0;
        if let SampleState::Running { last_progress, had_token, .. } = &mut self.state {
            *last_progress = now;
            *had_token = true;
        }
    }
}
