//! Loads of new weights: `impl Core` from an order to a served version, or back to the old one. The
//! engine is told only after every byte was verified, and no token leaves before the new weights
//! were probed. The graph is at `LoadState`.

use std::time::Duration;

use anabranch_proto::pb::{self, from_agent};
use anabranch_proto::{LoadStage, OnRunning, Verdict, Version};
use anabranch_runtime::Now;

use super::action::{Action, FetchOrder};
use super::event::{Call, Moved, StagedVersion};
use super::timer::Timer;
use super::{AgentState, Core, Memory};

mod ending;
mod loader;
mod order;
mod state;
mod swap;
mod traffic;

pub(super) use loader::Loader;
use order::LoadOrder;
pub(super) use state::LoadState;

/// Time for streams that were told to end for a load.
const QUIESCE: Duration = Duration::from_secs(15);

impl Core {
    pub(super) fn load_ordered(&mut self, now: Now, load: pb::Load) {
        if load.cancel {
            self.cancel_load(now, load.order, "cancelled by the manager");
            return;
        }
        let order = match LoadOrder::parse(now, load) {
            Ok(order) => order,
            Err(report) => return self.report(*report),
        };
        if let Some(why) = self.cannot_load() {
            return self.report(order.failed(why));
        }
        match self.loader.state() {
            LoadState::Active => self.begin_fetch(now, order),
            LoadState::Fetching(old) => {
                let why = format!("superseded by order {}", order.id);
                let id = old.id;
                self.cancel_load(now, id, &why);
                self.begin_fetch(now, order);
            }
            _ => {
                let newer = format!("superseded by order {}", order.id);
                if let Some(skipped) = self.loader.next.replace(order) {
                    self.report(skipped.failed(newer));
                }
            }
        }
    }

    fn cannot_load(&self) -> Option<String> {
        if self.config.weights_by_trainer {
            return Some("the trainer loads this engine (--weights-by-trainer)".to_owned());
        }
        match self.state {
            AgentState::Serving => {}
            AgentState::Booting => return Some("the engine is down".to_owned()),
            AgentState::Draining(_) | AgentState::Stopped => return Some("draining".to_owned()),
        }
        matches!(self.memory, Memory::Releasing { .. } | Memory::Released)
            .then(|| "the engine's memory is released".to_owned())
    }

    fn begin_fetch(&mut self, now: Now, order: LoadOrder) {
        if self.loader.serving() == Some(order.to) {
            let probe = self.loader.last_probe.clone();
            return self.report(order.active(probe, Verdict::Inconclusive, None));
        }
        if let Some(deadline) = order.deadline {
            self.timers.set(Timer::LoadDeadline, deadline.max(now));
        }
        self.report(order.report(LoadStage::Fetching));
        self.act(Action::Fetch(Box::new(FetchOrder {
            order: order.id,
            version: order.to,
            sources: order.sources.clone(),
            stripe_count: order.stripe_count,
            streams: order.streams,
            directory: order.directory.clone(),
            bytes: order.bytes,
        })));
        self.loader.set_state(LoadState::Fetching(order));
    }

    pub(super) fn fetch_progressed(&mut self, now: Now, id: u64, so_far: Moved) {
        let Some(order) = self.loader.fetching_mut() else { return };
        if order.id == id {
            order.traffic.moved(now, so_far);
            let report = pb::LoadState { bytes: so_far.bytes, ..order.report(LoadStage::Fetching) };
            self.report(report);
        }
    }

    pub(super) fn fetched(&mut self, now: Now, id: u64, result: Result<StagedVersion, String>) {
        let LoadState::Fetching(order) = self.loader.state() else { return };
        if order.id != id {
            return;
        }
        let order = order.clone();
        match result {
            Err(why) => self.fail_load(now, order, why),
            Ok(staged) => {
                let bytes = staged.bytes;
                tracing::info!(version = %order.to, bytes, holds = staged.holds, "weights verified");
                self.report(pb::LoadState {
                    bytes,
                    holds: staged.holds,
                    fetched_from: staged.from.clone().into_iter().collect(),
                    ..order.report(LoadStage::Staged)
                });
                self.quiesce(now, order, staged);
            }
        }
    }

    fn quiesce(&mut self, now: Now, order: LoadOrder, staged: StagedVersion) {
        if let Some(why) = self.cannot_load() {
            return self.fail_load(now, order, why);
        }
        self.report(order.report(LoadStage::Quiescing));
        match order.on_running {
            OnRunning::Finish => {}
            OnRunning::Abort => {
                self.abort_all(now, "new weights");
                self.timers.set(Timer::Quiesce, now + QUIESCE);
            }
            OnRunning::Continue => {
                self.cut_attempts();
                self.timers.set(Timer::Quiesce, now + QUIESCE);
            }
        }
        self.loader.set_state(LoadState::Quiescing(order, staged));
    }

    /// Pauses the engine once the streams are quiet.
    pub(super) fn settle_load(&mut self) {
        let LoadState::Quiescing(order, staged) = self.loader.state() else { return };
        let paused_ones_too = !matches!(order.on_running, OnRunning::Continue);
        if self.unquiet(paused_ones_too) > 0 {
            return;
        }
        let (order, staged) = (order.clone(), staged.clone());
        self.timers.clear(Timer::Quiesce);
        self.loader.set_state(LoadState::Pausing(order, staged));
        self.act(Action::Call(Call::PauseForLoad));
    }

    pub(super) fn load_deadline(&mut self, now: Now) {
        let late =
            |order: &LoadOrder| format!("not done within the deadline of {} ms", order.deadline_ms);
        match self.loader.state() {
            LoadState::Fetching(order) => {
                let (id, why) = (order.id, late(order));
                self.cancel_load(now, id, &why);
            }
            LoadState::Quiescing(order, _) if order.on_running == OnRunning::Finish => {
                tracing::warn!(version = %order.to, "samples still run at the load's deadline: they go on elsewhere");
                self.abort_all(now, "new weights");
                self.timers.set(Timer::Quiesce, now + QUIESCE);
            }
            _ => {}
        }
    }

    pub(super) fn quiesce_gave_up(&mut self, now: Now) {
        let LoadState::Quiescing(order, _) = self.loader.state() else { return };
        let (order, open) = (order.clone(), self.unquiet(true));
        let why = format!("{open} streams did not end within {} s", QUIESCE.as_secs());
        self.fail_load(now, order, why);
    }

    fn report(&mut self, report: pb::LoadState) {
        if matches!(report.stage(), pb::load_state::Stage::Active | pb::load_state::Stage::Failed) {
            self.loader.last_report = Some(report.clone());
        }
        self.tell(from_agent::Kind::LoadState(report));
    }

    /// The version that the engine serves; the start-up weights count as number 0 of every epoch.
    pub(super) fn serving_version(&self) -> Version {
        self.loader.serving().unwrap_or_else(|| Version::base(0))
    }
}
