//! Leaving, pausing, and giving memory back: `impl Core` for the manager's modes and for SIGTERM.
//!
//! ```text
//!   drain:   Running{cut_at} ──cut_at, or nothing runs──► Aborting ──last terminal chunk──► Handing ──acked──► exit
//!   memory:  Resident ──order──► Releasing ──idle, released──► Released ──order──► Resuming ──► Resident (without weights)
//! ```

use std::time::Duration;

use anabranch_proto::pb::{self, from_agent, mode};
use anabranch_runtime::Now;

use super::action::{Action, ExitReason};
use super::event::Call;
use super::timer::Timer;
use super::{AgentState, Core};

#[derive(Debug)]
pub(super) struct DrainOrder {
    /// Absent: on our own account.
    order: Option<u64>,
    deadline: Now,
    phase: DrainPhase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DrainPhase {
    /// Samples may still finish.
    Running,
    Aborting,
    /// Everything ended; the manager must acknowledge it.
    Handing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    Resident,
    /// `called`: the engine was asked, since it is idle.
    Releasing {
        order: u64,
        called: bool,
    },
    Released,
    Resuming {
        order: u64,
    },
}

/// Kept of a deadline for the terminal chunks and the last ticks; at most a quarter of it.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Beyond the deadline of a drain: an engine that does not end its streams is left behind.
const PATIENCE: Duration = Duration::from_secs(5);
/// A release order without a deadline.
const RELEASE: Duration = Duration::from_secs(30);

impl Core {
    pub(super) fn mode_ordered(&mut self, now: Now, mode: pb::Mode) {
        let (order, kind) = (mode.order, mode.kind());
        let within = Duration::from_millis(mode.deadline_ms.into());
        match kind {
            mode::Kind::Drain => self.begin_drain(now, Some(order), within, &mode.why),
            mode::Kind::Leave => self.leave(order),
            mode::Kind::ReleaseMemory => self.release_memory(now, order, within),
            mode::Kind::ResumeMemory => self.resume_memory(order),
            mode::Kind::Pause => self.pause(order, true),
            mode::Kind::Resume => self.pause(order, false),
            mode::Kind::Unspecified => {
                let error =
                    format!("unknown mode {}: this agent is older than the manager", mode.kind);
                self.mode_done(pb::ModeDone { order, error, ..Default::default() });
            }
        }
    }

    /// SIGTERM, or a spot notice: the manager learns of it and the drain begins at once.
    pub(super) fn leave_asked(&mut self, now: Now, why: &str, within: Duration) {
        let attached = self.session.is_some();
        let preempt_in_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        self.tell(from_agent::Kind::Notice(pb::Notice { preempt_in_ms, why: why.to_owned() }));
        if !attached {
            return self.exit(ExitReason::Drained);
        }
        self.begin_drain(now, None, within, why);
    }

    fn begin_drain(&mut self, now: Now, order: Option<u64>, within: Duration, why: &str) {
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
        self.state = AgentState::Draining(drain);
        self.timers.set(Timer::DrainGiveUp, give_up);
        if cut {
            self.timers.set(Timer::DrainCut, now + (left - LAST_WORDS.min(left / 4)));
        }
        self.cancel_unstarted(now, "draining");
    }

    pub(super) fn drain_cut(&mut self, now: Now) {
        let AgentState::Draining(drain) = &mut self.state else { return };
        drain.phase = DrainPhase::Aborting;
        let running = self.attempts.live();
        if running > 0 {
            tracing::info!(running, "the drain's deadline is near: aborting what runs");
        }
        self.abort_all(now, "drain");
    }

    /// Every terminal chunk came? Then the last tick. Every tick arrived? Then the last word.
    pub(super) fn settle_drain(&mut self, now: Now) {
        let AgentState::Draining(drain) = &mut self.state else { return };
        if drain.phase != DrainPhase::Handing {
            if !self.attempts.is_empty() || self.loader.is_loading() {
                return;
            }
            drain.phase = DrainPhase::Handing;
            self.timers.clear(Timer::DrainCut);
            self.outbox.seal();
            self.send_ticks(now);
        }
        if !self.outbox.is_empty() {
            return;
        }
        let AgentState::Draining(drain) = &self.state else { return };
        if let Some(order) = drain.order {
            self.mode_done(pb::ModeDone { order, ok: true, drained: true, ..Default::default() });
        }
        tracing::info!("drained");
        self.exit(ExitReason::Drained);
    }

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

    fn leave(&mut self, order: u64) {
        self.mode_done(pb::ModeDone { order, ok: true, ..Default::default() });
        self.exit(ExitReason::Left);
    }

