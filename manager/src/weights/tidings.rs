//! Tidings: what publishers are told of their versions, and the progress of each engine that it is made of. A status
//! holds every engine, so that a version's publishers are told at most every 100 ms, and last of the newest.

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_proto::{EngineId, Version};
use anabranch_runtime::clock::Now;

use super::Weights;
use super::versions::{Progress, VersionLive, VersionRecord};
use crate::action::{Action, OnEngine, VersionStatus};
use crate::event::LoadStage;
use crate::outbox::Outbox;
use crate::timer::Timer;

/// Between two statuses of a version.
const EVERY: Duration = Duration::from_millis(100);

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
        live.note(engine, progress);
        self.has_news(now, version, out);
    }

    /// The publishers of a version are to be told how it stands, at once or with what else comes within 100 ms.
    pub(super) fn has_news(&mut self, now: Now, version: Version, out: &mut Outbox) {
        let told = self.books.get(version.number).and_then(|record| record.live().told);
        let due = told.map_or(now, |told| now.max(told + EVERY));
        out.set_if_unset(Timer::Tidings(version.number), due);
    }

    /// `Err` where the counts by stage do not agree with the engines.
    pub fn check_stages(&self) -> Result<(), String> {
        let wrong = self.books.iter().find(|r| r.live().count_stages() != r.live().stages);
        wrong.map_or(Ok(()), |record| {
            Err(format!("{}: the counts by stage do not agree with the engines", record.version()))
        })
    }

    /// Tells the publishers of a version how it stands.
    pub fn tell_publishers(&mut self, now: Now, number: u64, out: &mut Outbox) {
        if let Some(live) = self.books.live_mut(number) {
            live.told = Some(now);
        }
        let Some(record) = self.books.get(number) else { return };
        let status = status_of(record);
        for publisher in record.publishers() {
            out.act(Action::TellPublisher { publisher, status: status.clone() });
        }
    }
}

impl VersionLive {
    /// Progress of an engine, and the counts by stage.
    fn note(&mut self, engine: &EngineId, progress: Progress) {
        *self.stages.entry(progress.stage).or_default() += 1;
        let Some(before) = self.engines.insert(engine.clone(), progress) else { return };
        if let Some(count) = self.stages.get_mut(&before.stage) {
            *count -= 1;
            if *count == 0 {
                self.stages.remove(&before.stage);
            }
        }
    }

    /// Engines by stage, counted anew.
    fn count_stages(&self) -> BTreeMap<LoadStage, u32> {
        let mut stages = BTreeMap::new();
        for progress in self.engines.values() {
            *stages.entry(progress.stage).or_default() += 1;
        }
        stages
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
