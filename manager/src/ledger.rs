//! The token ledger: which tokens each sample has, who made them, and when it is finished. Pure: it is
//! given ticks and says facts. Sharded by group, each shard behind its own short lock, so the hot path of
//! many agents scales over threads and the deciding core never sees a token.
//!
//! The ledger's facts are what a journal records: appended ranges, finishes, restarts.

mod page;
mod rules;
mod tick;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use anabranch_proto::{Attempt, EngineId, Incarnation, SampleId};
use bytes::Bytes;

use page::Page;
pub use page::{PageView, SpanRecord};
pub use rules::StopRules;
pub use tick::BadTick;

/// Maker of an attempt's tokens: constant over one session.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Maker {
    pub engine: EngineId,
    pub incarnation: Incarnation,
    /// Versions are attested by the trainer, not verified by us.
    pub by_trainer: bool,
    /// Engine kind and version, dtype, quantisation, logprobs_mode: the span's numerics class.
    pub numerics: String,
}

/// What a tick, seen by the ledger, means for the deciding core.
#[derive(Clone, Debug, PartialEq)]
pub enum Fact {
    /// The sample has `kept` tokens now; `oldest` is the lowest version number among them.
    Grew { sample: SampleId, attempt: Attempt, kept: u32, oldest: u64 },
    /// Ended for good. `running`: the engine has not said so and must be told to stop.
    Finished {
        sample: SampleId,
        attempt: Attempt,
        kept: u32,
        oldest: u64,
        how: Finished,
        running: bool,
    },
    /// The attempt is over, the sample is not.
    Ended { sample: SampleId, attempt: Attempt, kept: u32, why: Ended },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finished {
    /// An EOS or stop id, or a stop string (named).
    Stop(String),
    Length,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    Aborted,
    Lost(String),
    /// The engine says the request itself is wrong.
    Refused(String),
    Busy(String),
    /// The peer broke the protocol: gap, foreign token, not a number.
    Broken(String),
}

/// What `begin` found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begun {
    /// Tokens to give to the engine after the prompt.
    Kept(Bytes),
    /// Finished meanwhile; the fact is on its way to the core.
    AlreadyFinished,
    /// No such page (forgotten or never opened).
    Unknown,
}

/// Counters of the ledger, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct LedgerStats {
    pub tokens: u64,
    /// Came twice after a re-attach, and were dropped the second time.
    pub repeated_tokens: u64,
    /// Tokens of an attempt that had been moved on.
    pub stale_tokens: u64,
    /// Made after a stop condition was met.
    pub past_stop_tokens: u64,
    /// Thrown away by restarts from the prompt.
    pub cleared_tokens: u64,
    pub broken: u64,
    pub pages: u64,
}

pub struct Ledger {
    shards: Vec<Mutex<Shard>>,
}

#[derive(Default)]
struct Shard {
    pages: BTreeMap<SampleId, Page>,
    stats: LedgerStats,
}

// === impl Ledger ===

impl Ledger {
    pub fn new(shards: usize) -> Self {
        Self { shards: (0..shards.max(1)).map(|_| Mutex::default()).collect() }
    }

    /// A sample was admitted.
    pub fn open(&self, sample: SampleId, rules: Arc<StopRules>) {
        let mut shard = self.shard(sample);
        shard.stats.pages += 1;
        shard.pages.insert(sample, Page::new(rules));
    }

    /// A new attempt starts at `maker`; ticks of older attempts are stale from now on.
    pub fn begin(&self, sample: SampleId, attempt: Attempt, maker: Arc<Maker>) -> Begun {
        match self.shard(sample).pages.get_mut(&sample) {
            None => Begun::Unknown,
            Some(page) if page.is_finished() => Begun::AlreadyFinished,
            Some(page) => Begun::Kept(page.begin(attempt, maker)),
        }
    }

    /// Takes a tick in; each problem is confined to the sample it concerns.
    pub fn apply(&self, tick: &anabranch_proto::pb::Tick) -> Result<Vec<Fact>, BadTick> {
        tick::apply(self, tick)
    }

    /// The sample restarts from its prompt.
    pub fn clear(&self, sample: SampleId) {
        let mut shard = self.shard(sample);
        if let Some(page) = shard.pages.get_mut(&sample) {
            let cleared = page.clear();
            shard.stats.cleared_tokens += u64::from(cleared);
        }
    }

    /// The sample ends as it is: what still comes for it is stale.
    pub fn freeze(&self, sample: SampleId) {
        if let Some(page) = self.shard(sample).pages.get_mut(&sample) {
            page.end_attempt();
        }
    }

    /// A finished (or given up) sample's content.
    pub fn view(&self, sample: SampleId) -> Option<PageView> {
        self.shard(sample).pages.get(&sample).map(Page::view)
    }

    pub fn kept(&self, sample: SampleId) -> Option<u32> {
        self.shard(sample).pages.get(&sample).map(Page::kept)
    }

    pub fn forget(&self, samples: &[SampleId]) {
        for sample in samples {
            let mut shard = self.shard(*sample);
            if shard.pages.remove(sample).is_some() {
                shard.stats.pages -= 1;
            }
        }
    }

    pub fn stats(&self) -> LedgerStats {
        self.shards
            .iter()
            .map(lock)
            .fold(LedgerStats::default(), |sum, shard| sum.plus(&shard.stats))
    }

    fn shard(&self, sample: SampleId) -> MutexGuard<'_, Shard> {
        let index = (sample.group.0 as usize) % self.shards.len();
        lock(&self.shards[index])
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().expect("no code that holds a shard panics")
}

impl LedgerStats {
    fn plus(self, other: &Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            repeated_tokens: self.repeated_tokens + other.repeated_tokens,
            stale_tokens: self.stale_tokens + other.stale_tokens,
            past_stop_tokens: self.past_stop_tokens + other.past_stop_tokens,
            cleared_tokens: self.cleared_tokens + other.cleared_tokens,
            broken: self.broken + other.broken,
            pages: self.pages + other.pages,
        }
    }
}

/// The lowest version number of a page's spans; `u64::MAX` while it has none.
pub(crate) fn oldest(spans: &[SpanRecord]) -> u64 {
    spans.iter().map(|span| span.version.number).min().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
