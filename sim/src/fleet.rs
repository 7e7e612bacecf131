//! Agent and engine as one model: runs samples with the oracle, stamps offsets and versions, buffers ticks until
//! they are acknowledged, loads versions in stages, drains and releases. Speaks the agent's protocol in events.

use std::collections::{BTreeMap, VecDeque};

use anabranch_engine::synthetic::{self, Chain, SyntheticParams, WeightsKey};
use anabranch_manager::action::StartOrder;
use anabranch_manager::event::{Held, LinkId, LoadStage, OnRunning};
use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, OrderId, SampleId, SessionId, Version, tokens};
use anabranch_runtime::clock::Now;
use bytes::Bytes;

/// One agent with its engine.
pub(crate) struct SimEngine {
    pub name: String,
    pub incarnation: u64,
    pub alive: bool,
    /// False while the agent is cut off from the manager.
    pub net_up: bool,
    pub link: Option<LinkId>,
    pub session: Option<SessionId>,
    pub attached: bool,
    pub of_trainer: OfTrainer,
    /// True if the agent has no engine and only passes versions on.
    pub relay: bool,
    pub live: BTreeMap<SampleId, Live>,
    pub loaded: Version,
    pub load: Option<LoadRun>,
    pub drain: Option<(OrderId, Now)>,
    pub released: bool,
    pub stalled_until: Now,
    pub slow: u64,
    pub unacked: VecDeque<pb::Tick>,
    pub next_tick: u64,
    /// Ends to report with the next tick.
    pub ends: Vec<pb::End>,
    last_made: Now,
}

/// One running sample.
pub(crate) struct Live {
    pub attempt: Attempt,
    chain: Chain,
    offset: u32,
    remaining: u32,
    ignore_eos: bool,
    min_left: u32,
    credit_us: u64,
    /// True if the sample came while the engine waited for its running samples, and so starts after the load.
    waits: bool,
}

/// A load in progress.
#[derive(Clone, Debug)]
pub(crate) struct LoadRun {
    pub order: OrderId,
    pub version: Version,
    pub stage: LoadStage,
    pub on_running: OnRunning,
    pub fails: bool,
    /// True if the load never progresses.
    pub stuck: bool,
}

/// Key of a version's weights: the version's root stands for their digest.
pub(crate) fn weights(version: &Version) -> WeightsKey {
    let digest = if version.is_base() { synthetic::base_digest() } else { version.root.0 };
    WeightsKey::new(&digest)
}

/// Relation of an engine to the trainer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OfTrainer {
    /// The engine has GPUs of its own.
    Nothing,
    /// The engine is on the trainer's GPU, and gets its weights from the manager.
    Colocated,
    /// The engine is on the trainer's GPU, and is loaded by the trainer.
    Loaded,
}

impl SimEngine {
    /// True if the trainer loads the engine and attests its version.
    pub fn by_trainer(&self) -> bool {
        self.of_trainer == OfTrainer::Loaded
    }

    /// An agent that has not dialled yet.
    pub fn new(name: String, of_trainer: OfTrainer, now: Now) -> Self {
        Self {
            name,
            incarnation: 1,
            alive: true,
            net_up: true,
            link: None,
            session: None,
            attached: false,
            of_trainer,
            relay: false,
            live: BTreeMap::new(),
            loaded: Version::base(0),
            load: None,
            drain: None,
            released: false,
            stalled_until: Now::ZERO,
            slow: 1,
            unacked: VecDeque::new(),
            next_tick: 1,
            ends: Vec::new(),
            last_made: now,
        }
    }

    /// Makes the agent a relay.
    pub fn without_an_engine(self) -> Self {
        Self { relay: true, ..self }
    }

    /// Replaces the process: nothing of the old one is left.
    pub fn reborn(&mut self, now: Now) {
        let incarnation = self.incarnation + 1;
        let relay = self.relay;
        *self = Self { incarnation, relay, ..Self::new(self.name.clone(), self.of_trainer, now) };
    }

    /// Samples that the agent reports when it attaches again.
    pub fn held(&self) -> Vec<Held> {
        let live = self.live.iter().map(|(sample, live)| Held {
            sample: *sample,
            attempt: live.attempt,
            upto: live.offset,
        });
        // Ended samples whose last tokens are still in the buffer.
        let buffered = self.unacked.iter().flat_map(|tick| &tick.ends).filter_map(|end| {
            let sample: SampleId = end.sample?.into();
            Some(Held { sample, attempt: Attempt(end.attempt), upto: end.at })
        });
        live.chain(buffered).collect()
    }

    /// Starts a sample, after the tokens that it keeps.
    pub fn start(&mut self, order: &StartOrder, kept: &Bytes) {
        let prompt: Vec<u32> = tokens::ids(&order.prompt).collect();
        let given: Vec<u32> = tokens::ids(kept).collect();
        let sampling = &order.sampling;
        let offset = given.len() as u32;
        let waits = self.load.as_ref().is_some_and(LoadRun::lets_finish);
        self.live.insert(
            order.sample,
            Live {
                attempt: order.attempt,
                chain: Chain::new(order.seed).extend(&prompt).extend(&given),
                offset,
                remaining: sampling.max_tokens - offset,
                ignore_eos: sampling.ignore_eos,
                min_left: sampling.min_tokens.saturating_sub(offset),
                credit_us: 0,
                waits,
            },
        );
    }

