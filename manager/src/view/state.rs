//! What a person or a script may see: every state machine, serialised from the same enums that decide.
//! No prompts, no tokens.

use std::collections::BTreeMap;

use anabranch_proto::Version;
use anabranch_runtime::clock::Now;
use serde::Serialize;

use crate::core::Core;
use crate::event::{LoadStage, Staleness};
use crate::fleet::{Engine, EngineState};
use crate::rollout::{Rank, StepBook};
use crate::weights::{Progress, VersionRecord, VersionState};

/// Totals since the manager started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Tokens that engines made and we kept.
    pub tokens: u64,
    pub finished: u64,
    pub delivered: u64,
    pub delivered_tokens: u64,
    pub committed: u64,
    pub abandoned: u64,
    pub dropped: u64,
    /// Times a sample left an engine before it was finished.
    pub migrations: u64,
    /// Tokens they took along.
    pub moved_tokens: u64,
    pub restarts: u64,
    /// Tokens thrown away by restarts, to be made again.
    pub regenerated_tokens: u64,
    pub engine_deaths: u64,
    pub misbehaved: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct StateView {
    pub uptime_ms: u64,
    pub job: Option<JobView>,
    pub current: Version,
    /// Sealed, and waiting for older groups to end.
    pub pending: Option<Version>,
    pub training: bool,
    pub engines: Vec<EngineView>,
    pub versions: Vec<VersionView>,
    pub steps: Vec<StepView>,
    pub samples: SamplesView,
    pub queue: QueueView,
    pub egress: EgressView,
    pub admitted_tokens: u64,
    pub admission_limit: u64,
    pub counters: Counters,
}

