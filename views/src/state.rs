//! The manager's whole state, in pages of engines.

use std::borrow::Cow;
use std::sync::Arc;

use anabranch_proto::Version;
use serde::{Deserialize, Serialize};

use crate::engine::{EngineView, FleetView};
use crate::version::VersionView;
use crate::work::{Counters, EgressView, JobView, QueueView, SamplesView, StepView};

/// One page of the state. `engines` and `versions[].engines` belong to the page; everything else is about the
/// whole fleet and is the same on every page.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StateView {
    /// Age of the manager process.
    pub uptime_ms: u64,
    /// The job; none before a trainer opened one.
    pub job: Option<JobView>,
    /// Version that groups are generated with.
    pub current: Version,
    /// Sealed version that waits for older groups to end.
    pub pending: Option<Version>,
    /// The trainer has the colocated GPUs.
    pub training: bool,
    /// Counts over all engines.
    pub fleet: FleetView,
    /// Engines of the page, in the order of their sessions.
    pub engines: Vec<EngineView>,
    /// Session that the next page begins with; none on the last page.
    pub next: Option<u64>,
    /// The last versions, oldest first; their per-engine progress is that of the page's engines.
    pub versions: Vec<VersionView>,
    /// Steps that are not committed, oldest first.
    pub steps: Vec<StepView>,
    /// Samples by state.
    pub samples: SamplesView,
    /// The queue of samples to place.
    pub queue: QueueView,
    /// Micro-batches on their way to the trainer.
    pub egress: EgressView,
    /// Tokens that the admitted groups may need at most.
    pub admitted_tokens: u64,
    /// Bound on `admitted_tokens`.
    pub admission_limit: u64,
    /// Totals since the manager started.
    pub counters: Counters,
}

/// Answer to `GET /state`: a page of the state, and what the manager's driver knows beside its core.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StateAnswer {
    /// Release of the manager.
    pub anabranch: Cow<'static, str>,
    /// Number of the manager's life; messages from an older one are fenced off.
    pub manager_epoch: u64,
    /// The page.
    #[serde(flatten)]
    pub state: Arc<StateView>,
    /// Totals of the token ledger.
    pub ledger: LedgerView,
}

/// Totals of the token ledger since the manager started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LedgerView {
    /// Tokens appended.
    pub tokens: u64,
    /// Tokens that came a second time after a re-attach, and were dropped.
    pub repeated_tokens: u64,
    /// Tokens of an attempt that had been moved on.
    pub stale_tokens: u64,
    /// Tokens from a session that does not run the sample.
    pub foreign_tokens: u64,
    /// Tokens generated after a stop condition was met.
    pub past_stop_tokens: u64,
    /// Tokens thrown away by restarts from the prompt.
    pub cleared_tokens: u64,
    /// Tokens that attempts after the first began with.
    pub resumed_tokens: u64,
    /// Attempts ended because of malformed data.
    pub broken: u64,
    /// Samples whose tokens are kept now.
    pub pages: u64,
}

// === impl StateView ===

impl StateView {
    /// Adds a further page: its engines and their progress join those of the pages before; everything else is
    /// taken from `page`, which is newer.
    pub fn extend(&mut self, page: Self) {
        let before = std::mem::replace(self, page);
        let mut engines = before.engines;
        engines.append(&mut self.engines);
        self.engines = engines;
        for mut old in before.versions {
            // Forgotten between two pages: not shown.
            let Some(new) = self.versions.iter_mut().find(|new| new.version == old.version) else {
                continue;
            };
            old.engines.append(&mut new.engines);
            new.engines = old.engines;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::version::ProgressView;
    use anabranch_proto::LoadStage;

    fn page(engines: &[&str], uptime_ms: u64, next: Option<u64>) -> StateView {
        let version = |number| VersionView {
            version: Version { number, ..Version::default() },
            engines: engines.iter().map(|e| ((*e).to_owned(), ProgressView::default())).collect(),
            ..VersionView::default()
        };
        let engine = |id: &&str| EngineView { id: (*id).to_owned(), ..EngineView::default() };
        StateView {
            uptime_ms,
            next,
            engines: engines.iter().map(engine).collect(),
            versions: vec![version(1), version(uptime_ms)],
            ..StateView::default()
        }
    }

    #[test]
    fn pages_join_to_the_whole_and_the_newer_one_counts() {
        let mut all = page(&["a", "b"], 7, Some(3));
        all.extend(page(&["c"], 8, None));
        let ids: Vec<&str> = all.engines.iter().map(|engine| engine.id.as_str()).collect();
        assert_eq!((ids, all.uptime_ms, all.next), (vec!["a", "b", "c"], 8, None));
        let on = |at: usize| all.versions[at].engines.keys().cloned().collect::<Vec<_>>();
        assert_eq!(on(0), ["a", "b", "c"]);
        assert_eq!((on(1), all.versions[1].version.number), (vec!["c".to_owned()], 8));
    }

    #[test]
    fn a_state_of_another_manager_version_is_read_as_far_as_it_goes() {
        let v7 = format!(r#"{{"epoch": 2, "number": 7, "root": "{}"}}"#, "00".repeat(32));
        let text = r#"{"uptime_ms": 5, "novelty": {"a": 1}, "current": V7,
            "job": {"name": "j", "staleness": {"max_lag": 2, "on_exceed": "ponder"}, "on_running": "merge"},
            "engines": [{"id": "e1", "state": "updating", "from": V7, "to": V7, "running": 3},
                        {"id": "e2", "state": "hibernating", "until": 5}],
            "versions": [{"version": V7, "state": "frozen", "engines": {"e1": {"stage": "loading"},
                                                                        "e2": {"stage": "warming"}}}]}"#;
        let state: StateView = serde_json::from_str(&text.replace("V7", &v7)).expect("read");
        assert_eq!(state.current.to_string(), "v7@2");
        let job = state.job.expect("there is a job");
        assert_eq!((job.staleness, job.on_running.to_string()), (None, "merge".to_owned()));
        assert_eq!((state.engines[0].state.name(), state.engines[0].running), ("updating", 3));
        assert_eq!(state.engines[1].state.name(), "unknown");
        let version = &state.versions[0];
        assert_eq!(version.state.to_string(), "frozen");
        assert!(version.engines["e1"].stage == LoadStage::Loading);
        assert_eq!(version.engines["e2"].stage.to_string(), "warming");
        assert!(serde_json::from_str::<StateView>("{}").is_ok());
    }

    #[test]
    fn an_answer_carries_the_state_in_its_own_fields_and_is_read_back() {
        let state = Arc::new(page(&[], 1, None));
        let ledger = LedgerView { tokens: 9, ..LedgerView::default() };
        let answer = StateAnswer { anabranch: "0.1".into(), manager_epoch: 3, state, ledger };
        let json = serde_json::to_value(&answer).expect("plain data");
        assert_eq!((&json["uptime_ms"], &json["ledger"]["tokens"]), (&1.into(), &9.into()));
        assert_eq!(serde_json::from_value::<StateAnswer>(json).expect("read"), answer);
    }
}
