//! Agents and their engines as one cheap model: seats, chunks of equal length, loads in stages, memory given back. Owns
//! what an agent knows; when things happen is the world's.

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::tokens::{self, WIDTH};
use anabranch_proto::{Attempt, EngineId, OrderId, SampleId, SessionId, Version};
use bytes::Bytes;

use super::actions::{LoadOrder, StartOrder};
use super::events::{LinkId, LoadStage};
use crate::rng::Rng;

/// Samples of an engine have a chunk in every fourth tick.
const PHASES: usize = 4;
const TOKEN: u32 = 7;

pub struct Agent {
    pub id: EngineId,
    pub colocated: bool,
    pub incarnation: u64,
    pub link: Option<LinkId>,
    pub session: Option<SessionId>,
    pub loaded: Version,
    pub load: Option<Load>,
    /// Set while the trainer has the engine's memory.
    pub released: bool,
    /// New tokens in the ledger since the agent's last word to the core.
    pub made: u64,
    phases: [Vec<Run>; PHASES],
    ends: Vec<pb::End>,
    ticks: u64,
}

/// A load order and how far the agent is with it.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub order: OrderId,
    pub version: Version,
    pub stage: LoadStage,
}

/// One running attempt.
#[derive(Clone, Copy, Debug)]
struct Run {
    sample: SampleId,
    attempt: Attempt,
    /// Tokens that the sample has.
    at: u32,
    /// Tokens at which it ends.
    end: u32,
}

/// How many tokens each sample comes to, out of its seed: so it is the same on every engine.
#[derive(Clone, Copy, Debug)]
pub struct Lives {
    /// Tokens of the first sample of a group, which runs before its siblings and makes the group one that was offered.
    pub leader: u32,
    /// Tokens of each other sample of a group, in the mean.
    pub sibling: u32,
    /// Groups up to this one start in the middle of their lives.
    pub first_wave: u64,
    /// Tokens are made in chunks of this many.
    pub chunk: u32,
}

/// Columns of a tick with a token that stops nothing; cut to size, never copied.
#[derive(Clone, Debug)]
pub struct Columns {
    chunk: u32,
    tokens: Bytes,
    logprobs: Bytes,
}

// === impl Lives ===

impl Lives {
    /// Lengths of samples of which 1% finish a second: groups of `n`, whose first sample lives for `leader` seconds and all
    /// for 100 s in the mean.
    pub fn new(n: u32, leader: f64, tokens_per_second: f64, chunk: u32) -> Self {
        let sibling = (100.0 * f64::from(n) - leader) / f64::from(n - 1);
        let tokens = |seconds: f64| (seconds * tokens_per_second) as u32;
        Self { leader: tokens(leader), sibling: tokens(sibling), first_wave: u64::MAX, chunk }
    }

    /// Groups of the first wave, of `seats` to fill: those whose leaders have ended have one sample less.
    pub fn first_groups(&self, n: u32, seats: u64) -> u64 {
        let leaders = f64::from(self.leader) / f64::from(self.sibling);
        (seats as f64 / (f64::from(n - 1) + leaders)).ceil() as u64
    }

    fn tokens(&self, order: &StartOrder) -> u32 {
        let mut rng = Rng::new(order.seed);
        let mut share = |of: u32| rng.range(0, u64::from(of.max(1))) as u32;
        let leads = order.sample.index == 0;
        let tokens = match (order.sample.group.0 <= self.first_wave, leads) {
            (false, true) => self.leader,
            (false, false) => self.sibling / 2 + share(self.sibling),
            (true, false) => share(self.sibling),
            // Groups are of all ages up to a sibling's life; the leaders of most have ended.
            (true, true) => self.leader.saturating_sub(share(self.sibling)),
        };
        tokens.max(1).next_multiple_of(self.chunk)
    }
}

// === impl Columns ===

impl Columns {
    pub fn new(chunk: u32, seats: u32) -> Self {
        let rows = (chunk * seats) as usize;
        let tokens = tokens::encode_ids(&vec![TOKEN; rows]);
        Self { chunk, tokens, logprobs: tokens::encode_logprobs(&vec![-0.25; rows]) }
    }

    fn cut(&self, chunks: usize) -> (Bytes, Bytes) {
        let bytes = chunks * self.chunk as usize * WIDTH;
        (self.tokens.slice(..bytes), self.logprobs.slice(..bytes))
    }
}

