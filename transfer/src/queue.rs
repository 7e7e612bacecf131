//! Which stream fetches which chunk from which source: the receiver's decisions, without I/O. Streams
//! take work as they are free, so a slow one does not set the finish time; chunks of a lost stream go
//! back; a stream that holds up the end is told to let go.
//!
//! ```text
//!   chunk:   Missing ── take ──► Taken{stream} ── verified ──► Held
//!            Taken ── bad hash, stream lost ──► Missing
//!   source:  Live ── failed ──► Resting{until} ── until ──► Live
//!            Live, Resting ── refused, or failed too often without a chunk ──► Dropped{why}
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::chunks::ChunkSet;

pub(crate) type StreamId = usize;
pub(crate) type SourceId = usize;

#[derive(Clone, Debug)]
pub(crate) struct QueueRules {
    /// Failures in a row, without a verified chunk between them, after which a source is dropped.
    pub(crate) strikes: u32,
    /// How long a failed source rests; doubles with each failure in a row.
    pub(crate) rest: Duration,
    /// An idle stream takes over from one that verified nothing for so long.
    pub(crate) rescue_after: Duration,
}

#[derive(Debug)]
pub(crate) struct ChunkQueue {
    rules: QueueRules,
    chunks: u32,
    missing: ChunkSet,
    taken: BTreeMap<u32, StreamId>,
    streams: BTreeMap<StreamId, Stream>,
    sources: Vec<Source>,
    /// Chunks that came wrong from a source: asked from another one while there is one.
    wrong: BTreeSet<(u32, SourceId)>,
    stats: QueueStats,
}

/// What went on besides chunks that came right at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Chunks whose hash was wrong.
    pub bad_chunks: u64,
    /// Chunks asked for again after their stream was lost.
    pub returned_chunks: u64,
    pub lost_streams: u64,
    pub rescues: u64,
}

#[derive(Debug)]
struct Stream {
    source: SourceId,
    moved: Instant,
    cursor: u32,
}

