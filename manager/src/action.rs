//! Everything the deciding core can ask for, in the imperative. The driver carries it out in order.

use std::sync::Arc;
use std::time::Duration;

pub use anabranch_proto::Finish;
use anabranch_proto::{
    Attempt, BatchSeq, EngineId, LogprobsMode, OrderId, SampleId, SessionId, Step, Version,
};
use bytes::Bytes;

use super::event::{
    ConsumerId, Held, LinkId, OnRunning, ProbeResult, PublisherId, ReplyTo, Sampling,
};
use crate::ledger::{Maker, StopRules};

pub use anabranch_views::Notice;

#[derive(Debug)]
pub enum Action {
    // Ledger
    /// A sample was admitted: the ledger opens its page.
    OpenPage {
        sample: SampleId,
        rules: Arc<StopRules>,
    },
    /// `Ledger::begin`, then send `Start` with the kept tokens it returns (and the prompt, if this session
    /// has not had it). If the ledger says the sample is finished already, do nothing: the fact is on its way.
    Start(Box<StartOrder>),
    /// The page's tokens are thrown away: the sample restarts from its prompt. Answered by `PageCleared`, unless the sample
    /// had finished.
    ClearPage {
        sample: SampleId,
    },
    /// The sample ends as it is (cancelled): what its engine still sends is stale. Answered by `PageFrozen`, unless it had finished.
    FreezePage {
        sample: SampleId,
    },
    /// Nobody will ask for these again.
    Forget {
        samples: Vec<SampleId>,
    },

    // Engines
    Welcome {
        link: LinkId,
        session: SessionId,
        lease: Duration,
        keep: Vec<Held>,
        drop: Vec<Held>,
        serve_key: [u8; 32],
    },
    /// Says why, then closes the link.
    Refuse {
        link: LinkId,
        why: String,
        retry_after: Option<Duration>,
    },
    /// Closes the link of a session that is over; forget its prompts and unsent messages.
    EndSession {
        session: SessionId,
        why: String,
    },
    Stop {
        session: SessionId,
        sample: SampleId,
        attempt: Attempt,
        why: &'static str,
    },
    ForgetPrompt {
        session: SessionId,
        digest: u64,
    },
    OrderLoad(Box<LoadOrder>),
    CancelLoad {
        session: SessionId,
        order: OrderId,
    },
    OrderMode {
        session: SessionId,
        order: OrderId,
        mode: ModeKind,
        deadline: Duration,
        why: String,
    },

    // Trainer
    Reply {
        to: ReplyTo,
        answer: Answer,
    },
    /// Build the parts of a batch (or of a shard of it) from the ledger and send them.
    Deliver {
        consumer: ConsumerId,
        batch: Arc<Batch>,
        samples: Vec<usize>,
    },
    StepDone {
        consumer: ConsumerId,
        report: Arc<StepReport>,
    },
    CloseConsumer {
        consumer: ConsumerId,
        why: String,
    },
    /// Tell a trainer that cannot be dialled to offer its streams to a receiver.
    DialReceiver(Box<DialOrder>),
    /// Tell the publisher how a version is doing.
    TellPublisher {
        publisher: PublisherId,
        status: VersionStatus,
    },

    // The world
    Emit(Notice),
}

#[derive(Clone, Debug)]
pub struct StartOrder {
    pub session: SessionId,
    pub maker: Arc<Maker>,
    pub sample: SampleId,
    pub attempt: Attempt,
    pub prompt: Bytes,
    pub prompt_digest: u64,
    pub sampling: Arc<Sampling>,
    /// EOS and stop ids together.
    pub stop_ids: Arc<[u32]>,
    pub seed: u64,
    pub min_version: Version,
    pub max_version: Option<Version>,
    pub conversation: String,
}

#[derive(Clone, Debug)]
pub struct LoadOrder {
    pub session: SessionId,
    pub order: OrderId,
    pub version: Version,
    /// Planned parents first, then fallbacks.
    pub sources: Vec<Holder>,
    /// 0: no plan, any source alike.
    pub stripe_count: u32,
    pub streams: u32,
    pub directory: Option<String>,
    pub bytes: u64,
    pub on_running: OnRunning,
    pub deadline: Duration,
    pub reference: Option<ProbeResult>,
    /// For the grants: who will fetch.
    pub receiver: EngineId,
    pub job: String,
}

