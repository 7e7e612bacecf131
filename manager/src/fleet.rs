//! The engines: what each can do, what it runs, and where it stands.
//!
//! ```text
//!              order          loaded, probed            quiescing
//! Joining ────────────▶ Syncing{to} ──────▶ Serving{at} ◀────────▶ Updating{from,to}
//!    ▲                     ▲                   │  │        active / failed
//!    │ attach              │ resume, report    │  └─ release ─▶ Releasing ─▶ Released ─┐
//!    │                     └───────────────────┼──────────────────────────────────────┘
//!    │        link lost, lease over            ▼
//!  (any live state) ───────▶ Suspect{since} ──reattach──▶ the state `Hello.loaded` proves
//!                               │ grace over        drain ─▶ Draining{deadline} ─▶ Gone{why}
//!                               ▼                            too many deaths ─▶ Quarantined{until}
//!                             Gone{why}
//! ```

pub(crate) mod placement;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{Attempt, EngineId, OrderId, SampleId, SessionId, Version};
use anabranch_runtime::clock::Now;

use crate::event::{EngineHello, LinkId, LoadStage, ProbeResult};
use crate::ledger::Maker;
use crate::weights::plan;
use crate::weights::rates::Rates;

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum EngineState {
    /// Attached; no version to load yet, or no job.
    Joining,
    Syncing {
        to: Version,
    },
    Serving {
        at: Version,
    },
    /// It takes no start to the engine until the load has ended.
    Updating {
        from: Version,
        to: Version,
    },
    /// Link lost or lease over: no new work, samples wait for `reattach_grace`.
    Suspect {
        why: String,
    },
    /// Mode switch: its samples are being aborted.
    Releasing,
    /// Its GPU belongs to the trainer now; comes back through Syncing.
    Released,
    Draining {
        why: String,
    },
    /// Died too often.
    Quarantined,
    Gone {
        why: String,
    },
}

/// The kind of an agent that has no engine.
pub(crate) const RELAY: &str = "relay";

pub(crate) struct Engine {
    pub id: EngineId,
    pub session: SessionId,
    pub link: Option<LinkId>,
    pub hello: EngineHello,
    pub maker: Arc<Maker>,
    pub state: EngineState,
    pub running: BTreeMap<SampleId, Running>,
    /// Tokens of context its running samples hold now, plus a reserve for what comes.
    pub committed_tokens: u64,
    pub load: Option<Load>,
    pub failed_loads: u32,
    /// Why the last load failed or could not be ordered; empty once one succeeded.
    pub load_error: String,
    /// Versions it can serve to peers.
    pub holds: BTreeSet<Version>,
    pub probe: Option<(Version, ProbeResult)>,
    pub serve_key: [u8; 32],
    /// Prompts the session has had, with the samples there that need them.
    pub prompts: BTreeMap<u64, u32>,
    pub joined: Now,
    pub heard: Now,
    /// Tokens it gave us.
    pub tokens: u64,
    pub kv_used: f32,
    /// Waits for the answer to a mode order.
    pub mode_order: Option<OrderId>,
    /// Its memory was asked for and not given back yet: after a lost link it is told again.
    pub parked: bool,
    /// What the trainer said it loaded there.
    pub attested: Option<Version>,
    /// Kept free for a sample that may be poison.
    pub reserved: Option<SampleId>,
    /// Ends with "busy" or garbage: no new work before this.
    pub not_before: Now,
    pub broken: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub attempt: Attempt,
    pub weight: u64,
    pub digest: u64,
}

/// A load order and how far it is.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub order: OrderId,
    pub version: Version,
    pub stage: LoadStage,
    pub bytes: u64,
    pub total: u64,
    pub ordered: Now,
    pub error: String,
    pub fetched_from: BTreeMap<String, u64>,
    pub feed: plan::Feed,
    /// The most in any quarter of a second, bytes/s.
    pub ingress: u64,
    /// Of this version, to peers.
    pub served: u64,
}

/// What outlives an engine's sessions: how often it died lately, how fast its host is.
#[derive(Default)]
pub(crate) struct Record {
    pub deaths: VecDeque<Now>,
    pub incarnation: u64,
    /// Of this incarnation.
    pub rates: Rates,
    /// Its machine was taken away once, with notice: that may happen again.
    pub noticed: bool,
}

impl Engine {
    /// It only holds versions for others, and generates nothing.
    pub fn is_relay(&self) -> bool {
        self.hello.kind == RELAY
    }

    /// It may be given samples: serving, and its link is alive (I4).
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

    /// Its owner says that it may be taken away.
    pub fn is_labelled_preemptible(&self) -> bool {
        let set = |label| self.hello.labels.get(label).is_some_and(|value| value == "true");
        set("preemptible") || set("spot")
    }

    /// Whose weights it has, as far as anybody proved.
    pub fn version(&self) -> Option<Version> {
        match self.state {
            EngineState::Serving { at } => Some(at),
            EngineState::Updating { from, .. } => Some(from),
            _ => None,
        }
    }

    pub fn add(&mut self, sample: SampleId, running: Running) {
        self.committed_tokens += running.weight;
        *self.prompts.entry(running.digest).or_insert(0) += 1;
        self.running.insert(sample, running);
    }

    /// Takes a sample off; true when the session's copy of its prompt is not needed any more.
    pub fn remove(&mut self, sample: SampleId) -> Option<PromptUse> {
        let running = self.running.remove(&sample)?;
        self.committed_tokens -= running.weight;
        let uses = self.prompts.get_mut(&running.digest)?;
        *uses -= 1;
        Some(if *uses == 0 {
            self.prompts.remove(&running.digest);
            PromptUse::Last(running.digest)
        } else {
            PromptUse::Shared
        })
    }

    pub fn has_room(&self, weight: u64) -> bool {
        let hello = &self.hello;
        let seats = hello.max_running == 0 || (self.running.len() as u32) < hello.max_running;
        let memory = hello.kv_tokens == 0
            || self.running.is_empty()
            || self.committed_tokens + weight <= hello.kv_tokens;
        seats && memory
    }

    /// For "least outstanding tokens", engines of different size compared by GPU.
    pub fn pressure(&self) -> u64 {
        self.committed_tokens / u64::from(self.hello.gpus.max(1))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PromptUse {
    Shared,
    Last(u64),
}

impl Record {
    /// Notes a death; true if there were `limit` within `window`.
    pub fn died(&mut self, now: Now, limit: u32, window: Duration) -> bool {
        self.deaths.push_back(now);
        while self.deaths.front().is_some_and(|at| now.since(*at) > window) {
            self.deaths.pop_front();
        }
        self.deaths.len() as u32 >= limit.max(1)
    }
}