#[derive(Debug)]
struct Source {
    has: ChunkSet,
    state: SourceState,
    strikes: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum SourceState {
    Live,
    Resting { until: Instant },
    Dropped { why: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Assign {
    To(SourceId),
    /// All sources rest until then.
    Wait(Instant),
    /// Every source is dropped.
    None,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Take {
    Chunk(u32),
    /// Nothing for this source now.
    Wait,
    /// That stream holds up the end: close it, its chunks come back.
    Rescue(StreamId),
    Done,
}

// === impl QueueStats ===

impl QueueStats {
    pub(crate) fn add(&mut self, more: QueueStats) {
        self.bad_chunks += more.bad_chunks;
        self.returned_chunks += more.returned_chunks;
        self.lost_streams += more.lost_streams;
        self.rescues += more.rescues;
    }
}

// === impl ChunkQueue ===

impl ChunkQueue {
    pub(crate) fn new(rules: QueueRules, held: &ChunkSet, sources: usize) -> ChunkQueue {
        let mut missing = ChunkSet::full(held.len());
        for index in held.iter() {
            missing.remove(index);
        }
        let source =
            || Source { has: ChunkSet::empty(held.len()), state: SourceState::Live, strikes: 0 };
        ChunkQueue {
            rules,
            chunks: held.len(),
            missing,
            taken: BTreeMap::new(),
            streams: BTreeMap::new(),
            sources: (0..sources).map(|_| source()).collect(),
            wrong: BTreeSet::new(),
            stats: QueueStats::default(),
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.missing.is_empty() && self.taken.is_empty()
    }

    pub(crate) fn stats(&self) -> QueueStats {
        self.stats
    }

    /// The source with the fewest streams for its share; the stream is bound to it from here on.
    pub(crate) fn assign(&mut self, stream: StreamId, now: Instant) -> Assign {
        if self.is_done() {
            return Assign::Done;
        }
        for source in &mut self.sources {
            if matches!(source.state, SourceState::Resting { until } if until <= now) {
                source.state = SourceState::Live;
            }
        }
        let load = |ix: SourceId| self.streams.values().filter(|s| s.source == ix).count();
        let live =
            (0..self.sources.len()).filter(|&ix| self.sources[ix].state == SourceState::Live);
        if let Some(source) = live.min_by_key(|&ix| (load(ix), self.sources[ix].strikes, ix)) {
            // Streams start at different places, so that receivers differ in what they hold early.
            let cursor = (u64::from(self.chunks) * (stream as u64 * 5 % 16) / 16) as u32;
            self.streams.insert(stream, Stream { source, moved: now, cursor });
            return Assign::To(source);
        }
        let rest = self.sources.iter().filter_map(|s| match s.state {
            SourceState::Resting { until } => Some(until),
            SourceState::Live | SourceState::Dropped { .. } => None,
        });
        rest.min().map_or(Assign::None, Assign::Wait)
    }

    /// The source said what it has.
    pub(crate) fn learned(&mut self, source: SourceId, ranges: &[Range<u32>]) {
        for range in ranges {
            self.sources[source].has.insert_range(range.clone());
        }
    }

    pub(crate) fn learned_all(&mut self, source: SourceId) {
        self.sources[source].has = ChunkSet::full(self.chunks);
    }

    pub(crate) fn take(&mut self, stream: StreamId, now: Instant) -> Take {
        if self.is_done() {
            return Take::Done;
        }
        let Some(Stream { source, cursor, .. }) = self.streams.get(&stream) else {
            return Take::Wait;
        };
        let (source, cursor) = (*source, *cursor);
        if let Some(index) = self.pick(source, cursor) {
            self.missing.remove(index);
            self.taken.insert(index, stream);
            if let Some(s) = self.streams.get_mut(&stream) {
                s.cursor = if index + 1 < self.chunks { index + 1 } else { 0 };
            }
            return Take::Chunk(index);
        }
        if self.taken.values().any(|owner| *owner == stream) {
            return Take::Wait;
        }
        match self.slow_stream(source, now) {
            Some(slow) => {
                self.stats.rescues += 1;
                Take::Rescue(slow)
            }
            None => Take::Wait,
        }
    }

    fn pick(&self, source: SourceId, cursor: u32) -> Option<u32> {
        let has = &self.sources[source].has;
        let first = self.missing.first_common(has, cursor)?;
        if self.wrong.is_empty() || !self.avoids(first, source) {
            return Some(first);
        }
        self.missing.iter().find(|&ix| has.contains(ix) && !self.avoids(ix, source))
    }

    /// Whether the chunk came wrong from this source, and another one can be asked.
    fn avoids(&self, index: u32, source: SourceId) -> bool {
        self.wrong.contains(&(index, source))
            && self.sources.iter().enumerate().any(|(other, s)| {
                let dropped = matches!(s.state, SourceState::Dropped { .. });
                other != source && !dropped && !self.wrong.contains(&(index, other))
            })
    }

    /// A stream that verified nothing for long and holds a chunk that `source` has.
    fn slow_stream(&self, source: SourceId, now: Instant) -> Option<StreamId> {
        let has = &self.sources[source].has;
        let slow = |id: &StreamId| {
            let moved = self.streams.get(id).map(|s| s.moved);
            moved.is_some_and(|m| now.saturating_duration_since(m) >= self.rules.rescue_after)
        };
        self.taken.iter().find(|(ix, id)| has.contains(**ix) && slow(id)).map(|(_, id)| *id)
    }

    /// True if it was this stream's to verify.
    pub(crate) fn verified(&mut self, stream: StreamId, index: u32, now: Instant) -> bool {
        if self.taken.get(&index) != Some(&stream) {
            return false;
        }
        self.taken.remove(&index);
        if let Some(s) = self.streams.get_mut(&stream) {
            s.moved = now;
            self.sources[s.source].strikes = 0;
        }
        true
    }

    /// The chunk's hash was wrong. Too many of them drop the source.
    pub(crate) fn bad(&mut self, stream: StreamId, index: u32, now: Instant) {
        self.stats.bad_chunks += 1;
        if self.taken.get(&index) == Some(&stream) {
            self.taken.remove(&index);
            self.missing.insert(index);
        }
        if let Some(source) = self.streams.get(&stream).map(|s| s.source) {
            self.wrong.insert((index, source));
            self.strike(source, now, &format!("chunk {index} had a wrong hash"));
        }
    }

    /// The stream broke: its chunks go back, its source rests or is dropped.
    pub(crate) fn lost(&mut self, stream: StreamId, now: Instant, why: &str, refused: bool) {
        let Some(source) = self.release(stream) else { return };
        self.stats.lost_streams += 1;
        if refused {
            self.sources[source].state = SourceState::Dropped { why: why.to_owned() };
        } else {
            self.strike(source, now, why);
        }
    }

    /// The stream ended without blame: done, or told to let go.
    pub(crate) fn release(&mut self, stream: StreamId) -> Option<SourceId> {
        let gone = self.streams.remove(&stream)?;
        let back: Vec<u32> =
            self.taken.iter().filter(|(_, s)| **s == stream).map(|(ix, _)| *ix).collect();
        self.stats.returned_chunks += back.len() as u64;
        for index in back {
            self.taken.remove(&index);
            self.missing.insert(index);
        }
        Some(gone.source)
    }

    fn strike(&mut self, source: SourceId, now: Instant, why: &str) {
        let s = &mut self.sources[source];
        s.strikes += 1;
        let rest = self.rules.rest * 2u32.saturating_pow(s.strikes.min(6) - 1);
        s.state = if s.strikes >= self.rules.strikes {
            SourceState::Dropped { why: why.to_owned() }
        } else {
            SourceState::Resting { until: now + rest }
        };
    }

    /// Whether streams bound to the source should leave it.
    pub(crate) fn is_dropped(&self, source: SourceId) -> bool {
        matches!(self.sources[source].state, SourceState::Dropped { .. })
    }

    /// Why each dropped source was dropped.
    pub(crate) fn dropped(&self) -> Vec<(SourceId, String)> {
        let why = |(ix, s): (SourceId, &Source)| match &s.state {
            SourceState::Dropped { why } => Some((ix, why.clone())),
            SourceState::Live | SourceState::Resting { .. } => None,
        };
        self.sources.iter().enumerate().filter_map(why).collect()
    }
}

#[cfg(test)]
mod tests;
