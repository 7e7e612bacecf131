//! The ends of a load other than success: `impl Core` for failures, cancellation and the engine's death.

use anabranch_runtime::Now;

use super::job::Job;
use super::loader::LoadState;
use crate::core::Core;
use crate::core::action::Action;
use crate::core::timer::Timer;

impl Core {
    /// The old version keeps serving.
    pub(super) fn fail_load(&mut self, now: Now, job: Job, why: String) {
        tracing::warn!(version = %job.to, order = job.order, why, "load failed; the old version keeps serving");
        self.timers.clear(Timer::LoadDeadline);
        self.timers.clear(Timer::Quiesce);
        self.report(job.failed(why));
        self.finish_load(now);
    }

    pub(super) fn finish_load(&mut self, now: Now) {
        self.loader.state = LoadState::Active;
        self.release_held(now);
        if let Some(next) = self.loader.next.take() {
            match self.cannot_load() {
                Some(why) => self.report(next.failed(why)),
                None => self.begin_fetch(now, next),
            }
        }
    }

    pub(in crate::core) fn cancel_load(&mut self, now: Now, order: u64, why: &str) {
        if let Some(next) = self.loader.next.take_if(|next| next.order == order) {
            return self.report(next.failed(why.to_owned()));
        }
        match &self.loader.state {
            LoadState::Fetching(job) if job.order == order => {
                let job = job.clone();
                self.act(Action::CancelFetch { order });
                self.fail_load(now, job, why.to_owned());
            }
            LoadState::Quiescing(job, _) if job.order == order => {
                let job = job.clone();
                self.fail_load(now, job, why.to_owned());
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
        if let LoadState::Fetching(job) | LoadState::Quiescing(job, _) = &self.loader.state {
            let order = job.order;
            self.cancel_load(now, order, why);
        }
    }

    pub(in crate::core) fn engine_lost_in_load(&mut self, why: &str) {
        let state = std::mem::take(&mut self.loader.state);
        self.loader.serving = None;
        self.loader.last_probe = None;
        self.timers.clear(Timer::LoadDeadline);
        self.timers.clear(Timer::Quiesce);
        let job = match state {
            LoadState::Active => None,
            LoadState::Fetching(job) => {
                self.act(Action::CancelFetch { order: job.order });
                Some(job)
            }
            LoadState::Quiescing(job, _)
            | LoadState::Freezing(job, _)
            | LoadState::Loading(job, _)
            | LoadState::Thawing(job, _)
            | LoadState::Probing(job, _)
            | LoadState::Restoring { job, .. } => Some(job),
        };
        for job in job.into_iter().chain(self.loader.next.take()) {
            self.report(job.failed(format!("the engine died: {why}")));
        }
    }

    /// After a release the engine's weights are gone.
    pub(in crate::core) fn weights_gone(&mut self) {
        self.loader.serving = None;
        self.loader.last_probe = None;
    }
}