#[derive(Clone, Debug, Serialize)]
pub struct JobView {
    pub name: String,
    pub epoch: u32,
    pub staleness: Staleness,
    pub logprobs_mode: crate::event::LogprobsMode,
    pub on_running: crate::event::OnRunning,
    pub trainers: usize,
    pub paused: bool,
    pub trainer_heard_ms: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct EngineView {
    pub id: String,
    pub incarnation: u64,
    pub session: u64,
    #[serde(flatten)]
    pub state: EngineState,
    pub version: Option<Version>,
    pub connected: bool,
    pub kind: String,
    pub gpus: u32,
    pub colocated: bool,
    pub running: usize,
    pub committed_tokens: u64,
    pub kv_tokens: u64,
    pub kv_used: f32,
    pub tokens: u64,
    pub joined_ms: u64,
    pub heard_ms: u64,
    pub load: Option<LoadView>,
    /// Why the last load failed, until one succeeds.
    pub load_error: String,
    pub holds: Vec<Version>,
    pub preemptible: bool,
    /// Bytes/s, as its fetches showed.
    pub ingress: Option<u64>,
    pub egress: Option<u64>,
    pub reserved: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct LoadView {
    pub version: Version,
    pub stage: LoadStage,
    pub bytes: u64,
    pub total: u64,
    pub ms: u64,
    /// Planned parents, by stripe.
    pub parents: Vec<String>,
    pub fetched_from: BTreeMap<String, u64>,
    pub error: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct VersionView {
    pub version: Version,
    pub state: VersionState,
    pub bytes: u64,
    pub settled: bool,
    pub at_trainer: bool,
    pub engines: BTreeMap<String, ProgressView>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ProgressView {
    pub stage: LoadStage,
    pub bytes: u64,
    pub since_sealed_ms: u64,
    pub error: String,
    /// Planned, by stripe.
    pub parents: Vec<String>,
    pub fetched_from: BTreeMap<String, u64>,
    /// Bytes to peers, until its own load was done.
    pub served: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct StepView {
    pub step: u64,
    pub is_final: bool,
    pub over: bool,
    pub groups: usize,
    pub open_groups: u32,
    pub pooled: usize,
    pub delivered: u64,
    pub tokens: u64,
    pub discarded_tokens: u64,
    pub max_lag: u64,
    pub short: usize,
    pub dropped: usize,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct SamplesView {
    pub waiting: u64,
    pub running: u64,
    pub finished: u64,
    pub delivered: u64,
    pub abandoned: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct QueueView {
    pub resumed: usize,
    pub fresh: usize,
    pub held: usize,
    /// Why nothing is placed, where that is so.
    pub blocked: Option<&'static str>,
}

#[derive(Clone, Debug, Serialize)]
pub struct EgressView {
    pub offered: u64,
    pub acked: u64,
    pub committed: u64,
    pub retained_batches: usize,
    pub consumers: bool,
}

impl Core {
    /// A picture of everything; costs a walk over all engines, so not for every event.
    pub fn state(&self, now: Now) -> StateView {
        let books = self.rollout.books();
        StateView {
            uptime_ms: self.uptime(now).as_millis() as u64,
            job: self.job_view(now),
            current: self.weights.current(),
            pending: self.weights.books().pending(),
            training: self.fleet.books().training(),
            engines: self.fleet.engines().map(|engine| self.engine_view(engine, now)).collect(),
            versions: self.weights.books().iter().map(version_view).collect(),
            steps: self.step_views(),
            samples: samples_view(books.counts()),
            queue: self.queue_view(),
            egress: EgressView {
                offered: books.last().0,
                acked: books.acked().0,
                committed: books.floor().0,
                retained_batches: books.retained(),
                consumers: self.rollout.egress().has_consumers(),
            },
            admitted_tokens: books.admitted_tokens(),
            admission_limit: self.config.admission_tokens,
            counters: self.counters(),
        }
    }

    pub fn counters(&self) -> Counters {
        self.out.counters
    }

    fn job_view(&self, now: Now) -> Option<JobView> {
        self.job.as_ref().map(|job| JobView {
            name: job.name.clone(),
            epoch: job.epoch,
            staleness: job.staleness,
            logprobs_mode: job.logprobs_mode,
            on_running: job.on_running,
            trainers: job.sessions.len(),
            paused: job.paused,
            trainer_heard_ms: now.since(job.last_heard).as_millis() as u64,
        })
    }

    fn engine_view(&self, engine: &Engine, now: Now) -> EngineView {
        let (ingress, egress) = self.weights.rates(&engine.id);
        EngineView {
            id: engine.id.to_string(),
            incarnation: engine.hello.incarnation.0,
            session: engine.session.0,
            state: engine.state().clone(),
            version: engine.version(),
            connected: engine.link.is_some(),
            kind: engine.hello.kind.clone(),
            gpus: engine.hello.gpus,
            colocated: engine.is_colocated(),
            running: engine.running.len(),
            committed_tokens: engine.committed_tokens,
            kv_tokens: engine.hello.kv_tokens,
            kv_used: engine.kv_used,
            tokens: engine.tokens,
            joined_ms: now.since(engine.joined).as_millis() as u64,
            heard_ms: now.since(engine.heard).as_millis() as u64,
            load: self.weights.load_of(engine.session).map(|load| LoadView {
                version: load.version,
                stage: load.stage,
                bytes: load.bytes,
                total: load.total,
                ms: now.since(load.ordered).as_millis() as u64,
                parents: self.weights.parent_names(&load.feed.parents),
                fetched_from: load.fetched_from.clone(),
                error: load.error.clone(),
            }),
            load_error: self.weights.load_error(engine.session).to_owned(),
            holds: self.weights.holds(engine.session),
            preemptible: self.fleet.is_preemptible(engine),
            ingress,
            egress,
            reserved: engine.reserved.is_some(),
        }
    }

    fn step_views(&self) -> Vec<StepView> {
        let view = |(step, book): (anabranch_proto::Step, &StepBook)| StepView {
            step: step.0,
            is_final: book.is_final,
            over: book.over,
            groups: book.groups.len(),
            open_groups: book.open_groups,
            pooled: self.rollout.pooled(step),
            delivered: book.delivered,
            tokens: book.tokens,
            discarded_tokens: book.discarded_tokens,
            max_lag: book.max_lag,
            short: book.short.len(),
            dropped: book.dropped.len(),
        };
        self.rollout.books().steps().map(view).collect()
    }

    fn queue_view(&self) -> QueueView {
        let queue = self.rollout.queue();
        let blocked = match &self.job {
            _ if queue.is_empty() => None,
            Some(job) if job.paused => Some("the trainer is lost"),
            _ if self.fleet.all_gone() => Some("no engine is attached"),
            _ if !self.fleet.any_serving() => Some("no engine serves yet"),
            _ if self.weights.books().pending().is_some() => {
                Some("a new version waits for older groups to end; new groups wait for it")
            }
            _ => Some("no engine has room, or none has the version, context or features they need"),
        };
        QueueView {
            resumed: queue.count(Rank::Resumed),
            fresh: queue.count(Rank::Fresh),
            held: queue.count(Rank::Held),
            blocked,
        }
    }
}

fn samples_view([waiting, running, finished, delivered, abandoned]: [u64; 5]) -> SamplesView {
    SamplesView { waiting, running, finished, delivered, abandoned }
}

fn version_view(record: &VersionRecord) -> VersionView {
    let progress = |p: &Progress| ProgressView {
        stage: p.stage,
        bytes: p.bytes,
        since_sealed_ms: p.since_sealed.as_millis() as u64,
        error: p.error.clone(),
        parents: p.parents.clone(),
        fetched_from: p.fetched_from.clone(),
        served: p.served,
    };
    let engines = &record.live().engines;
    VersionView {
        version: record.version(),
        state: record.state(),
        bytes: record.bytes(),
        settled: record.settled(),
        at_trainer: record.is_served(),
        engines: engines.iter().map(|(id, p)| (id.to_string(), progress(p))).collect(),
    }
}
