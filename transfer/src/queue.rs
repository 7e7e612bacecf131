//! Which stream fetches which chunk from which source: the receiver's decisions, without I/O. Streams
//! take work as they are free, so a slow one does not set the finish time; chunks of a lost stream go
//! back; a stream that holds up the end is told to let go.
//!
//! With a plan, chunk i belongs to stripe i mod S and one source is in charge of each stripe: its planned
//! parent, or, while that one is not live or stuck, the next source of the list.
//!
//! ```text
//!   chunk:   Missing ── take ──► Taken{stream} ── verified ──► Held
//!            Taken ── bad hash, stream lost ──► Missing
//!   source:  Live ── failed, not ready ──► Resting{until} ── until ──► Live
//!            Live, Resting ── refused, wrong chunks in a row, or all failed too often ──► Dropped{why}
//!   stripe:  Planned parent ── not live, or stuck ──► next of the list ── parent is well again ──► Planned
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::chunks::ChunkSet;

pub type StreamId = usize;
/// Place in the list of sources that the queue was made for.
pub type SourceId = usize;

#[derive(Clone, Debug)]
pub struct QueueRules {
    /// Wrong chunks in a row, without a right one between them, after which a source is dropped; failures
    /// of any kind after which, with all others, it is.
    pub strikes: u32,
    /// How long a failed source rests; doubles with each failure in a row.
    pub rest: Duration,
    /// An idle stream takes over from one of another source that verified nothing for so long.
    pub rescue_after: Duration,
    /// A stripe that got nothing for so long, from a source that is otherwise well, goes to the next one.
    pub stuck_after: Duration,
}

/// The planned parents of the stripes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StripePlan {
    /// 0: no plan, any source is as good.
    pub stripe_count: u32,
    /// By source: the stripes that it is the planned parent of.
    pub stripes: Vec<Vec<u32>>,
    /// By source: the stripes that it may stand in for; it gets others only when nobody else is left.
    pub fallbacks: Vec<Vec<u32>>,
}

#[derive(Debug)]
pub struct ChunkQueue {
    rules: QueueRules,
    chunks: u32,
    missing: ChunkSet,
    taken: BTreeMap<u32, StreamId>,
    streams: BTreeMap<StreamId, Stream>,
    sources: Vec<Source>,
    /// Empty without a plan.
    stripes: Vec<Stripe>,
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
    /// Failures in a row, without a verified chunk between them.
    strikes: u32,
    /// Of those, chunks with a wrong hash.
    wrong_chunks: u32,
    last_failure: String,
}

