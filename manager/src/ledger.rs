//! The token ledger: which tokens each sample has, who made them, and when a sample is finished. Pure: it is
//! given ticks and says facts. Sharded by group, each shard behind its own short lock, so the hot path of
//! many agents scales over threads and the deciding core never sees a token.
//!
//! The deciding core does not hear of growth as such. A fact comes at an attempt's first token, where the oldest
//! version changes, where the tokens have doubled, and at an end; [`Ledger::sweep`] finds the attempts that are silent.

mod page;
mod rules;
mod silence;
mod tick;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anabranch_proto::{Attempt, EngineId, Incarnation, SampleId, SessionId};
use anabranch_runtime::clock::Now;
use bytes::Bytes;

use page::Page;
pub use page::{PageView, SpanRecord};
pub use rules::StopRules;
pub use silence::Silent;
pub use tick::{BadTick, Taken};

/// Attempts that one sweep looks at, at most.
const SWEEP_LOOKS: usize = 16_384;

/// Maker of an attempt's tokens: constant over one session.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Maker {
    /// The one session whose ticks count for the attempt.
    pub session: SessionId,
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
    /// The sample has `kept` tokens now; `oldest` is the lowest version number among them. Told at an attempt's first
    /// token, where `oldest` changes, and where `kept` has doubled; so what was told last is above half of what there is.
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
    Ended { sample: SampleId, attempt: Attempt, kept: u32, oldest: u64, why: Ended },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finished {
    /// An EOS or stop id, or a stop string (named).
    Stop(String),
    Length,
    /// Ended as it was, by [`Ledger::freeze`].
    Cancelled,
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
    /// Tokens from a session that does not run the sample.
    pub foreign_tokens: u64,
    /// Made after a stop condition was met.
    pub past_stop_tokens: u64,
    /// Thrown away by restarts from the prompt.
    pub cleared_tokens: u64,
    /// Tokens that an attempt after the first began with.
    pub resumed_tokens: u64,
    pub broken: u64,
    pub pages: u64,
}

pub struct Ledger {
    shards: Vec<Mutex<Shard>>,
    /// An attempt without a token for so long is told to be silent.
    patience: Duration,
}

#[derive(Default)]
struct Shard {
    /// Looked up by sample only: the order of a walk would not reproduce.
    pages: HashMap<SampleId, Page>,
    watch: silence::Watch,
    stats: LedgerStats,
}

// === impl Ledger ===

impl Ledger {
    /// `patience`: an attempt without a token for so long is told by [`Ledger::sweep`].
    pub fn new(shards: usize, patience: Duration) -> Self {
        Self { shards: (0..shards.max(1)).map(|_| Mutex::default()).collect(), patience }
    }

    /// A sample was admitted.
    pub fn open(&self, sample: SampleId, rules: Arc<StopRules>) {
        let mut shard = self.shard(sample);
        shard.stats.pages += 1;
        shard.pages.insert(sample, Page::new(rules));
    }

    /// A new attempt starts at `maker`; ticks of older attempts are stale from now on.
    pub fn begin(&self, now: Now, sample: SampleId, attempt: Attempt, maker: Arc<Maker>) -> Begun {
        let mut shard = self.shard(sample);
        let shard = &mut *shard;
        match shard.pages.get_mut(&sample) {
            None => Begun::Unknown,
            Some(page) if page.is_finished() => Begun::AlreadyFinished,
            Some(page) => {
                shard.watch.add(now + self.patience, sample, attempt);
                shard.stats.resumed_tokens += u64::from(page.kept());
                Begun::Kept(page.begin(now, attempt, maker))
            }
        }
    }

    /// Takes a tick of `session` in; each problem is confined to the sample it concerns.
    pub fn apply(
        &self,
        now: Now,
        session: SessionId,
        tick: &anabranch_proto::pb::Tick,
    ) -> Result<Taken, BadTick> {
        tick::apply(self, now, session, tick)
    }

    /// Attempts that have made no token for the ledger's patience, by session; each is told again after a quarter of it,
    /// for as long as it stays silent. Costs what is due, not what there is: at most 16,384 looks a call, about 4 ms; what
    /// else is due is found by the next one.
    pub fn sweep(&self, now: Now) -> BTreeMap<SessionId, Vec<Silent>> {
        let looks = SWEEP_LOOKS.div_ceil(self.shards.len());
        let mut silent = BTreeMap::new();
        for shard in &self.shards {
            let shard = &mut *lock(shard);
            shard.watch.sweep(now, self.patience, looks, &shard.pages, &mut silent);
        }
        silent
    }

    /// This process was stopped until `now`: nobody is held to have been silent before.
    pub fn resumed(&self, now: Now) {
        for shard in &self.shards {
            lock(shard).watch.resumed(now);
        }
    }

    /// An attempt was taken off its engine: what still comes of it is stale.
    pub fn end(&self, sample: SampleId, attempt: Attempt) {
        if let Some(page) = self.shard(sample).pages.get_mut(&sample)
            && page.runs_on(attempt).is_some()
        {
            page.end_attempt();
        }
    }

    /// The sample restarts from its prompt. Gives the number of tokens thrown away; `None` where the sample had finished,
    /// so that the fact of that end counts.
    pub fn clear(&self, sample: SampleId) -> Option<u32> {
        let mut shard = self.shard(sample);
        let cleared = shard.pages.get_mut(&sample).filter(|page| !page.is_finished())?.clear();
        shard.stats.cleared_tokens += u64::from(cleared);
        Some(cleared)
    }

    /// The sample ends as it is: what still comes for it is stale. Gives its tokens and the oldest version among them;
    /// `None` where the sample had finished, so that the fact of that end counts.
    pub fn freeze(&self, sample: SampleId) -> Option<(u32, u64)> {
        let mut shard = self.shard(sample);
        let page = shard.pages.get_mut(&sample).filter(|page| !page.is_finished())?;
        page.finish(Finished::Cancelled);
        Some((page.kept(), page.oldest()))
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
            foreign_tokens: self.foreign_tokens + other.foreign_tokens,
            past_stop_tokens: self.past_stop_tokens + other.past_stop_tokens,
            cleared_tokens: self.cleared_tokens + other.cleared_tokens,
            resumed_tokens: self.resumed_tokens + other.resumed_tokens,
            broken: self.broken + other.broken,
            pages: self.pages + other.pages,
        }
    }
}

#[cfg(test)]
mod tests;