// === impl Agent ===

impl Agent {
    pub fn new(index: usize, colocated: bool) -> Self {
        Self {
            id: EngineId::new(&format!("e{index}")),
            colocated,
            incarnation: 0,
            link: None,
            session: None,
            loaded: Version::base(0),
            load: None,
            released: false,
            made: 0,
            phases: Default::default(),
            ends: Vec::new(),
            ticks: 0,
        }
    }

    /// A new process: nothing of the old one is left.
    pub fn reborn(&mut self, link: LinkId) {
        *self = Self {
            id: self.id.clone(),
            incarnation: self.incarnation + 1,
            link: Some(link),
            ..Self::new(0, self.colocated)
        };
    }

    pub fn running(&self) -> usize {
        self.phases.iter().map(Vec::len).sum()
    }

    pub fn start(&mut self, order: &StartOrder, kept: u32, lives: &Lives) {
        let end = lives.tokens(order).max(kept + lives.chunk);
        let run = Run { sample: order.sample, attempt: order.attempt, at: kept, end };
        let phase = self.phases.iter_mut().min_by_key(|phase| phase.len());
        phase.expect("there are four").push(run);
    }

    pub fn stop(&mut self, sample: SampleId, attempt: Attempt) {
        let is_it = |run: &Run| run.sample == sample && run.attempt == attempt;
        for phase in &mut self.phases {
            if let Some(at) = phase.iter().position(is_it) {
                self.ends.push(phase.swap_remove(at).end(Why::Aborted));
            }
        }
    }

    pub fn end_all(&mut self) {
        let runs = self.phases.iter_mut().flat_map(|phase| phase.drain(..));
        self.ends.extend(runs.map(|run| run.end(Why::Aborted)));
    }

    pub fn order_load(&mut self, order: &LoadOrder) {
        let stage = LoadStage::Ordered;
        self.load = Some(Load { order: order.order, version: order.version, stage });
    }

    /// The next stage of a load, if it is still the same one.
    pub fn load_on(&mut self, order: OrderId) -> Option<Load> {
        let load = self.load.as_mut().filter(|load| load.order == order)?;
        load.stage = match load.stage {
            LoadStage::Ordered => LoadStage::Fetching,
            LoadStage::Fetching => LoadStage::Staged,
            LoadStage::Staged => LoadStage::Quiescing,
            LoadStage::Quiescing => LoadStage::Loading,
            LoadStage::Loading => LoadStage::Probing,
            _ => LoadStage::Active,
        };
        let load = *load;
        if load.stage == LoadStage::Active {
            self.loaded = load.version;
            self.load = None;
        }
        Some(load)
    }

    fn is_frozen(&self) -> bool {
        self.released || self.load.is_some_and(|load| load.stage >= LoadStage::Quiescing)
    }

    /// The tick of this moment: a chunk of a fourth of its samples. `None`: there is nothing to say.
    pub fn tick(&mut self, columns: &Columns) -> Option<pb::Tick> {
        self.ticks += 1;
        let mut tick = pb::Tick { seq: self.ticks, ..Default::default() };
        if !self.is_frozen() {
            let phase = &mut self.phases[self.ticks as usize % PHASES];
            tick.segs = phase.iter_mut().map(|run| run.grow(columns.chunk)).collect();
            for at in (0..phase.len()).rev() {
                if phase[at].at >= phase[at].end {
                    self.ends.push(phase.swap_remove(at).end(Why::StopId));
                }
            }
        }
        tick.ends = std::mem::take(&mut self.ends);
        if tick.segs.is_empty() && tick.ends.is_empty() {
            return None;
        }
        tick.versions = vec![self.loaded.into()];
        (tick.tokens, tick.logprobs) = columns.cut(tick.segs.len());
        Some(tick)
    }
}

// === impl Run ===

impl Run {
    fn grow(&mut self, count: u32) -> pb::Seg {
        let offset = self.at;
        self.at += count;
        pb::Seg {
            group: self.sample.group.0,
            index: self.sample.index,
            attempt: self.attempt.0,
            offset,
            count,
            ..Default::default()
        }
    }

    fn end(self, why: Why) -> pb::End {
        pb::End {
            sample: Some(self.sample.into()),
            attempt: self.attempt.0,
            at: self.at,
            why: why.into(),
            ..Default::default()
        }
    }
}
