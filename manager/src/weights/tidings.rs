//! Tidings: what publishers are told of their versions, and the progress of each engine that it is made of.

use std::time::Duration;

use anabranch_proto::{EngineId, Version};
use anabranch_runtime::clock::Now;

use super::Weights;
use super::versions::{Progress, VersionRecord};
use crate::action::{Action, OnEngine, VersionStatus};
use crate::event::LoadStage;
use crate::outbox::Outbox;

impl Weights {
    /// Notes how an engine gets on with a version, and tells the version's publishers.
    pub(super) fn note_progress(
        &mut self,
        now: Now,
        engine: &EngineId,
        version: Version,
        news: Progress,
        out: &mut Outbox,
    ) {
        let Some(live) = self.books.live_mut(version.number) else { return };
        let since_sealed = live.sealed.map_or(Duration::ZERO, |sealed| now.since(sealed));
        let parents = match live.engines.get(engine) {
            Some(before) if news.stage != LoadStage::Ordered => before.parents.clone(),
            _ => news.parents.clone(),
        };
        let progress = Progress { since_sealed, parents, ..news };
        live.engines.insert(engine.clone(), progress);
        self.tell_publishers(version, out);
    }

    pub(super) fn tell_publishers(&mut self, version: Version, out: &mut Outbox) {
        let Some(record) = self.books.get(version.number) else { return };
        let status = status_of(record);
        for publisher in record.publishers() {
            out.act(Action::TellPublisher { publisher, status: status.clone() });
        }
    }
}

fn status_of(record: &VersionRecord) -> VersionStatus {
    let on_engine = |(engine, p): (&EngineId, &Progress)| OnEngine {
        engine: engine.clone(),
        stage: p.stage,
        bytes: p.bytes,
        since_sealed: p.since_sealed,
        error: p.error.clone(),
    };
    VersionStatus {
        version: record.version(),
        state: record.state().name(),
        bytes: record.bytes(),
        engines: record.live().engines.iter().map(on_engine).collect(),
        settled: record.settled(),
    }
}
