//! Everything that can happen to the deciding core, in the past tense. The driver makes these out of
//! messages; the simulation makes them out of a seed. No token is ever in one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{
    BatchSeq, EngineId, Incarnation, OrderId, SampleId, SessionId, Step, Version,
};
pub use anabranch_proto::{
    Held, LoadStage, LogprobsMode, Model, OnExceed, OnRunning, Pack, ProbeResult, Replay, Sampling,
    SeedKeying, SenderOf, Shard, Staleness, Verdict,
};
use bytes::Bytes;

use crate::ledger::{Fact, Silent};

/// Whom an answer goes to. The driver keeps the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReplyTo(pub u64);

/// One Control stream. A re-attached agent has a new link and, if it was in time, its old session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// One Consume stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConsumerId(pub u64);

/// One Publish stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PublisherId(pub u64);

#[derive(Debug)]
pub enum Event {
    // The trainer
    JobOpened {
        open: Box<OpenJob>,
        reply: ReplyTo,
    },
    /// A trainer said anything at all (driver: at most every 100 ms).
    TrainerHeard,
    JobClosed {
        session: SessionId,
        cancel_running: bool,
        reply: ReplyTo,
    },
    GroupsSubmitted {
        session: SessionId,
        step: Step,
        is_final: bool,
        groups: Vec<NewGroup>,
        reply: ReplyTo,
    },
    GroupsCancelled {
        session: SessionId,
        what: CancelWhat,
        keep_partial: bool,
        reply: ReplyTo,
    },
    ConsumerAttached {
        session: SessionId,
        consumer: ConsumerId,
        pack: Pack,
        shard: Shard,
    },
    ConsumerLost {
        consumer: ConsumerId,
    },
    CreditGranted {
        consumer: ConsumerId,
        bytes: u64,
        samples: u64,
    },
    BatchAcked {
        consumer: ConsumerId,
        seq: BatchSeq,
    },
    BatchCommitted {
        consumer: ConsumerId,
        seq: BatchSeq,
    },
    ModeRequested {
        session: SessionId,
        train: bool,
        deadline: Duration,
        reply: ReplyTo,
    },
    EngineReported {
        session: SessionId,
        engine: EngineId,
        version: Version,
        reply: ReplyTo,
    },
    VersionAnnounced {
        publisher: PublisherId,
        announce: Box<Announce>,
        reply: ReplyTo,
    },
    VersionSealed {
        publisher: PublisherId,
        version: Version,
        reply: ReplyTo,
    },
    PublisherLost {
        publisher: PublisherId,
    },

    // Engines
    EngineAttached {
        link: LinkId,
        hello: Box<EngineHello>,
    },
    LinkLost {
        link: LinkId,
        why: &'static str,
    },
    /// Any byte came from it (driver: at most every 100 ms). `tokens`: new ones in the ledger since the last word.
    EngineHeard {
        session: SessionId,
        tokens: u64,
    },
    EngineBeat {
        session: SessionId,
        running: u32,
        waiting: u32,
        kv_used: f32,
    },
    EngineDied {
        session: SessionId,
        why: String,
    },
    PreemptionNoticed {
        session: SessionId,
        within: Duration,
        why: String,
    },
    LoadReported {
        session: SessionId,
        report: Box<LoadReport>,
    },
    ModeReported {
        session: SessionId,
        order: OrderId,
        report: ModeReport,
    },
    /// What the ledger made of a tick.
    FactsFound {
        session: SessionId,
        facts: Vec<Fact>,
    },
    /// What the ledger's sweep found: attempts that have made no token for the ledger's patience.
    SilenceFound {
        session: SessionId,
        silent: Vec<Silent>,
    },
    /// The ledger has thrown a sample's tokens away.
    PageCleared {
        sample: SampleId,
        tokens: u32,
    },
    /// The ledger has ended a sample as it was. Not said where the sample had finished: then that fact is on its way.
    PageFrozen {
        sample: SampleId,
        kept: u32,
        oldest: u64,
    },

    // People
    DrainRequested {
        engine: EngineId,
        deadline: Duration,
        reply: ReplyTo,
    },
    RemoveRequested {
        engine: EngineId,
        reply: ReplyTo,
    },

    // The clock
    /// A deadline may have come. Also sent after the process itself was stopped for `gap`: leases are extended by it.
    TimePassed {
        gap: Duration,
    },
}

#[derive(Clone, Debug)]
pub struct OpenJob {
    pub job: String,
    pub epoch: u32,
    pub model: Model,
    pub logprobs_mode: LogprobsMode,
    pub staleness: Staleness,
    pub on_running: OnRunning,
    pub on_trainer_lost: Duration,
    pub resume: Option<BatchSeq>,
    pub seed: u64,
    /// `None`: all engines at once; else how many keep serving while others load.
    pub rolling: Option<u32>,
    /// Takes the job's settings as they are; else settings that differ are refused.
    pub join: bool,
}

#[derive(Clone, Debug)]
pub struct NewGroup {
    pub key: String,
    /// u32 LE column.
    pub prompt: Bytes,
    pub n: u32,
    pub sampling: Arc<Sampling>,
    pub pin: Option<Version>,
    pub priority: i32,
    pub deadline: Option<Duration>,
    pub meta: Bytes,
    pub session: String,
}

#[derive(Clone, Debug)]
pub enum CancelWhat {
    Keys(Vec<String>),
    Step(Step),
    All,
}

#[derive(Clone, Debug)]
pub struct Announce {
    pub session: SessionId,
    /// Root not known yet.
    pub version: Version,
    pub addresses: Vec<String>,
    /// True where the publisher cannot be dialled; told to, it dials receivers.
    pub dials: bool,
    pub bytes: u64,
    /// Every engine host can read it; then nothing is fetched.
    pub directory: Option<String>,
    /// Set where the publisher is not the only one of the version.
    pub sender: Option<SenderOf>,
}

#[derive(Clone, Debug)]
pub struct EngineHello {
    pub id: EngineId,
    pub incarnation: Incarnation,
    pub model: Model,
    pub logprobs_modes: Vec<LogprobsMode>,
    pub seed_keying: SeedKeying,
    pub columns: Vec<String>,
    pub release_memory: bool,
    /// The trainer loads and attests it; it never gets a load order.
    pub weights_by_trainer: bool,
    pub kv_tokens: u64,
    pub max_running: u32,
    pub gpus: u32,
    pub labels: BTreeMap<String, String>,
    pub addresses: Vec<String>,
    /// The same for all agents that can pass memory to each other.
    pub host: Option<String>,
    pub held: Vec<Held>,
    pub loaded: Version,
    /// The session it had before its link broke.
    pub resume: Option<SessionId>,
    pub manager_epoch: u64,
    pub kind: String,
    pub proto: u32,
}

#[derive(Clone, Debug)]
pub struct LoadReport {
    pub order: OrderId,
    pub version: Version,
    pub stage: LoadStage,
    pub bytes: u64,
    pub error: String,
    pub probe: Option<ProbeResult>,
    pub fetched_from: BTreeMap<String, u64>,
    pub holds: bool,
    /// Peaks of this fetch, bytes/s; 0: not measured.
    pub ingress: u64,
    pub egress: u64,
    /// Bytes of this version given to peers until now.
    pub served: u64,
}

#[derive(Clone, Debug)]
pub struct ModeReport {
    pub ok: bool,
    pub drained: bool,
    pub memory_released: bool,
    pub error: String,
}