#[derive(Debug)]
struct Stripe {
    /// The planned parent, those that may stand in for it, all others.
    order: Vec<SourceId>,
    charge: Option<SourceId>,
    /// Chunks of it that are not verified.
    left: u32,
    /// When it last got a chunk, or another source.
    moved: Instant,
    /// Sources that were stuck with it, and when they may have another try.
    stuck: BTreeMap<SourceId, Instant>,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assign {
    To(SourceId),
    /// No source is of use before then.
    Wait(Instant),
    /// Every source is dropped.
    None,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    Chunk(u32),
    /// Nothing for this source now.
    Wait,
    /// That stream holds up the end: close it, its chunks come back.
    Rescue(StreamId),
    /// This source is in charge of nothing any more: be assigned anew.
    Leave,
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

// === impl StripePlan ===

impl StripePlan {
    fn order(&self, stripe: u32, sources: usize) -> Vec<SourceId> {
        let named =
            |list: &[Vec<u32>], ix: usize| list.get(ix).is_some_and(|s| s.contains(&stripe));
        let tier = |ix: &usize| match named(&self.stripes, *ix) {
            true => 0,
            false => 2 - u8::from(named(&self.fallbacks, *ix)),
        };
        let mut order: Vec<SourceId> = (0..sources).collect();
        order.sort_by_key(tier);
        order
    }
}

// === impl ChunkQueue ===

impl ChunkQueue {
    /// For `sources` sources, best first.
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
        let source = || Source {
            has: ChunkSet::empty(held.len()),
            state: SourceState::Live,
            strikes: 0,
            wrong_chunks: 0,
            last_failure: String::new(),
        };
        let mut stripes: Vec<Stripe> = (0..plan.stripe_count.min(held.len()))
            .map(|stripe| {
                let order = plan.order(stripe, sources);
                let planned = plan.stripes.iter().take(sources).any(|s| s.contains(&stripe));
                let charge = order.first().copied().filter(|_| planned);
                Stripe { order, charge, left: 0, moved: now, stuck: BTreeMap::new() }
            })
            .collect();
        if let count @ 1.. = stripes.len() {
            missing.iter().for_each(|index| stripes[index as usize % count].left += 1);
        }
        ChunkQueue {
            stripes,
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

    pub fn is_done(&self) -> bool {
        self.missing.is_empty() && self.taken.is_empty()
    }

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
        let of_use = (0..self.sources.len())
            .filter(|&ix| self.sources[ix].state == SourceState::Live && self.share(ix) > 0);
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
        let rest = self.sources.iter().filter_map(|s| match s.state {
            SourceState::Resting { until, at_need } => Some(until.min(at_need)),
            SourceState::Live => Some(now + self.rules.rest),
            SourceState::Dropped { .. } => None,
        });
        rest.min().map_or(Assign::None, Assign::Wait)
    }

    /// Stripes with work left that the source is in charge of; without a plan, 1.
    fn share(&self, source: SourceId) -> usize {
        if self.stripes.is_empty() {
            return 1;
        }
        self.stripes.iter().filter(|s| s.left > 0 && s.charge == Some(source)).count()
    }

    /// Ends rests that are over, and gives each stripe the best source there is for it now.
    fn review(&mut self, now: Instant) {
        for source in &mut self.sources {
            if matches!(source.state, SourceState::Resting { until, .. } if until <= now) {
                source.state = SourceState::Live;
            }
        }
        if !self.sources.iter().any(|s| s.state == SourceState::Live) {
            for source in &mut self.sources {
                if matches!(source.state, SourceState::Resting { at_need, .. } if at_need <= now) {
                    source.state = SourceState::Live;
                }
            }
        }
        let (rules, sources) = (&self.rules, &self.sources);
        for stripe in self.stripes.iter_mut().filter(|s| s.left > 0) {
            stripe.stuck.retain(|_, until| *until > now);
            if let Some(source) = stripe.charge
                && now.saturating_duration_since(stripe.moved) >= rules.stuck_after
            {
                stripe.stuck.insert(source, now + 2 * rules.stuck_after);
            }
            let live = |ix: &SourceId| sources[*ix].state == SourceState::Live;
            let in_order = || stripe.order.iter().copied().filter(live);
            let well = in_order().find(|ix| !stripe.stuck.contains_key(ix));
            // Where all are stuck, the one that was so longest ago.
            let charge = well.or_else(|| in_order().min_by_key(|ix| stripe.stuck.get(ix)));
            if charge.is_some() && charge != stripe.charge {
                (stripe.charge, stripe.moved) = (charge, now);
            }
        }
    }

    /// It has several streams, and another source in charge of a stripe has none.
    fn can_spare(&self, source: SourceId) -> bool {
        let streams = |ix: SourceId| self.streams.values().filter(|s| s.source == ix).count();
        let unserved = |ix: &SourceId| {
            self.sources[*ix].state == SourceState::Live && self.share(*ix) > 0 && streams(*ix) == 0
        };
        !self.stripes.is_empty()
            && streams(source) > 1
            && (0..self.sources.len()).any(|ix| unserved(&ix))
    }

    /// The source said what it has.
    pub fn learned(&mut self, source: SourceId, ranges: &[Range<u32>]) {
        for range in ranges {
            self.sources[source].has.insert_range(range.clone());
        }
    }

    pub fn learned_all(&mut self, source: SourceId) {
        self.sources[source].has = ChunkSet::full(self.chunks);
    }

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

    /// Whether a live source that no stream asks has something to give, or was not asked yet what it has.
    fn is_wanted_elsewhere(&self, source: SourceId) -> bool {
        let is_asked = |ix: SourceId| self.streams.values().any(|s| s.source == ix);
        let can_give = |ix: SourceId| match self.sources[ix].has.is_empty() {
            true => self.stripes.is_empty(),
            false => self.pick(ix, 0).is_some(),
        };
        !self.missing.is_empty()
            && (0..self.sources.len()).any(|ix| {
                let live = self.sources[ix].state == SourceState::Live;
                ix != source && live && !is_asked(ix) && can_give(ix)
            })
    }

    fn is_in_charge(&self, source: SourceId, index: u32) -> bool {
        match self.stripes.len() {
            0 => true,
            count => self.stripes[index as usize % count].charge == Some(source),
        }
    }

    /// Whether the chunk came wrong from this source, and another one can be asked.
    fn avoids(&self, index: u32, source: SourceId) -> bool {
        self.wrong.contains(&(index, source))
            && self.sources.iter().enumerate().any(|(other, s)| {
                let dropped = matches!(s.state, SourceState::Dropped { .. });
                other != source && !dropped && !self.wrong.contains(&(index, other))
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
            let source = &mut self.sources[s.source];
            (source.strikes, source.wrong_chunks) = (0, 0);
        }
        if let count @ 1.. = self.stripes.len() {
            let stripe = &mut self.stripes[index as usize % count];
            stripe.left -= 1;
            stripe.moved = now;
        }
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
            self.sources[source].wrong_chunks += 1;
            self.strike(source, now, Duration::ZERO, &format!("chunk {index} had a wrong hash"));
        }
    }

    /// The stream broke: its chunks go back, its source rests or is dropped.
    pub fn lost(&mut self, stream: StreamId, now: Instant, why: &str, refused: bool) {
        let silent = self.streams.get(&stream).map(|s| now.saturating_duration_since(s.moved));
        let Some(source) = self.release(stream) else { return };
        self.stats.lost_streams += 1;
        if refused {
            self.sources[source].state = SourceState::Dropped { why: why.to_owned() };
        } else {
            self.strike(source, now, silent.unwrap_or_default(), why);
        }
    }

    /// The source cannot say any more what it has.
    pub fn unheard(&mut self, source: SourceId, now: Instant, why: &str) {
        if self.sources[source].state == SourceState::Live {
            self.strike(source, now, Duration::ZERO, why);
        }
    }

    /// The source has not begun with the version yet: asked again later, without blame.
    pub fn not_ready(&mut self, stream: StreamId, now: Instant) {
        if let Some(source) = self.release(stream)
            && self.sources[source].state == SourceState::Live
        {
            let until = now + 2 * self.rules.rest;
            self.sources[source].state = SourceState::Resting { until, at_need: until };
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

    /// What cost us silence is not tried again soon while others live: the next try may cost as much.
    fn strike(&mut self, source: SourceId, now: Instant, silent: Duration, why: &str) {
        let s = &mut self.sources[source];
        s.strikes += 1;
        let rest = self.rules.rest * 2u32.saturating_pow(s.strikes.min(5) - 1);
        s.state = SourceState::Resting { until: now + rest.max(4 * silent), at_need: now + rest };
        s.last_failure = why.to_owned();
        self.drop_hopeless();
    }

    /// One that failed often is dropped only with all the others: it may be the only one that has what is
    /// missing, and come back. One whose chunks were wrong so often is dropped at once.
    fn drop_hopeless(&mut self) {
        let limit = self.rules.strikes;
        let hopeless =
            |s: &Source| s.strikes >= limit || matches!(s.state, SourceState::Dropped { .. });
        let all = self.sources.iter().all(hopeless);
        for s in &mut self.sources {
            let dropped = matches!(s.state, SourceState::Dropped { .. });
            if !dropped && (s.wrong_chunks >= limit || all) {
                s.state = SourceState::Dropped { why: s.last_failure.clone() };
            }
        }
    }

    /// Whether streams bound to the source should leave it.
    pub fn is_dropped(&self, source: SourceId) -> bool {
        matches!(self.sources[source].state, SourceState::Dropped { .. })
    }

    /// Why each dropped source was dropped.
    pub fn dropped(&self) -> Vec<(SourceId, String)> {
        let why = |(ix, s): (SourceId, &Source)| match &s.state {
            SourceState::Dropped { why } => Some((ix, why.clone())),
            SourceState::Live | SourceState::Resting { .. } => None,
        };
        self.sources.iter().enumerate().filter_map(why).collect()
    }
}

#[cfg(test)]
mod tests;
