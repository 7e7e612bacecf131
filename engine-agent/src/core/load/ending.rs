//! Loads that end without success: `impl Core` for failure, cancellation and the engine's death.

use anabranch_runtime::Now;

use super::order::LoadOrder;
use super::state::LoadState;
use crate::core::Core;
use crate::core::action::Action;
use crate::core::timer::Timer;

impl Core {
    /// Ends a load that never touched the engine's weights, or that was undone: the old version
    /// keeps serving.
    pub(super) fn fail_load(&mut self, now: Now, order: LoadOrder, why: String) {
        tracing::warn!(version = %order.to, order = order.id, why, "load failed; the old version keeps serving");
        self.timers.clear(Timer::LoadDeadline);
        self.timers.clear(Timer::Quiesce);
        self.report(order.failed(why));
        self.finish_load(now);
    }

    /// Returns to `Active`, sends the attempts that waited, and begins the next order.
    pub(super) fn finish_load(&mut self, now: Now) {
        self.loader.set_state(LoadState::Active);
        self.send_waiting(now);
        if let Some(next) = self.loader.next.take() {
            match self.cannot_load() {
                Some(why) => self.report(next.failed(why)),
                None => self.begin_fetch(now, next),
            }
        }
    }

    /// Cancels order `id` unless the engine is already at it.
    pub(in crate::core) fn cancel_load(&mut self, now: Now, id: u64, why: &str) {
        if let Some(next) = self.loader.next.take_if(|next| next.id == id) {
            return self.report(next.failed(why.to_owned()));
        }
        match self.loader.state() {
            LoadState::Fetching(order) if order.id == id => {
                let order = order.clone();
                self.act(Action::CancelFetch { order: id });
                self.fail_load(now, order, why.to_owned());
            }
            LoadState::Quiescing(order, _) if order.id == id => {
                let order = order.clone();
                self.fail_load(now, order, why.to_owned());
            }
            _ => {}
        }
    }

    /// Forgets the orders of a former session. A load that the engine is already at is finished.
    pub(in crate::core) fn forget_orders(&mut self, now: Now) {
        self.loader.next = None;
        self.loader.last_report = None;
        self.cancel_unstarted(now, "the manager began a new session");
    }

    /// Cancels a load that has not reached the engine, before a drain or a release of memory.
    pub(in crate::core) fn cancel_unstarted(&mut self, now: Now, why: &str) {
        if let LoadState::Fetching(order) | LoadState::Quiescing(order, _) = self.loader.state() {
            let id = order.id;
            self.cancel_load(now, id, why);
        }
    }

    /// Reports every order as failed after the engine's death.
    pub(in crate::core) fn engine_lost_in_load(&mut self, why: &str) {
        let order = self.loader.state().order().cloned();
        if matches!(self.loader.state(), LoadState::Fetching(_)) {
            let fetched = order.iter().map(|order| order.id);
            fetched.for_each(|order| self.act(Action::CancelFetch { order }));
        }
        self.loader.set_state(LoadState::Active);
        self.loader.serving = None;
        self.loader.last_probe = None;
        self.timers.clear(Timer::LoadDeadline);
        self.timers.clear(Timer::Quiesce);
        for order in order.into_iter().chain(self.loader.next.take()) {
            self.report(order.failed(format!("the engine died: {why}")));
        }
    }

    /// Notes that the engine's weights are gone, after a release of memory.
    pub(in crate::core) fn weights_gone(&mut self) {
        self.loader.serving = None;
        self.loader.last_probe = None;
    }
}
