//! The ends of a load other than success: `impl Core` for failures, cancellation and the engine's
//! death.

use anabranch_runtime::Now;

use super::order::LoadOrder;
use super::state::LoadState;
use crate::core::Core;
use crate::core::action::Action;
use crate::core::timer::Timer;

impl Core {
    /// The old version keeps serving.
    pub(super) fn fail_load(&mut self, now: Now, order: LoadOrder, why: String) {
        tracing::warn!(version = %order.to, order = order.id, why, "load failed; the old version keeps serving");
        self.timers.clear(Timer::LoadDeadline);
        self.timers.clear(Timer::Quiesce);
        self.report(order.failed(why));
        self.finish_load(now);
    }

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

    /// Orders of a session that is no more; what the engine is already at is finished.
    pub(in crate::core) fn forget_orders(&mut self, now: Now) {
        self.loader.next = None;
        self.loader.last_report = None;
        self.cancel_unstarted(now, "the manager began a new session");
    }

    /// Leaving, or giving memory back: loads that have not reached the engine end here.
    pub(in crate::core) fn cancel_unstarted(&mut self, now: Now, why: &str) {
        if let LoadState::Fetching(order) | LoadState::Quiescing(order, _) = self.loader.state() {
            let id = order.id;
            self.cancel_load(now, id, why);
        }
    }

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

    /// After a release the engine's weights are gone.
    pub(in crate::core) fn weights_gone(&mut self) {
        self.loader.serving = None;
        self.loader.last_probe = None;
    }
}
