//! Events for the core, in the past tense. Tokens are not events: they take the short way,
//! [`super::Core::tokens`].

use std::collections::BTreeMap;
use std::path::PathBuf;

use anabranch_proto::pb;

use crate::engine::{AttemptId, EngineInfo, Finish, StreamError, Utilization};

/// Name of one dialled connection to the manager. Messages of a former connection are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// One fact that the core did not decide.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "handled where it is made, never queued")]
pub enum Event {
    // The engine
    /// The engine answers, for the first time or after its death.
    EngineUp {
        /// Facts that the engine tells about itself.
        info: Box<EngineInfo>,
        /// Answer to the probe; `None` if the probe failed.
        probe: Option<ProbeResult>,
    },
    /// The engine died, or cannot be reached.
    EngineDown {
        /// Reason in words.
        why: String,
        /// True if the agent starts the engine again.
        will_restart: bool,
    },
    /// The engine said how busy it is.
    UtilizationPolled(Utilization),
    /// A request at the engine ended.
    RequestEnded {
        /// The attempt of the request.
        attempt: AttemptId,
        /// Reason of the end.
        end: RequestEnd,
    },

    // The link
    /// A message came on the control stream.
    ManagerSaid {
        /// Name of the link.
        link: LinkId,
        /// The message.
        kind: pb::to_agent::Kind,
    },
    /// A message came on the Data stream.
    DataCame {
        /// Name of the link.
        link: LinkId,
        /// The message.
        kind: pb::data_to_agent::Kind,
    },
    /// The Data stream is open.
    Bound {
        /// Name of the link.
        link: LinkId,
    },
    /// The connection to the manager is gone.
    LinkLost {
        /// Name of the link.
        link: LinkId,
        /// Reason in words.
        why: String,
        /// True if no later dial can succeed: wrong token, wrong protocol.
        fatal: bool,
    },

    // Weights
    /// A fetch moved bytes; about ten times a second.
    FetchProgressed {
        /// Id of the load order.
        order: u64,
        /// Bytes moved.
        so_far: Moved,
    },
    /// A fetch ended.
    Fetched {
        /// Id of the load order.
        order: u64,
        /// The outcome; an error in words.
        result: Result<StagedVersion, String>,
    },
    /// A call to the engine was answered.
    Called {
        /// The call.
        call: Call,
        /// The outcome; an error in words.
        result: Result<(), String>,
    },
    /// The probe was answered.
    Probed {
        /// The outcome; an error in words.
        result: Result<ProbeResult, String>,
    },

    /// SIGTERM came, or the environment gave a spot notice.
    LeaveAsked {
        /// Reason in words.
        why: String,
        /// Time until the engine and the host are gone.
        within: std::time::Duration,
    },
}

/// Calls to the engine whose answer is an event. At most one of each kind is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Pause for a load, until the streams are quiet.
    PauseForLoad,
    /// Load a checkpoint.
    Load,
    /// Continue after a load.
    ContinueAfterLoad,
    /// Give GPU memory back.
    ReleaseMemory,
    /// Take GPU memory again.
    ResumeMemory,
    /// Pause, as the manager ordered.
    Pause,
    /// Continue, as the manager ordered.
    Continue,
}

/// End of one request at the engine.
#[derive(Debug)]
pub enum RequestEnd {
    /// The terminal chunk came.
    Finished {
        /// Reason of the end.
        finish: Finish,
        /// Length of the input, in tokens.
        prompt_tokens: u32,
        /// Part of the input found in the prefix cache.
        cached_tokens: u32,
    },
    /// The stream ended without a terminal chunk.
    Failed(StreamError),
}

/// Bytes that a fetch has moved so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes of the version that are verified and in place.
    pub bytes: u64,
    /// Bytes received from sources.
    pub received_bytes: u64,
    /// Bytes of the same version that this agent served to peers.
    pub served_bytes: u64,
}

/// A version that is complete on this host and fits the engine's layout.
#[derive(Clone, Debug, PartialEq)]
pub struct StagedVersion {
    /// Directory with the checkpoint, for the engine to read.
    pub directory: PathBuf,
    /// Size of the version, in bytes.
    pub bytes: u64,
    /// Bytes received, by holder.
    pub from: BTreeMap<String, u64>,
    /// True if peers can fetch the version from this agent.
    pub holds: bool,
}

/// Answer to the fixed probe prompt, generated greedily: equal weights give equal
/// log-probabilities.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProbeResult {
    /// Generated token ids.
    pub ids: Vec<u32>,
    /// Log-probability of each id.
    pub logprobs: Vec<f32>,
}
