//! Leaving without losing a token: `impl Core` for drain orders, spot notices and SIGTERM.

use std::time::Duration;

use anabranch_proto::pb::{self, from_agent};
use anabranch_runtime::Now;

use super::Core;
use super::action::ExitReason;
use super::life::AgentState;
use super::timer::Timer;

/// A drain: the order, its deadline, and its progress.
///
/// ```text
///   Running ──cut, or nothing runs──► Aborting ──last terminal chunk──► Handing ──acknowledged──► exit
///      └──────────────────────────────── nothing runs ────────────────────►┘
/// ```
#[derive(Clone, Copy, Debug)]
pub(super) struct DrainOrder {
    /// Id of the manager's order; `None` if the agent leaves on its own account.
    pub order: Option<u64>,
    /// Time at which the engine and the host are gone.
    pub deadline: Now,
    /// Progress.
    pub phase: DrainPhase,
}

/// Steps of a drain; the graph is at [`DrainOrder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum DrainPhase {
    /// Samples may still finish.
    Running,
    /// Every attempt was told to end.
    Aborting,
    /// Every attempt ended; the manager has still to acknowledge the last ticks.
    Handing,
}

impl DrainOrder {
    /// True if `next` is not a step back: the phase goes forward, the deadline only gets sooner.
    pub(super) fn may_become(&self, next: &DrainOrder) -> bool {
        self.phase <= next.phase && next.deadline <= self.deadline
    }
}

/// Part of the deadline kept for terminal chunks and the last ticks; at most a quarter of the
/// whole.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Time beyond the deadline after which an engine that does not end its streams is left behind.
const PATIENCE: Duration = Duration::from_secs(5);

impl Core {
    /// Begins a drain after SIGTERM or a spot notice; the manager is told.
    pub(super) fn leave_asked(&mut self, now: Now, why: &str, within: Duration) {
        let attached = self.session.is_some();
        let preempt_in_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        self.tell(from_agent::Kind::Notice(pb::Notice { preempt_in_ms, why: why.to_owned() }));
        if !attached {
            return self.exit(ExitReason::Drained);
        }
        self.begin_drain(now, None, within, why);
    }

    /// Begins a drain, or brings its deadline forward.
    pub(super) fn begin_drain(
        &mut self,
        now: Now,
        order: Option<u64>,
        within: Duration,
        why: &str,
    ) {
        let deadline = now + within;
        let drain = match &self.state {
            AgentState::Stopped => return,
            // The sooner of two orders counts; whoever ordered last gets the answer.
            AgentState::Draining(old) => DrainOrder {
                order: order.or(old.order),
                deadline: deadline.min(old.deadline),
                phase: old.phase,
            },
            AgentState::Booting | AgentState::Serving => {
                tracing::info!(why, running = self.attempts.live(), ?within, "draining");
                DrainOrder { order, deadline, phase: DrainPhase::Running }
            }
        };
        let left = now.until(drain.deadline);
        let cut = drain.phase == DrainPhase::Running;
        let give_up = drain.deadline + PATIENCE;
        self.set_state(AgentState::Draining(drain));
        self.timers.set(Timer::DrainGiveUp, give_up);
        if cut {
            self.timers.set(Timer::DrainCut, now + (left - LAST_WORDS.min(left / 4)));
        }
        self.cancel_unstarted(now, "draining");
    }

    /// Aborts what still runs.
    pub(super) fn drain_cut(&mut self, now: Now) {
        let AgentState::Draining(drain) = self.state else { return };
        self.set_state(AgentState::Draining(DrainOrder { phase: DrainPhase::Aborting, ..drain }));
        let running = self.attempts.live();
        if running > 0 {
            tracing::info!(running, "the drain's deadline is near: aborting what runs");
        }
        self.abort_all(now, "drain");
    }

    /// Takes the next step of a drain: hands the last ticks over once every terminal chunk came,
    /// and exits once the manager has everything.
    pub(super) fn settle_drain(&mut self, now: Now) {
        let AgentState::Draining(drain) = self.state else { return };
        if drain.phase != DrainPhase::Handing {
            if !self.attempts.is_empty() || self.loader.is_loading() {
                return;
            }
            self.set_state(AgentState::Draining(DrainOrder {
                phase: DrainPhase::Handing,
                ..drain
            }));
            self.timers.clear(Timer::DrainCut);
            self.outbox.seal();
            self.send_ticks(now);
        }
        if !self.outbox.is_empty() {
            return;
        }
        if let Some(order) = drain.order {
            self.mode_done(pb::ModeDone { order, ok: true, drained: true, ..Default::default() });
        }
        tracing::info!("drained");
        self.exit(ExitReason::Drained);
    }

    /// Ends the agent with what is left.
    pub(super) fn drain_gave_up(&mut self) {
        let AgentState::Draining(drain) = &self.state else { return };
        let (running, unacknowledged_bytes) = (self.attempts.live(), self.outbox.bytes());
        if let Some(order) = drain.order {
            let error =
                format!("{running} samples running, {unacknowledged_bytes} bytes not taken");
            self.mode_done(pb::ModeDone { order, error, ..Default::default() });
        }
        self.exit(ExitReason::DrainCut { running, unacknowledged_bytes });
    }

    /// Ends the agent at once, as the manager ordered.
    pub(super) fn leave(&mut self, order: u64) {
        self.mode_done(pb::ModeDone { order, ok: true, ..Default::default() });
        self.exit(ExitReason::Left);
    }
}
