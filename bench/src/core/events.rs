//! Events for the core, as the driver would make them of messages. The one file here that builds the manager's event
//! types; owns no state.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anabranch_manager::event::{
    Announce, EngineHello, LogprobsMode, Model, NewGroup, OnExceed, OnRunning, OpenJob, Pack,
    SeedKeying, Shard, Staleness,
};
pub use anabranch_manager::event::{
    ConsumerId, Event, LinkId, LoadReport, LoadStage, ModeReport, PublisherId, ReplyTo, Sampling,
};
use anabranch_manager::ledger::Fact;
use anabranch_proto::{EngineId, Incarnation, OrderId, Root, SessionId, Step, Version, tokens};
use bytes::Bytes;

/// The reply of an event whose answer is looked at by its content only.
pub const REPLY: ReplyTo = ReplyTo(1);
pub const CONSUMER: ConsumerId = ConsumerId(1);
pub const PUBLISHER: PublisherId = PublisherId(1);
/// Bytes of credit that the consumer starts with; each batch gives back what it took.
pub const CREDIT_BYTES: u64 = 1 << 30;
/// Samples of credit that the consumer starts with.
pub const CREDIT_SAMPLES: u64 = 1 << 16;
pub const VOCAB: u32 = 32_000;
const EOS: u32 = 2;
const PROMPT_TOKENS: u32 = 64;
/// Above what any sample comes to: the fleet ends samples by a stop id.
const MAX_TOKENS: u32 = 100_000;

/// Name of an event's row in the report.
pub fn kind(event: &Event) -> &'static str {
    match event {
        Event::JobOpened { .. } => "job opened",
        Event::TrainerHeard => "trainer heard",
        Event::GroupsSubmitted { .. } => "groups submitted",
        Event::ConsumerAttached { .. } => "consumer attached",
        Event::CreditGranted { .. } => "credit granted",
        Event::BatchAcked { .. } => "batch acked",
        Event::BatchCommitted { .. } => "batch committed",
        Event::ModeRequested { .. } => SWITCH_ASKED,
        Event::ModeReported { .. } => SWITCH_DONE,
        Event::EngineReported { .. } => "engine attested",
        Event::VersionAnnounced { .. } => "version announced",
        Event::VersionSealed { .. } => SEALED,
        Event::EngineAttached { .. } => "engine attached",
        Event::LinkLost { .. } => "link lost",
        Event::EngineHeard { .. } => "engine heard",
        Event::EngineBeat { .. } => BEAT,
        Event::EngineDied { .. } => "engine died",
        Event::LoadReported { .. } => "load reported",
        Event::FactsFound { facts, .. } => kind_of_facts(facts),
        Event::SilenceFound { .. } => "silence found",
        Event::PageCleared { .. } => "page cleared",
        Event::PageFrozen { .. } => "page frozen",
        Event::TimePassed { .. } => "time passed",
        _ => "other",
    }
}

pub const BEAT: &str = "engine beat";
pub const SEALED: &str = "version sealed";
pub const SWITCH_ASKED: &str = "mode requested";
pub const SWITCH_DONE: &str = "mode reported";

fn kind_of_facts(facts: &[Fact]) -> &'static str {
    let ended = |fact: &Fact| matches!(fact, Fact::Ended { .. });
    let finished = |fact: &Fact| matches!(fact, Fact::Finished { .. });
    match facts {
        facts if facts.iter().any(ended) => "facts, some ended",
        facts if facts.iter().any(finished) => "facts, some finished",
        _ => "facts of growth",
    }
}

/// Samples that come in with the event itself.
pub fn brings(event: &Event) -> u64 {
    match event {
        Event::GroupsSubmitted { groups, .. } => groups.iter().map(|g| u64::from(g.n)).sum(),
        _ => 0,
    }
}

/// An on-policy job whose running samples go on under the next version.
pub fn job_opened(seed: u64) -> Event {
    let open = OpenJob {
        job: "bench".into(),
        epoch: 0,
        model: Model::default(),
        logprobs_mode: LogprobsMode::Tempered,
        staleness: Staleness { max_lag: Some(0), on_exceed: OnExceed::Wait },
        on_running: OnRunning::Continue,
        on_trainer_lost: Duration::from_secs(600),
        resume: None,
        seed,
        rolling: None,
        join: false,
    };
    Event::JobOpened { open: Box::new(open), reply: REPLY }
}