    /// Aborts one attempt of a sample.
    pub fn stop(&mut self, sample: SampleId, attempt: Attempt) {
        if self.live.get(&sample).is_some_and(|live| live.attempt == attempt) {
            self.end(sample, Why::Aborted, "");
        }
    }

    /// Ends a sample for the reason `why`.
    pub fn end(&mut self, sample: SampleId, why: Why, detail: &str) {
        if let Some(live) = self.live.remove(&sample) {
            self.ends.push(pb::End {
                sample: Some(sample.into()),
                attempt: live.attempt.0,
                at: live.offset,
                why: why as i32,
                matched: detail.to_owned(),
                ..Default::default()
            });
        }
    }

    /// Ends all samples.
    pub fn end_all(&mut self, why: Why) {
        let all: Vec<SampleId> = self.live.keys().copied().collect();
        for sample in all {
            self.end(sample, why, "");
        }
    }

    /// Generates what is due, at `rate` tokens per second and sample. Returns the tick to send, if there is anything to
    /// report.
    pub fn make(&mut self, now: Now, rate: u64, params: SyntheticParams) -> Option<pb::Tick> {
        let elapsed = now.since(self.last_made).as_micros() as u64;
        self.last_made = now;
        let frozen = self.load.as_ref().is_some_and(LoadRun::stops_the_engine)
            || now < self.stalled_until
            || self.released;
        let mut tick = pb::Tick { versions: vec![self.loaded.into()], ..Default::default() };
        let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
        let mut finished = Vec::new();
        if !frozen {
            let key = weights(&self.loaded);
            for (sample, live) in self.live.iter_mut().filter(|(_, live)| !live.waits) {
                live.credit_us += elapsed;
                let step = 1_000_000 * self.slow / rate;
                let due = (live.credit_us / step) as u32;
                live.credit_us %= step;
                let before = ids.len();
                let why = live.run(due, key, params, &mut ids, &mut logprobs);
                let count = (ids.len() - before) as u32;
                if count > 0 {
                    tick.segs.push(live.segment(*sample, count));
                }
                finished.extend(why.map(|why| (*sample, why)));
            }
        }
        for (sample, why) in finished {
            self.end(sample, why, "");
        }
        tick.ends = std::mem::take(&mut self.ends);
        tick.tokens = tokens::encode_ids(&ids);
        tick.logprobs = tokens::encode_logprobs(&logprobs);
        if tick.segs.is_empty() && tick.ends.is_empty() {
            return None;
        }
        tick.seq = self.next_tick;
        self.next_tick += 1;
        self.unacked.push_back(tick.clone());
        Some(tick)
    }

    /// True if the load must wait for samples that it lets finish.
    pub fn is_busy(&self) -> bool {
        let lets_finish = self.load.as_ref().is_some_and(LoadRun::lets_finish);
        lets_finish && self.live.values().any(|live| !live.waits)
    }

    /// Ends the load, whether it succeeded or not.
    pub fn end_load(&mut self) {
        self.load = None;
        self.live.values_mut().for_each(|live| live.waits = false);
    }

    /// Replaces the finishes in `tick` by the end of the stream.
    pub fn lose_finishes(tick: &mut pb::Tick) {
        for end in &mut tick.ends {
            if matches!(end.why(), Why::StopId | Why::Length) {
                end.why = Why::Lost as i32;
            }
        }
    }

    /// Forgets the ticks that the manager has.
    pub fn acked(&mut self, seq: u64) {
        self.unacked.retain(|tick| tick.seq > seq);
    }
}

impl LoadRun {
    /// True if the load waits in quiescing for running samples to finish.
    fn lets_finish(&self) -> bool {
        self.on_running == OnRunning::Finish && self.stage == LoadStage::Quiescing
    }

    fn stops_the_engine(&self) -> bool {
        self.stage >= LoadStage::Quiescing && !self.lets_finish()
    }
}

impl Live {
    fn run(
        &mut self,
        due: u32,
        key: WeightsKey,
        params: SyntheticParams,
        ids: &mut Vec<u32>,
        logprobs: &mut Vec<f32>,
    ) -> Option<Why> {
        for _ in 0..due {
            let made =
                synthetic::next(self.chain, key, params, self.ignore_eos || self.min_left > 1);
            self.chain = self.chain.push(made.token);
            self.offset += 1;
            self.remaining -= 1;
            self.min_left = self.min_left.saturating_sub(1);
            ids.push(made.token);
            logprobs.push(made.logprob);
            if made.token == params.eos_id && !self.ignore_eos {
                return Some(Why::StopId);
            }
            if self.remaining == 0 {
                return Some(Why::Length);
            }
        }
        None
    }

    fn segment(&self, sample: SampleId, count: u32) -> pb::Seg {
        pb::Seg {
            group: sample.group.0,
            index: sample.index,
            attempt: self.attempt.0,
            offset: self.offset - count,
            count,
            version_ix: 0,
            ..Default::default()
        }
    }
}