/// The driver mints the grant with the receiver's key.
#[derive(Clone, Debug)]
pub struct DialOrder {
    pub publisher: PublisherId,
    pub source: String,
    pub receiver: EngineId,
    pub addresses: Vec<String>,
    pub serve_key: [u8; 32],
    pub job: String,
    pub version: Version,
    pub nonce: OrderId,
    pub streams: u32,
}

/// Holder of a version's bytes. The driver mints the grant for it with `serve_key`.
#[derive(Clone, Debug)]
pub struct Holder {
    pub name: String,
    /// Name shared by holders that have the version between them, each a part. Empty: this holder has all of it.
    pub origin: String,
    /// To tell it whom to dial.
    pub publisher: Option<PublisherId>,
    pub addresses: Vec<String>,
    /// True where the holder has no address and dials the receiver.
    pub dials: bool,
    pub serve_key: [u8; 32],
    /// Stripes for which the holder is the planned parent.
    pub stripes: Vec<u32>,
    pub fallback_for: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ModeKind {
    Drain,
    ReleaseMemory,
    ResumeMemory,
    Leave,
}

#[derive(Debug)]
pub enum Answer {
    Opened {
        session: SessionId,
        floor: BatchSeq,
        current: Version,
        serve_key: [u8; 32],
        resumed: bool,
        /// Name of the job, and what its log-probabilities mean: the job's own, whatever a joining trainer asked for.
        job: String,
        logprobs_mode: LogprobsMode,
    },
    Submitted(Vec<SubmitResult>),
    Cancelled {
        groups: u32,
        samples: u32,
    },
    ModeSet(Vec<EngineModeSet>),
    Done,
    /// For `engines drain|remove`: what happened, for a person.
    Said(String),
    /// The request was wrong or came too late; `retry` says whether the same request can succeed later.
    Failed {
        why: String,
        kind: FailKind,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailKind {
    BadRequest,
    NotFound,
    /// Another job runs, an older epoch, a session that is over.
    Conflict,
    /// Not now.
    Unavailable,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SubmitResult {
    pub key: String,
    pub verdict: SubmitVerdict,
}

#[derive(Clone, Debug, PartialEq)]
pub enum SubmitVerdict {
    Accepted,
    Duplicate,
    Rejected { why: String, retry_after: Option<Duration> },
}

#[derive(Clone, Debug)]
pub struct EngineModeSet {
    pub engine: EngineId,
    pub drained: bool,
    pub memory_released: bool,
    pub moved: u32,
    pub error: String,
}

/// A micro-batch: named samples in order. Tokens are in the ledger until it is committed.
#[derive(Debug)]
pub struct Batch {
    pub seq: BatchSeq,
    pub step: Step,
    pub last_of_step: bool,
    pub samples: Vec<BatchSample>,
}

#[derive(Clone, Debug)]
pub struct BatchSample {
    pub sample: SampleId,
    pub key: Arc<str>,
    pub meta: Bytes,
    pub seed: u64,
    pub attempts: u32,
    pub finish: Finish,
    pub offered_at: Version,
    pub discarded_tokens: u32,
    /// As the ledger counted when it ended.
    pub tokens: u32,
}

#[derive(Clone, Debug, Default)]
pub struct StepReport {
    pub step: u64,
    pub seq: BatchSeq,
    pub delivered: u64,
    pub tokens: u64,
    pub discarded_tokens: u64,
    pub max_lag: u64,
    pub short: Vec<ShortGroup>,
    pub dropped: Vec<ShortGroup>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ShortGroup {
    pub key: Arc<str>,
    pub delivered: u32,
    pub n: u32,
    pub why: String,
    pub lengths: Vec<u32>,
}

#[derive(Clone, Debug)]
pub struct VersionStatus {
    pub version: Version,
    pub state: &'static str,
    pub bytes: u64,
    pub engines: Vec<OnEngine>,
    pub settled: bool,
}

#[derive(Clone, Debug)]
pub struct OnEngine {
    pub engine: EngineId,
    pub stage: super::event::LoadStage,
    pub bytes: u64,
    pub since_sealed: Duration,
    pub error: String,
}
