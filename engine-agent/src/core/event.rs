//! Everything that can happen to an agent, in the past tense, except tokens: those take the short
//! way, [`super::Core::tokens`].

use std::collections::BTreeMap;
use std::path::PathBuf;

use anabranch_proto::pb;

use crate::engine::{AttemptId, EngineInfo, Finish, StreamError, Utilization};

/// One dialled connection to the manager; what a former one still says is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId(pub u64);

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "handled where it is made, never queued")]
pub enum Event {
    // The engine
    /// It answers. Also after it died and came back.
    EngineUp {
        info: Box<EngineInfo>,
        probe: Option<ProbeResult>,
    },
    EngineDown {
        why: String,
        will_restart: bool,
    },
    UtilizationPolled(Utilization),
    RequestEnded {
        attempt: AttemptId,
        end: RequestEnd,
    },

    // The link
    ManagerSaid {
        link: LinkId,
        kind: pb::to_agent::Kind,
    },
    DataCame {
        link: LinkId,
        kind: pb::data_to_agent::Kind,
    },
    /// The Data stream stands.
    Bound {
        link: LinkId,
    },
    LinkLost {
        link: LinkId,
        why: String,
        /// The manager cannot be spoken to at all (wrong token, wrong protocol): no use in trying
        /// again.
        fatal: bool,
    },

    // Weights
    FetchProgressed {
        order: u64,
        so_far: Moved,
    },
    Fetched {
        order: u64,
        result: Result<StagedVersion, String>,
    },
    Called {
        call: Call,
        result: Result<(), String>,
    },
    Probed {
        result: Result<ProbeResult, String>,
    },

    /// SIGTERM, or a spot notice that the environment gave.
    LeaveAsked {
        why: String,
        within: std::time::Duration,
    },
}

/// Which engine call an answer belongs to. One of each is out at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Of a load: pause and let the streams run dry.
    PauseForLoad,
    Load,
    /// Of a load.
    ContinueAfterLoad,
    ReleaseMemory,
    ResumeMemory,
    Pause,
    Continue,
}

/// How one request at the engine ended.
#[derive(Debug)]
pub enum RequestEnd {
    Finished { finish: Finish, prompt_tokens: u32, cached_tokens: u32 },
    Failed(StreamError),
}

/// What a fetch has moved until now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Verified, in place.
    pub bytes: u64,
    /// Over the links.
    pub received_bytes: u64,
    /// Of the same version, to peers.
    pub served_bytes: u64,
}

/// A version on this host, whole and checked against the baseline.
#[derive(Clone, Debug, PartialEq)]
pub struct StagedVersion {
    pub directory: PathBuf,
    pub bytes: u64,
    /// Holder -> bytes.
    pub from: BTreeMap<String, u64>,
    /// Peers can fetch it here.
    pub holds: bool,
}

/// Greedy tokens of the fixed probe prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProbeResult {
    pub ids: Vec<u32>,
    pub logprobs: Vec<f32>,
}
