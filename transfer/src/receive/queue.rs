//! The receiver's decisions, without I/O: which stream fetches which chunk from which source. Streams
//! take work as they are free, so a slow one does not set the finish time; chunks of a lost stream go
//! back; a stream that holds up the end is told to let go.
//!
//! With a plan, chunk i belongs to stripe i mod S and one source is in charge of each stripe: its planned
//! parent, or, while that one is not live or stuck, the next source of the list. Sources that have parts of
//! one whole between them count as one here (`origin`).
//!
//! ```text
//!   chunk:   Missing ── take ──► Taken{stream} ── verified ──► Held
//!            Taken ── bad hash, stream lost ──► Missing
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::image::chunks::ChunkSet;

mod origin;
mod source;
mod stripe;

use origin::Origins;
use source::Source;
use stripe::Stripe;
pub use stripe::StripePlan;

/// Number that the caller gave to a stream.
pub type StreamId = usize;
/// Place in the list of sources that the queue was made for.
pub type SourceId = usize;

/// Bounds by which a queue judges sources and streams.
#[derive(Clone, Debug)]
pub struct QueueRules {
    /// Wrong chunks in a row before a source is dropped. Failures of any kind count in the same way once all
    /// sources fail.
    pub strikes: u32,
    /// Time that a failed source rests; it doubles with each failure in a row.
    pub rest: Duration,
    /// An idle stream takes over from one of another source that verified nothing for so long.
    pub rescue_after: Duration,
    /// A stripe that got nothing for so long, from a source that is otherwise well, goes to the next one.
    pub stuck_after: Duration,
}

/// The chunks of one blob that are missing, and who is asked for them.
#[derive(Debug)]
pub struct ChunkQueue {
    rules: QueueRules,
    chunks: u32,
    missing: ChunkSet,
    taken: BTreeMap<u32, StreamId>,
    streams: BTreeMap<StreamId, Stream>,
    sources: Vec<Source>,
    origins: Origins,
    /// Empty without a plan.
    stripes: Vec<Stripe>,
    /// Chunks that came wrong from a source: asked from another one while there is one.
    wrong: BTreeSet<(u32, SourceId)>,
    stats: QueueStats,
}

/// Counts of events other than chunks that came right at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Chunks whose hash was wrong.
    pub bad_chunks: u64,
    /// Chunks asked for again after their stream was lost.
    pub returned_chunks: u64,
    /// Streams that failed.
    pub lost_streams: u64,
    /// Streams that were closed because they held up the end.
    pub rescues: u64,
}

#[derive(Debug)]
struct Stream {
    source: SourceId,
    moved: Instant,
    cursor: u32,
}

/// The source for a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assign {
    /// Ask this source.
    To(SourceId),
    /// No source is of use before then.
    Wait(Instant),
    /// Every source is dropped.
    None,
    /// Every chunk is verified.
    Done,
}

