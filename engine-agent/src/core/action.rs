//! Everything an agent can do, imperative. The driver performs these in order and never waits for
//! one.

use std::path::PathBuf;

use anabranch_proto::{Version, pb};

use super::event::{Call, LinkId};
use crate::engine::{AttemptId, Generate};

#[derive(Debug)]
pub enum Action {
    // The link
    Dial {
        link: LinkId,
        hello: Box<pb::Hello>,
    },
    /// Open the Data stream of the session that Welcome named.
    Bind {
        link: LinkId,
        session: u64,
    },
    HangUp {
        link: LinkId,
    },
    SendControl(Box<pb::from_agent::Kind>),
    SendTick(Box<pb::Tick>),
    /// Peers' grants are checked with this from now on.
    ServePeers {
        job: String,
        key: bytes::Bytes,
    },

    // The engine
    Generate(Box<Generate>),
    /// The stream goes on until its terminal chunk. Said again until then: an abort that overtakes
    /// its request is lost.
    Abort {
        attempt: AttemptId,
        rid: String,
    },
    /// The engine died: its streams are closed from this side too.
    DropStream {
        attempt: AttemptId,
    },
    /// A stream says that the engine is gone: look at once.
    CheckEngine,
    Call(Call),
    LoadWeights {
        directory: PathBuf,
        label: String,
    },
    Probe,

    // Weights
    Fetch(Box<FetchOrder>),
    CancelFetch {
        order: u64,
    },
    /// The engine has these weights; staging of any older version may be reused.
    KeepStaged {
        version: Version,
        directory: PathBuf,
    },

    Exit(ExitReason),
}

/// What to bring here, from where.
#[derive(Clone, Debug)]
pub struct FetchOrder {
    pub order: u64,
    pub version: Version,
    pub sources: Vec<pb::Source>,
    /// 0: no plan.
    pub stripe_count: u32,
    /// 0: as many as we like.
    pub streams: u32,
    /// Instead of sources.
    pub directory: Option<PathBuf>,
    pub bytes: u64,
}

/// Why the agent ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// Nothing runs, everything was handed over.
    Drained,
    /// The deadline passed before the manager had everything.
    DrainCut { running: usize, unacknowledged_bytes: usize },
    /// Told to go at once.
    Left,
    /// The manager will not have this agent.
    Refused { why: String },
    /// The job wants a convention that this engine does not give.
    Convention { wanted: String, offered: String },
    /// The engine holds weights that nobody vouches for, and there is no way back.
    Unverified { why: String },
}