pub fn consumer_attached(session: SessionId) -> Event {
    let max_wait = Some(Duration::from_millis(200));
    let pack = Pack { min: 64, multiple_of: 1, whole_groups: false, max_wait };
    let shard = Shard { index: 0, count: 1 };
    Event::ConsumerAttached { session, consumer: CONSUMER, pack, shard }
}

/// Groups of `n` samples with prompts of their own, numbered from `first`.
pub fn submitted(
    session: SessionId,
    step: Step,
    is_final: bool,
    keys: std::ops::Range<u64>,
    n: u32,
    sampling: &Arc<Sampling>,
) -> Event {
    let group = |key: u64| NewGroup {
        key: format!("g{key}"),
        prompt: prompt(key),
        n,
        sampling: sampling.clone(),
        pin: None,
        priority: 0,
        deadline: None,
        meta: Bytes::new(),
        session: String::new(),
    };
    let groups = keys.map(group).collect();
    Event::GroupsSubmitted { session, step, is_final, groups, reply: REPLY }
}

fn prompt(key: u64) -> Bytes {
    let id = |at: u32| 3 + (key.wrapping_mul(31).wrapping_add(u64::from(at)) % 30_000) as u32;
    tokens::encode_ids(&(0..PROMPT_TOKENS).map(id).collect::<Vec<u32>>())
}

pub fn sampling() -> Arc<Sampling> {
    Arc::new(Sampling::new(MAX_TOKENS))
}

pub fn mode_requested(session: SessionId, train: bool) -> Event {
    Event::ModeRequested { session, train, deadline: Duration::from_secs(10), reply: REPLY }
}

/// Says that the trainer has loaded `version` into a colocated engine.
pub fn attested(session: SessionId, engine: EngineId, version: Version) -> Event {
    Event::EngineReported { session, engine, version, reply: REPLY }
}

/// Version `number` of the bench's job; equal numbers have equal roots.
pub fn version(number: u64) -> Version {
    let mut root = [0; 32];
    root[..8].copy_from_slice(&number.to_le_bytes());
    Version { epoch: 0, number, root: Root(root) }
}

pub fn announced(session: SessionId, number: u64) -> Event {
    let announce = Announce {
        session,
        version: Version { root: Root::default(), ..version(number) },
        addresses: vec!["10.0.0.9:7000".into()],
        dials: false,
        bytes: 1 << 34,
        directory: None,
        sender: None,
    };
    Event::VersionAnnounced { publisher: PUBLISHER, announce: Box::new(announce), reply: REPLY }
}

pub fn sealed(number: u64) -> Event {
    Event::VersionSealed { publisher: PUBLISHER, version: version(number), reply: REPLY }
}

/// A fresh life of an engine; colocated ones are loaded by the trainer.
pub fn attached(
    link: LinkId,
    id: &EngineId,
    incarnation: u64,
    colocated: bool,
    seats: u32,
) -> Event {
    let label = colocated.then(|| ("colocated".to_owned(), "true".to_owned()));
    let hello = EngineHello {
        id: id.clone(),
        incarnation: Incarnation(incarnation),
        model: Model { id: "bench".into(), vocab: VOCAB, eos_ids: vec![EOS], ..Model::default() },
        logprobs_modes: vec![LogprobsMode::Tempered],
        seed_keying: SeedKeying::AbsolutePosition,
        columns: vec![],
        release_memory: true,
        weights_by_trainer: colocated,
        kv_tokens: 0,
        max_running: seats,
        gpus: 1,
        labels: label.into_iter().collect(),
        addresses: vec!["10.0.0.1:9000".into()],
        host: None,
        held: vec![],
        loaded: Version::base(0),
        resume: None,
        manager_epoch: 1,
        kind: "bench".into(),
        proto: 1,
    };
    Event::EngineAttached { link, hello: Box::new(hello) }
}

pub fn load_reported(
    session: SessionId,
    order: OrderId,
    version: Version,
    stage: LoadStage,
) -> Event {
    let report = LoadReport {
        order,
        version,
        stage,
        bytes: 0,
        error: String::new(),
        probe: None,
        fetched_from: BTreeMap::new(),
        holds: stage >= LoadStage::Staged,
        ingress: 0,
        egress: 0,
        served: 0,
    };
    Event::LoadReported { session, report: Box::new(report) }
}

pub fn mode_reported(session: SessionId, order: OrderId) -> Event {
    let report =
        ModeReport { ok: true, drained: true, memory_released: true, error: String::new() };
    Event::ModeReported { session, order, report }
}

pub fn beat(session: SessionId, running: u32) -> Event {
    Event::EngineBeat { session, running, waiting: 0, kv_used: 0.5 }
}