/// The next step of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// Ask for this chunk.
    Chunk(u32),
    /// Nothing for this source now.
    Wait,
    /// The stream holds up the end: close it, and its chunks come back.
    Rescue(StreamId),
    /// The source is in charge of nothing any more: ask for another one.
    Leave,
    /// Every chunk is verified.
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
    /// A queue for `sources` sources, best first.
    pub fn new(
        rules: QueueRules,
        held: &ChunkSet,
        sources: usize,
        plan: &StripePlan,
        now: Instant,
    ) -> ChunkQueue {
        let mut missing = ChunkSet::full(held.len());
        for index in held.iter() {
            missing.remove(index);
        }
        let origins = Origins::new(&plan.origins, sources);
        let mut stripes = plan.stripes(held.len(), sources, &origins, now);
        if let count @ 1.. = stripes.len() {
            missing.iter().for_each(|index| stripes[index as usize % count].left += 1);
        }
        let source = |ix: SourceId| {
            let counted = if origins.is_part(ix) { stripes.len().max(1) } else { 0 };
            Source::new(held.len(), counted)
        };
        ChunkQueue {
            sources: (0..sources).map(source).collect(),
            origins,
            stripes,
            rules,
            chunks: held.len(),
            missing,
            taken: BTreeMap::new(),
            streams: BTreeMap::new(),
            wrong: BTreeSet::new(),
            stats: QueueStats::default(),
        }
    }

    /// True once every chunk is verified.
    pub fn is_done(&self) -> bool {
        self.missing.is_empty() && self.taken.is_empty()
    }

    /// The counts so far.
    pub fn stats(&self) -> QueueStats {
        self.stats
    }

    /// The source with the fewest streams for its share; the stream is bound to it from here on.
    pub fn assign(&mut self, stream: StreamId, now: Instant) -> Assign {
        if self.is_done() {
            return Assign::Done;
        }
        self.review(now);
        let load = |ix: SourceId| self.streams.values().filter(|s| s.source == ix).count();
        let of_use =
            (0..self.sources.len()).filter(|&ix| self.sources[ix].is_live() && self.share(ix) > 0);
        let best =
            of_use.min_by_key(|&ix| (load(ix) * 64 / self.share(ix), self.sources[ix].strikes, ix));
        if let Some(source) = best {
            // Without a plan, streams start at different places, so that receivers differ in what they
            // hold early.
            let place = if self.stripes.is_empty() { stream as u64 * 5 % 16 } else { 0 };
            let cursor = (u64::from(self.chunks) * place / 16) as u32;
            self.streams.insert(stream, Stream { source, moved: now, cursor });
            return Assign::To(source);
        }
        let rest = self.sources.iter().filter_map(|s| s.back_at(now, &self.rules));
        rest.min().map_or(Assign::None, Assign::Wait)
    }

    /// Stripes with work left that the source is in charge of and may have something for; without a plan
    /// 1, if it may have something.
    fn share(&self, source: SourceId) -> usize {
        let (origin, at) = (self.origins.of(source), &self.sources[source]);
        if self.stripes.is_empty() {
            return usize::from(at.may_give(0));
        }
        let serves = |(ix, stripe): &(usize, &Stripe)| {
            stripe.left > 0 && stripe.charge == Some(origin) && at.may_give(*ix)
        };
        self.stripes.iter().enumerate().filter(serves).count()
    }

    /// Ends rests that are over, and gives each stripe the best source there is for it now.
    fn review(&mut self, now: Instant) {
        source::wake(&mut self.sources, now);
        let (origins, sources) = (&self.origins, &self.sources);
        for (ix, stripe) in self.stripes.iter_mut().enumerate().filter(|(_, s)| s.left > 0) {
            let is_live = |origin| origins.is_live(origin, ix, sources);
            stripe.review(is_live, self.rules.stuck_after, now);
        }
    }

    /// True if the source has several streams, and another source in charge of a stripe has none.
    fn can_spare(&self, source: SourceId) -> bool {
        let streams = |ix: SourceId| self.streams.values().filter(|s| s.source == ix).count();
        let unserved =
            |ix: &SourceId| self.sources[*ix].is_live() && self.share(*ix) > 0 && streams(*ix) == 0;
        !self.stripes.is_empty()
            && streams(source) > 1
            && (0..self.sources.len()).any(|ix| unserved(&ix))
    }

    /// The source said what it has.
    pub fn learned(&mut self, source: SourceId, ranges: &[Range<u32>]) {
        let (missing, taken) = (&self.missing, &self.taken);
        let is_verified = |index| !missing.contains(index) && !taken.contains_key(&index);
        // No range at all also says something.
        for range in ranges.iter().cloned().chain(std::iter::once(0..0)) {
            self.sources[source].learned(range, is_verified);
        }
    }

    /// Notes that the source has every chunk.
    pub fn learned_all(&mut self, source: SourceId) {
        let all = 0..self.chunks;
        self.learned(source, std::slice::from_ref(&all));
    }

    /// The next chunk for the stream, or what it should do instead.
    pub fn take(&mut self, stream: StreamId, now: Instant) -> Take {
        if self.is_done() {
            return Take::Done;
        }
        self.review(now);
        let Some(Stream { source, cursor, .. }) = self.streams.get(&stream) else {
            return Take::Wait;
        };
        let (source, cursor) = (*source, *cursor);
        if self.is_dropped(source) || self.can_spare(source) {
            return Take::Leave;
        }
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
        if self.share(source) == 0 || self.is_wanted_elsewhere(source) {
            return Take::Leave;
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
        let mut at = first;
        loop {
            if self.is_in_charge(source, at) && !self.avoids(at, source) {
                return Some(at);
            }
            let next = if at + 1 < self.chunks { at + 1 } else { 0 };
            at = self.missing.first_common(has, next)?;
            if at == first {
                return None;
            }
        }
    }

    /// True if a live source without a stream has something to give, or was not asked yet what it has.
    fn is_wanted_elsewhere(&self, source: SourceId) -> bool {
        let is_asked = |ix: SourceId| self.streams.values().any(|s| s.source == ix);
        let can_give = |ix: SourceId| match self.sources[ix].has.is_empty() {
            true => self.stripes.is_empty(),
            false => self.pick(ix, 0).is_some(),
        };
        !self.missing.is_empty()
            && (0..self.sources.len()).any(|ix| {
                ix != source && self.sources[ix].is_live() && !is_asked(ix) && can_give(ix)
            })
    }

    fn is_in_charge(&self, source: SourceId, index: u32) -> bool {
        match self.stripes.len() {
            0 => true,
            count => {
                let charge = self.stripes[index as usize % count].charge;
                charge == Some(self.origins.of(source))
            }
        }
    }

    /// True if the chunk came wrong from this source, and another one can be asked.
    fn avoids(&self, index: u32, source: SourceId) -> bool {
        self.wrong.contains(&(index, source))
            && self.sources.iter().enumerate().any(|(other, s)| {
                other != source && !s.is_dropped() && !self.wrong.contains(&(index, other))
            })
    }

    /// A stream of another source that verified nothing for long and holds a chunk that `source` has and
    /// may give.
    fn slow_stream(&self, source: SourceId, now: Instant) -> Option<StreamId> {
        let has = &self.sources[source].has;
        let slow = |id: &StreamId| {
            let other = self.streams.get(id).filter(|s| s.source != source);
            other.is_some_and(|s| now.saturating_duration_since(s.moved) >= self.rules.rescue_after)
        };
        let ours = |ix: u32| has.contains(ix) && self.is_in_charge(source, ix);
        self.taken.iter().find(|(ix, id)| ours(**ix) && slow(id)).map(|(_, id)| *id)
    }

    /// True if it was this stream's to verify.
    pub fn verified(&mut self, stream: StreamId, index: u32, now: Instant) -> bool {
        if self.taken.get(&index) != Some(&stream) {
            return false;
        }
        self.taken.remove(&index);
        if let Some(s) = self.streams.get_mut(&stream) {
            s.moved = now;
            self.sources[s.source].absolve();
        }
        if let count @ 1.. = self.stripes.len() {
            self.stripes[index as usize % count].note_verified(now);
        }
        self.sources.iter_mut().for_each(|s| s.note_verified(index));
        true
    }

    /// The chunk's hash was wrong. Too many of them drop the source.
    pub fn bad(&mut self, stream: StreamId, index: u32, now: Instant) {
        self.stats.bad_chunks += 1;
        if self.taken.get(&index) == Some(&stream) {
            self.taken.remove(&index);
            self.missing.insert(index);
        }
        if let Some(source) = self.streams.get(&stream).map(|s| s.source) {
            self.wrong.insert((index, source));
            self.sources[source].note_wrong_chunk();
            self.strike(source, now, Duration::ZERO, &format!("chunk {index} had a wrong hash"));
        }
    }

    /// The stream broke: its chunks go back, its source rests or is dropped.
    pub fn lost(&mut self, stream: StreamId, now: Instant, why: &str, refused: bool) {
        let silent = self.streams.get(&stream).map(|s| now.saturating_duration_since(s.moved));
        let Some(source) = self.release(stream) else { return };
        self.stats.lost_streams += 1;
        if refused {
            self.sources[source].drop_for(why);
        } else {
            self.strike(source, now, silent.unwrap_or_default(), why);
        }
    }

    /// The source cannot say any more what it has.
    pub fn unheard(&mut self, source: SourceId, now: Instant, why: &str) {
        if self.sources[source].is_live() {
            self.strike(source, now, Duration::ZERO, why);
        }
    }

    /// The source has not begun with the version yet: asked again later, without blame.
    pub fn not_ready(&mut self, stream: StreamId, now: Instant) {
        if let Some(source) = self.release(stream)
            && self.sources[source].is_live()
        {
            self.sources[source].rest_until(now + 2 * self.rules.rest);
        }
    }

    /// The stream ended without blame: done, or told to let go.
    pub fn release(&mut self, stream: StreamId) -> Option<SourceId> {
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

    fn strike(&mut self, source: SourceId, now: Instant, silent: Duration, why: &str) {
        self.sources[source].strike(&self.rules, now, silent, why);
        source::drop_hopeless(&mut self.sources, self.rules.strikes);
    }

    /// True if streams bound to the source should leave it.
    pub fn is_dropped(&self, source: SourceId) -> bool {
        self.sources[source].is_dropped()
    }

    /// Why each dropped source was dropped.
    pub fn dropped(&self) -> Vec<(SourceId, String)> {
        let why = |(ix, s): (SourceId, &Source)| Some((ix, s.dropped_because()?.to_owned()));
        self.sources.iter().enumerate().filter_map(why).collect()
    }
}

#[cfg(test)]
mod tests;