    fn release_memory(&mut self, now: Now, order: u64, within: Duration) {
        if matches!(self.memory, Memory::Released) {
            return self.memory_released(order);
        }
        if !self.engine.as_ref().is_some_and(|engine| engine.caps.release_memory) {
            // The barrier still holds: nothing runs here afterwards.
            tracing::warn!(
                "this engine keeps its memory; SGLang can release it with --enable-memory-saver"
            );
        }
        self.memory = Memory::Releasing { order, called: false };
        let within = if within.is_zero() { RELEASE } else { within };
        self.timers.set(Timer::MemoryDeadline, now + within);
        self.cancel_unstarted(now, "the engine's memory is being released");
        self.abort_all(now, "mode switch");
    }

    /// The engine may only be asked once it is idle.
    pub(super) fn settle_memory(&mut self) {
        let Memory::Releasing { order, called: false } = self.memory else { return };
        if !self.attempts.is_empty() || self.loader.is_loading() {
            return;
        }
        self.memory = Memory::Releasing { order, called: true };
        match self.engine.as_ref().is_some_and(|engine| engine.caps.release_memory) {
            true => self.act(Action::Call(Call::ReleaseMemory)),
            false => {
                self.memory = Memory::Released;
                self.timers.clear(Timer::MemoryDeadline);
                self.mode_done(pb::ModeDone {
                    order,
                    ok: true,
                    drained: true,
                    ..Default::default()
                });
            }
        }
    }

    pub(super) fn memory_deadline(&mut self) {
        let Memory::Releasing { order, .. } = self.memory else { return };
        let error = format!("{} streams still open at the deadline", self.attempts.at_engine());
        self.mode_done(pb::ModeDone { order, error, ..Default::default() });
    }

    fn memory_released(&mut self, order: u64) {
        self.mode_done(pb::ModeDone {
            order,
            ok: true,
            drained: true,
            memory_released: self.loader.serving().is_none(),
            ..Default::default()
        });
    }

    fn resume_memory(&mut self, order: u64) {
        match self.memory {
            Memory::Resident => {
                self.mode_done(pb::ModeDone { order, ok: true, ..Default::default() })
            }
            Memory::Released if self.loader.serving().is_some() => {
                self.memory = Memory::Resident;
                self.mode_done(pb::ModeDone { order, ok: true, ..Default::default() });
            }
            Memory::Released => {
                self.memory = Memory::Resuming { order };
                self.act(Action::Call(Call::ResumeMemory));
            }
            Memory::Releasing { .. } | Memory::Resuming { .. } => {
                let error = "another change of memory is under way".to_owned();
                self.mode_done(pb::ModeDone { order, error, ..Default::default() });
            }
        }
    }

    fn pause(&mut self, order: u64, pause: bool) {
        self.paused = pause;
        self.paused_by = order;
        self.act(Action::Call(if pause { Call::Pause } else { Call::Continue }));
    }

    pub(super) fn mode_called(&mut self, call: Call, result: Result<(), String>) {
        match call {
            Call::ReleaseMemory => self.release_answered(result),
            Call::ResumeMemory => self.resume_answered(result),
            Call::Pause | Call::Continue => {
                self.paused = (call == Call::Pause) == result.is_ok();
                let order = self.paused_by;
                self.answer(order, result);
            }
            Call::PauseForLoad | Call::Load | Call::ContinueAfterLoad => {}
        }
    }

    fn release_answered(&mut self, result: Result<(), String>) {
        let Memory::Releasing { order, .. } = self.memory else { return };
        self.timers.clear(Timer::MemoryDeadline);
        match result {
            Ok(()) => {
                tracing::info!("the engine's memory is released");
                self.memory = Memory::Released;
                self.weights_gone();
                self.memory_released(order);
            }
            Err(error) => {
                self.memory = Memory::Resident;
                let done = pb::ModeDone { order, drained: true, error, ..Default::default() };
                self.mode_done(done);
            }
        }
    }

    fn resume_answered(&mut self, result: Result<(), String>) {
        let Memory::Resuming { order } = self.memory else { return };
        self.memory = if result.is_ok() { Memory::Resident } else { Memory::Released };
        self.answer(order, result);
    }

    fn answer(&mut self, order: u64, result: Result<(), String>) {
        let ok = result.is_ok();
        let error = result.err().unwrap_or_default();
        self.mode_done(pb::ModeDone { order, ok, error, ..Default::default() });
    }

    fn mode_done(&mut self, done: pb::ModeDone) {
        self.tell(from_agent::Kind::ModeDone(done));
    }
}
