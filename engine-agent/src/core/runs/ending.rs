//! The ways a sample leaves this engine before its time: `impl Core` for stops, aborts, cuts and losses.

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Attempt, SampleId};
use anabranch_runtime::Now;

use super::{Run, Stage};
use crate::core::Core;
use crate::core::action::Action;
use crate::engine::RunId;

impl Core {
    pub(in crate::core) fn stop(&mut self, now: Now, stop: pb::Stop) {
        let Some(sample) = stop.sample.map(SampleId::from) else { return };
        let Some(id) = self.runs.by_sample.get(&sample).copied() else { return };
        if self.runs.by_run.get(&id).is_some_and(|run| run.attempt.0 == stop.attempt) {
            self.abort(now, id, &stop.why);
        }
    }

    /// Ends as `aborted`: at once if the engine has no request of it, else with its terminal chunk.
    fn abort(&mut self, now: Now, id: RunId, why: &str) {
        let Some(run) = self.runs.by_run.get_mut(&id) else { return };
        match run.stage {
            Stage::Held | Stage::Cut => self.end_now(now, id, Why::Aborted, why.to_owned()),
            Stage::Cutting => run.stage = Stage::Stopping,
            Stage::Running => {
                run.stage = Stage::Stopping;
                let rid = run.rid();
                self.act(Action::Abort { run: id, rid });
            }
            Stage::Stopping | Stage::Discarding => {}
        }
    }

    pub(in crate::core) fn abort_all(&mut self, now: Now, why: &str) {
        for id in self.runs.ids(|_| true) {
            self.abort(now, id, why);
        }
    }

    /// For a load: every request that can go on as a new one is ended. The rest stay, to be paused.
    pub(in crate::core) fn cut_runs(&mut self) {
        for id in self.runs.ids(|run| run.stage == Stage::Running && run.can_be_cut()) {
            let Some(run) = self.runs.by_run.get_mut(&id) else { continue };
            run.stage = Stage::Cutting;
            let rid = run.rid();
            self.act(Action::Abort { run: id, rid });
        }
    }

    /// Requests that a load still waits for; with `all`, also those that would be paused.
    pub(in crate::core) fn unquiet(&self, all: bool) -> usize {
        let counts = |run: &&Run| match run.stage {
            Stage::Held | Stage::Cut => false,
            Stage::Running => all,
            Stage::Stopping | Stage::Discarding | Stage::Cutting => true,
        };
        self.runs.by_run.values().filter(counts).count()
    }

    /// New weights lie under streams that were only paused: where exactly, the engine says at their end.
    pub(in crate::core) fn mark_boundaries(&mut self) {
        for run in self.runs.by_run.values_mut() {
            run.boundary |= run.stage.at_engine();
        }
    }

    /// Reported now; what its stream still brings is dropped.
    pub(super) fn close_run(&mut self, now: Now, id: RunId, why: Why, matched: String) {
        let Some(run) = self.runs.by_run.get(&id) else { return };
        let end = run.end(why, matched);
        self.outbox.end(now, end);
        self.discard(id);
    }

    pub(super) fn end_now(&mut self, now: Now, id: RunId, why: Why, matched: String) {
        let Some(run) = self.runs.remove(id) else { return };
        self.outbox.end(now, run.end(why, matched));
    }

    /// No report; its request ends at the engine, and until then it counts as running there.
    pub(super) fn discard(&mut self, id: RunId) {
        let Some(run) = self.runs.by_run.get_mut(&id) else { return };
        self.runs.by_sample.remove(&run.sample);
        match run.stage {
            Stage::Held | Stage::Cut => {
                self.runs.by_run.remove(&id);
            }
            Stage::Running => {
                run.stage = Stage::Discarding;
                let rid = run.rid();
                self.act(Action::Abort { run: id, rid });
            }
            Stage::Stopping | Stage::Cutting => run.stage = Stage::Discarding,
            Stage::Discarding => {}
        }
    }

    pub(in crate::core) fn discard_runs(
        &mut self,
        want: impl Fn(SampleId, Attempt) -> bool,
    ) -> usize {
        let ids: Vec<RunId> = self.runs.by_sample.values().copied().collect();
        let wanted =
            |id: &RunId| self.runs.by_run.get(id).is_some_and(|run| want(run.sample, run.attempt));
        let ids: Vec<RunId> = ids.into_iter().filter(wanted).collect();
        ids.iter().for_each(|id| self.discard(*id));
        ids.len()
    }

    /// The buffer is full: the newest samples have the least to lose. Never stops reading the engine.
    pub(in crate::core) fn shed(&mut self, now: Now) {
        let live: Vec<RunId> = self.runs.by_sample.values().copied().collect();
        let mut ids = live;
        ids.sort_unstable();
        let shed = ids.len().div_ceil(8);
        for id in ids.into_iter().rev().take(shed) {
            self.close_run(now, id, Why::Busy, "the agent's buffer is full".to_owned());
        }
        tracing::warn!(
            shed,
            bytes = self.outbox.bytes(),
            "unacknowledged ticks fill the buffer; gave back the newest samples"
        );
    }

    pub(in crate::core) fn lose_all_runs(&mut self, now: Now, why: &str) {
        self.loader.drop_held_back();
        for id in self.runs.ids(|_| true) {
            let Some(run) = self.runs.remove(id) else { continue };
            match run.stage {
                Stage::Discarding => {}
                Stage::Held => self.outbox.end(now, run.end(Why::Busy, why.to_owned())),
                _ => self.outbox.end(now, run.end(Why::Lost, why.to_owned())),
            }
            self.act(Action::DropStream { run: id });
        }
    }

    /// A load went wrong after the streams went on: what they made since was not sent, and must not be.
    pub(in crate::core) fn abort_unverified(&mut self, now: Now, why: &str) {
        self.loader.drop_held_back();
        for id in self.runs.ids(|run| run.stage.at_engine() && run.stage != Stage::Discarding) {
            self.close_run(now, id, Why::Aborted, why.to_owned());
        }
    }
}
