//! Engine: what one session's engine can do and what it runs. Volatile; the session's state is in the books.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{Attempt, EngineId, OrderId, SampleId, SessionId, Version};
use anabranch_runtime::clock::Now;

use super::seats::Seat;
use super::state::EngineState;
use crate::event::{EngineHello, LinkId};
use crate::ledger::Maker;

/// Kind of an agent that has no engine.
pub(crate) const RELAY: &str = "relay";

pub(crate) struct Engine {
    pub id: EngineId,
    pub session: SessionId,
    pub link: Option<LinkId>,
    pub hello: EngineHello,
    pub maker: Arc<Maker>,
    pub running: BTreeMap<SampleId, Running>,
    /// Tokens of context that the running samples hold, and a reserve for what comes.
    pub committed_tokens: u64,
    /// Key that verifies grants for what this engine serves to peers.
    pub serve_key: [u8; 32],
    /// Prompts that the session has had, with the number of its samples that need each.
    pub prompts: BTreeMap<u64, u32>,
    pub joined: Now,
    pub heard: Now,
    /// Tokens that the engine made and the ledger kept.
    pub tokens: u64,
    /// Share of the KV cache in use, 0 to 1, as last heard.
    pub kv_used: f32,
    /// Mode order that waits for its answer.
    pub mode_order: Option<OrderId>,
    /// Sample that may be poison and that this engine is kept free for.
    pub reserved: Option<SampleId>,
    /// No new work before this instant: the engine was busy, silent, or lost a stream.
    pub not_before: Now,
    /// Since when tokens are expected of the engine: it serves, or serves again.
    pub makes_since: Now,
    /// Malformed streams so far.
    pub broken: u32,
    /// Copy of the book's state, so that a look at the engine is one look-up.
    pub(super) state: EngineState,
    /// Place in the index of free seats.
    pub(super) seat: Option<Seat>,
    pub(super) resting: bool,
}

/// One sample on an engine.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub attempt: Attempt,
    pub weight: u64,
    pub digest: u64,
}

/// Deaths of an engine, over all its sessions.
#[derive(Default)]
pub(crate) struct Deaths {
    lately: VecDeque<Now>,
}

impl Engine {
    pub fn state(&self) -> &EngineState {
        &self.state
    }

    /// True for an agent that only holds versions for others, and generates nothing.
    pub fn is_relay(&self) -> bool {
        self.hello.kind == RELAY
    }

    /// The version the engine serves, where it may be given samples: serving over a live link (I4).
    pub fn serving(&self) -> Option<Version> {
        match self.state {
            EngineState::Serving { at } if self.link.is_some() && !self.is_relay() => Some(at),
            _ => None,
        }
    }

    pub fn is_gone(&self) -> bool {
        matches!(self.state, EngineState::Gone { .. })
    }

    pub fn is_colocated(&self) -> bool {
        self.hello.labels.get("colocated").is_some_and(|value| value == "true")
    }

    /// True where the engine's owner says that it may be taken away.
    pub fn is_labelled_preemptible(&self) -> bool {
        let set = |label| self.hello.labels.get(label).is_some_and(|value| value == "true");
        set("preemptible") || set("spot")
    }

    /// The engine's weights, as far as anybody proved.
    pub fn version(&self) -> Option<Version> {
        match self.state {
            EngineState::Serving { at } => Some(at),
            EngineState::Updating { from, .. } => Some(from),
            _ => None,
        }
    }

    /// True where one more sample of `weight` tokens fits.
    pub fn has_room(&self, weight: u64) -> bool {
        self.has_seat() && weight <= self.room()
    }

    /// False where the engine runs as many samples as it can.
    pub(super) fn has_seat(&self) -> bool {
        self.hello.max_running == 0 || (self.running.len() as u32) < self.hello.max_running
    }

    /// Tokens of context that are free; an idle engine takes any sample.
    pub(super) fn room(&self) -> u64 {
        match self.hello.kv_tokens {
            0 => u64::MAX,
            _ if self.running.is_empty() => u64::MAX,
            kv_tokens => kv_tokens.saturating_sub(self.committed_tokens),
        }
    }

    /// Place in the index of seats; `None`: the engine may be given no samples at all.
    pub(super) fn seat_now(&self) -> Option<Seat> {
        let at = self.serving()?;
        let context = self.hello.model.max_context;
        let free = self.reserved.is_none() && !self.resting && self.has_seat();
        let seat = Seat::new(at, context, self.pressure(), self.running.len());
        Some(seat.with(free.then(|| self.room()), self.reserved.is_some()))
    }

    /// Committed tokens a GPU: engines of different size compared.
    pub fn pressure(&self) -> u64 {
        self.committed_tokens / u64::from(self.hello.gpus.max(1))
    }

    pub(super) fn add(&mut self, sample: SampleId, running: Running) {
        self.committed_tokens += running.weight;
        *self.prompts.entry(running.digest).or_insert(0) += 1;
        self.running.insert(sample, running);
    }

    /// Takes a sample off. Gives the digest of its prompt where no other sample of the session needs that.
    pub(super) fn remove(&mut self, sample: SampleId) -> Option<u64> {
        let running = self.running.remove(&sample)?;
        self.committed_tokens -= running.weight;
        let uses = self.prompts.get_mut(&running.digest)?;
        *uses -= 1;
        (*uses == 0).then(|| {
            self.prompts.remove(&running.digest);
            running.digest
        })
    }
}

impl Deaths {
    /// Notes a death; true if there were `limit` within `window`, after which the count starts again.
    pub fn note(&mut self, now: Now, limit: u32, window: Duration) -> bool {
        self.lately.push_back(now);
        while self.lately.front().is_some_and(|at| now.since(*at) > window) {
            self.lately.pop_front();
        }
        let too_many = self.lately.len() as u32 >= limit.max(1);
        if too_many {
            self.lately.clear();
        }
        too_many
    }
}
