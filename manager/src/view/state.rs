//! The manager's state as people and scripts see it: fills the types of `anabranch-views` from the owners.
//! Owns no field names; those are the views'. A state of an owner is converted by an exhaustive match, so that
//! a new one cannot be forgotten here.

use anabranch_proto::{EngineId, SessionId, Step};
use anabranch_runtime::clock::Now;
use anabranch_views::{
    EgressView, EngineState as ShownState, EngineView, FleetView, JobView, LoadView, ProgressView,
    QueueView, SamplesView, StatePage, StateView, StepView, VersionView,
};

use crate::core::Core;
use crate::fleet::{Engine, EngineState};
use crate::rollout::{Rank, StepBook};
use crate::weights::{Load, Progress, VersionRecord};

pub use anabranch_views::Counters;

impl Core {
    /// The whole state, with all engines. Costs a walk over all engines: for tests and the simulation.
    pub fn state(&self, now: Now) -> StateView {
        self.view(now, self.fleet.engines().collect(), None)
    }

    /// One page of the state: counts over everything, and the engines of the page with their progress.
    pub fn state_page(&self, now: Now, page: StatePage) -> StateView {
        let mut rest = self.fleet.sessions_from(SessionId(page.from()));
        let engines = rest.by_ref().take(page.limit()).collect();
        self.view(now, engines, rest.next().map(|engine| engine.session.0))
    }

    /// Totals since the manager started.
    pub fn counters(&self) -> Counters {
        self.out.counters
    }

    fn view(&self, now: Now, engines: Vec<&Engine>, next: Option<u64>) -> StateView {
        let (books, versions) = (self.rollout.books(), self.weights.books());
        StateView {
            uptime_ms: self.uptime(now).as_millis() as u64,
            job: self.job_view(now),
            current: versions.current(),
            pending: versions.pending(),
            training: self.fleet.books().training(),
            fleet: self.fleet_view(),
            versions: versions.iter().map(|record| version_view(record, &engines)).collect(),
            engines: engines.into_iter().map(|engine| self.engine_view(engine, now)).collect(),
            next,
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

    fn fleet_view(&self) -> FleetView {
        let tally = self.fleet.tally();
        let states = tally.states().iter().map(|(name, count)| ((*name).into(), *count)).collect();
        FleetView { engines: self.fleet.len(), states, serving_gpus: tally.serving_gpus() }
    }

    fn job_view(&self, now: Now) -> Option<JobView> {
        self.job.settings().map(|job| JobView {
            name: job.name.clone(),
            epoch: job.epoch,
            staleness: Some(job.staleness),
            convention: job.logprobs_mode.into(),
            on_running: job.on_running.into(),
            trainers: self.job.books().sessions().len(),
            paused: self.job.is_paused(),
            trainer_heard_ms: now.since(self.job.last_heard()).as_millis() as u64,
        })
    }

    fn engine_view(&self, engine: &Engine, now: Now) -> EngineView {
        let (ingress, egress) = self.weights.rates(&engine.id);
        let load = self.weights.load_of(engine.session);
        EngineView {
            id: engine.id.to_string(),
            incarnation: engine.hello.incarnation.0,
            session: engine.session.0,
            state: shown(engine.state()),
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
            load: load.map(|load| self.load_view(load, now)),
            load_error: self.weights.load_error(engine.session).to_owned(),
            holds: self.weights.holds(engine.session),
            preemptible: self.fleet.is_preemptible(engine),
            ingress,
            egress,
            reserved: engine.reserved.is_some(),
        }
    }

    fn load_view(&self, load: &Load, now: Now) -> LoadView {
        LoadView {
            version: load.version,
            stage: load.stage.into(),
            bytes: load.bytes,
            total: load.total,
            ms: now.since(load.ordered).as_millis() as u64,
            parents: self.weights.parent_names(&load.feed.parents),
            fetched_from: load.fetched_from.clone(),
            error: load.error.clone(),
        }
    }

    fn step_views(&self) -> Vec<StepView> {
        let view = |(step, book): (Step, &StepBook)| StepView {
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
        let blocked = match self.job.settings() {
            _ if queue.is_empty() => None,
            Some(_) if self.job.is_paused() => Some("the trainer is lost"),
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
            blocked: blocked.map(Into::into),
        }
    }
}

fn samples_view([waiting, running, finished, delivered, abandoned]: [u64; 5]) -> SamplesView {
    SamplesView { waiting, running, finished, delivered, abandoned }
}

/// The state as people read it.
fn shown(state: &EngineState) -> ShownState {
    match state {
        EngineState::Joining => ShownState::Joining,
        EngineState::Syncing { to } => ShownState::Syncing { to: *to },
        EngineState::Serving { at } => ShownState::Serving { at: *at },
        EngineState::Updating { from, to } => ShownState::Updating { from: *from, to: *to },
        EngineState::Suspect { why } => ShownState::Suspect { why: why.clone() },
        EngineState::Releasing => ShownState::Releasing,
        EngineState::Released => ShownState::Released,
        EngineState::Draining { why } => ShownState::Draining { why: why.clone() },
        EngineState::Quarantined => ShownState::Quarantined,
        EngineState::Gone { why } => ShownState::Gone { why: why.clone() },
    }
}

/// A version, with the progress of `engines` only.
fn version_view(record: &VersionRecord, engines: &[&Engine]) -> VersionView {
    let stages = record.live().stages.iter().map(|(stage, n)| ((*stage).into(), *n)).collect();
    let on = |id: &EngineId| Some((id.to_string(), progress_view(record.live().engines.get(id)?)));
    VersionView {
        version: record.version(),
        state: record.state().into(),
        bytes: record.bytes(),
        settled: record.settled(),
        at_trainer: record.is_served(),
        stages,
        engines: engines.iter().filter_map(|engine| on(&engine.id)).collect(),
    }
}

fn progress_view(progress: &Progress) -> ProgressView {
    ProgressView {
        stage: progress.stage.into(),
        bytes: progress.bytes,
        since_sealed_ms: progress.since_sealed.as_millis() as u64,
        error: progress.error.clone(),
        parents: progress.parents.clone(),
        fetched_from: progress.fetched_from.clone(),
        served: progress.served,
    }
}
