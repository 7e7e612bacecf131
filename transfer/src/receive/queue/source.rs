//! The receiver's view of its sources: the chunks that they have, whether they live, when one is given up.
//!
//! ```text
//!   source:  Live ── failed, not ready ──► Resting{until} ── until ──► Live
//!            Live, Resting ── refused, wrong chunks too often, or all failed too often ──► Dropped{why}
//! ```

use std::ops::Range;
use std::time::{Duration, Instant};

use super::QueueRules;
use crate::image::chunks::ChunkSet;

#[derive(Debug)]
pub(super) struct Source {
    pub(super) has: ChunkSet,
    /// Chunks that it has and that are not verified here, by stripe (by none, in one number). Empty
    /// where more is always expected of it.
    left: Vec<u32>,
    /// True once the source said which chunks it has.
    told: bool,
    state: SourceState,
    /// Failures in a row, without a verified chunk between them.
    pub(super) strikes: u32,
    /// Chunks with a wrong hash, among the failures.
    wrong_chunks: u32,
    last_failure: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum SourceState {
    Live,
    /// `at_need`: it is asked from then on where no other source lives.
    Resting {
        until: Instant,
        at_need: Instant,
    },
    Dropped {
        why: String,
    },
}

// === impl Source ===

impl Source {
    /// A source of which nothing is known yet. `stripes` is 0 if more is always expected of it.
    pub(super) fn new(chunks: u32, stripes: usize) -> Source {
        Source {
            has: ChunkSet::empty(chunks),
            left: vec![0; stripes],
            told: false,
            state: SourceState::Live,
            strikes: 0,
            wrong_chunks: 0,
            last_failure: String::new(),
        }
    }

    pub(super) fn is_live(&self) -> bool {
        self.state == SourceState::Live
    }

    pub(super) fn is_dropped(&self) -> bool {
        matches!(self.state, SourceState::Dropped { .. })
    }

    pub(super) fn dropped_because(&self) -> Option<&str> {
        match &self.state {
            SourceState::Dropped { why } => Some(why),
            SourceState::Live | SourceState::Resting { .. } => None,
        }
    }

    /// When it may be of use again, were nobody else. `None`: never.
    pub(super) fn back_at(&self, now: Instant, rules: &QueueRules) -> Option<Instant> {
        match self.state {
            SourceState::Resting { until, at_need } => Some(until.min(at_need)),
            SourceState::Live => Some(now + rules.rest),
            SourceState::Dropped { .. } => None,
        }
    }

    /// True if the source has, or may have, a chunk of the stripe that is not verified here.
    pub(super) fn may_give(&self, stripe: usize) -> bool {
        self.left.get(stripe).is_none_or(|left| *left > 0 || !self.told)
    }

    /// Notes that the source has these chunks; `is_verified` says of each whether it is here already.
    pub(super) fn learned(&mut self, range: Range<u32>, is_verified: impl Fn(u32) -> bool) {
        self.told = true;
        if let count @ 1.. = self.left.len() {
            let end = range.end.min(self.has.len());
            for index in
                (range.start..end).filter(|ix| !self.has.contains(*ix) && !is_verified(*ix))
            {
                self.left[index as usize % count] += 1;
            }
        }
        self.has.insert_range(range);
    }

    /// A chunk is here, from whomever.
    pub(super) fn note_verified(&mut self, index: u32) {
        if let count @ 1.. = self.left.len()
            && self.has.contains(index)
        {
            self.left[index as usize % count] -= 1;
        }
    }

    /// A chunk of it was right.
    pub(super) fn absolve(&mut self) {
        (self.strikes, self.wrong_chunks) = (0, 0);
    }

    /// Lets the source rest, longer with each failure in a row. A source that was silent is not tried soon while
    /// others live: the next try may cost as much.
    pub(super) fn strike(&mut self, rules: &QueueRules, now: Instant, silent: Duration, why: &str) {
        self.strikes += 1;
        let rest = rules.rest * 2u32.saturating_pow(self.strikes.min(5) - 1);
        self.state =
            SourceState::Resting { until: now + rest.max(4 * silent), at_need: now + rest };
        self.last_failure = why.to_owned();
    }

    pub(super) fn note_wrong_chunk(&mut self) {
        self.wrong_chunks += 1;
    }

    /// Lets the source rest without blame.
    pub(super) fn rest_until(&mut self, until: Instant) {
        self.state = SourceState::Resting { until, at_need: until };
    }

    pub(super) fn drop_for(&mut self, why: &str) {
        self.state = SourceState::Dropped { why: why.to_owned() };
    }

    fn wake(&mut self, is_over: impl Fn(Instant, Instant) -> bool) {
        if matches!(self.state, SourceState::Resting { until, at_need } if is_over(until, at_need))
        {
            self.state = SourceState::Live;
        }
    }
}

/// Ends rests that are over; where nobody lives, those that are over at need.
pub(super) fn wake(sources: &mut [Source], now: Instant) {
    sources.iter_mut().for_each(|s| s.wake(|until, _| until <= now));
    if !sources.iter().any(Source::is_live) {
        sources.iter_mut().for_each(|s| s.wake(|_, at_need| at_need <= now));
    }
}

/// Drops sources that failed often, but only all at once: one of them may be the only one that has what is
/// missing, and come back. One whose chunks were wrong so often is dropped at once.
pub(super) fn drop_hopeless(sources: &mut [Source], strikes: u32) {
    let all = sources.iter().all(|s| s.strikes >= strikes || s.is_dropped());
    for source in sources {
        if !source.is_dropped() && (source.wrong_chunks >= strikes || all) {
            source.state = SourceState::Dropped { why: source.last_failure.clone() };
        }
    }
}
