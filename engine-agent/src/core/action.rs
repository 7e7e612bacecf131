//! Actions of the core, in the imperative. The driver performs actions in order and never waits for
//! one.

use std::path::PathBuf;

use anabranch_proto::{Version, pb};

use super::event::{Call, LinkId};
use crate::engine::{AttemptId, Generate};

/// One thing for the driver to do.
#[derive(Debug)]
pub enum Action {
    // The link
    /// Dial the manager.
    Dial {
        /// Name of the link.
        link: LinkId,
        /// First message on the link.
        hello: Box<pb::Hello>,
    },
    /// Open the Data stream of the session that Welcome named.
    Bind {
        /// Name of the link.
        link: LinkId,
        /// Id of the session.
        session: u64,
    },
    /// Cut a link.
    HangUp {
        /// Name of the link.
        link: LinkId,
    },
    /// Send a message on the control stream.
    SendControl(Box<pb::from_agent::Kind>),
    /// Send a tick on the Data stream.
    SendTick(Box<pb::Tick>),
    /// Serve weights to peers whose grants were made with `key`.
    ServePeers {
        /// Key that grants are made with, 32 bytes; empty if there is none.
        key: bytes::Bytes,
    },

    // The engine
    /// Send a request to the engine.
    Generate(Box<Generate>),
    /// Abort the request `rid` at the engine, and again until its stream ends: an abort that
    /// overtakes its request is lost.
    Abort {
        /// The attempt.
        attempt: AttemptId,
        /// Id of the request at the engine.
        rid: String,
    },
    /// Close the stream of an attempt: the engine died.
    DropStream {
        /// The attempt.
        attempt: AttemptId,
    },
    /// Ask at once whether the engine lives: a stream says that the engine is gone.
    CheckEngine,
    /// Make a call to the engine.
    Call(Call),
    /// Tell the engine to load a checkpoint.
    LoadWeights {
        /// Directory with the checkpoint.
        directory: PathBuf,
        /// Name that the engine is to give the weights.
        label: String,
    },
    /// Run the probe on the engine.
    Probe,

    // Weights
    /// Bring a version to this host.
    Fetch(Box<FetchOrder>),
    /// Stop a fetch.
    CancelFetch {
        /// Id of the load order.
        order: u64,
    },
    /// Keep this staged version, which the engine has; staging of any older version may be reused.
    KeepStaged {
        /// The version.
        version: Version,
        /// Directory with the checkpoint.
        directory: PathBuf,
    },

    /// End the agent.
    Exit(ExitReason),
}

/// A version to bring to this host, and its sources.
#[derive(Clone, Debug)]
pub struct FetchOrder {
    /// Id of the manager's load order.
    pub order: u64,
    /// The version to fetch.
    pub version: Version,
    /// Peers and publishers that have the version.
    pub sources: Vec<pb::Source>,
    /// Number of stripes that the manager's plan cuts the version into; 0: no plan.
    pub stripe_count: u32,
    /// Number of parallel streams; 0: the agent chooses.
    pub streams: u32,
    /// Shared directory to verify and use in place, instead of `sources`.
    pub directory: Option<PathBuf>,
    /// Size of the version, in bytes; 0 if the manager does not say.
    pub bytes: u64,
}

/// Reason why the agent ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The drain is complete: nothing runs, and the manager has everything.
    Drained,
    /// The drain's deadline passed before the manager had everything.
    DrainCut {
        /// Attempts that still ran.
        running: usize,
        /// Bytes that the manager did not take.
        unacknowledged_bytes: usize,
    },
    /// The manager ordered the agent to leave at once.
    Left,
    /// The manager refuses this agent.
    Refused {
        /// Reason in words.
        why: String,
    },
    /// The job wants another `logprobs_mode` than this engine gives.
    LogprobsMode {
        /// The mode that the job wants.
        wanted: String,
        /// The modes that the engine offers.
        offered: String,
    },
    /// The engine has weights that nobody vouches for, and the old ones cannot be loaded again.
    Unverified {
        /// Reason in words.
        why: String,
    },
}
