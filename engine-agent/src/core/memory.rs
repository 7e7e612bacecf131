//! Giving the engine's GPU memory back to the trainer, and taking it again: `impl Core`.

use std::time::Duration;

use anabranch_proto::pb;
use anabranch_runtime::Now;

use super::action::Action;
use super::event::Call;
use super::timer::Timer;
use super::{Core, check_edge};

/// State of the engine's GPU memory.
///
/// ```text
///   Resident ──order──► Releasing{called: no} ──idle──► Releasing{called: yes} ──► Released ──order──► Resuming
///     ▲  ▲                                                   │ failed                │ ▲                 │ │
///     │  └───────────────────────────────────────────────────┘                       │ └──── failed ─────┘ │
///     └────── order, where nothing was released ─────────────────────────────────────┴─────────────────────┘
/// ```
///
/// A second order to release starts the release anew. Any state becomes `Resident` when the engine
/// starts or dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// The engine has its memory.
    Resident,
    /// A release was ordered.
    Releasing {
        /// Id of the manager's order.
        order: u64,
        /// True once the engine was asked, which it is only when idle.
        called: bool,
    },
    /// The trainer may use the memory; the weights are gone, unless the engine cannot release them.
    Released,
    /// The engine was asked to take its memory again.
    Resuming {
        /// Id of the manager's order.
        order: u64,
    },
}

impl Memory {
    /// True if the graph has an edge from this state to `next`.
    pub(super) fn may_become(self, next: Memory) -> bool {
        use Memory::{Released, Releasing, Resident, Resuming};
        match (self, next) {
            (_, Resident) => true,
            (Resident | Releasing { .. } | Resuming { .. }, Releasing { called, .. }) => {
                !called || matches!(self, Releasing { .. })
            }
            (Releasing { .. } | Resuming { .. }, Released) => true,
            (Released, Resuming { .. }) => true,
            _ => false,
        }
    }
}

/// Deadline of a release order that names none.
const RELEASE: Duration = Duration::from_secs(30);

impl Core {
    /// Assigns the state of the memory; no other code does.
    pub(super) fn set_memory(&mut self, next: Memory) {
        check_edge("memory", self.memory.may_become(next), &self.memory, &next);
        self.memory = next;
    }

    pub(super) fn release_memory(&mut self, now: Now, order: u64, within: Duration) {
        if matches!(self.memory, Memory::Released) {
            return self.memory_released(order);
        }
        if !self.engine.as_ref().is_some_and(|engine| engine.caps.release_memory) {
            // The barrier still holds: nothing runs here afterwards.
            tracing::warn!(
                "this engine keeps its memory; SGLang can release it with --enable-memory-saver"
            );
        }
        self.set_memory(Memory::Releasing { order, called: false });
        let within = if within.is_zero() { RELEASE } else { within };
        self.timers.set(Timer::MemoryDeadline, now + within);
        self.cancel_unstarted(now, "the engine's memory is being released");
        self.abort_all(now, "mode switch");
    }

    /// Asks the engine to release its memory once the engine is idle.
    pub(super) fn settle_memory(&mut self) {
        let Memory::Releasing { order, called: false } = self.memory else { return };
        if !self.attempts.is_empty() || self.loader.is_loading() {
            return;
        }
        self.set_memory(Memory::Releasing { order, called: true });
        match self.engine.as_ref().is_some_and(|engine| engine.caps.release_memory) {
            true => self.act(Action::Call(Call::ReleaseMemory)),
            false => {
                self.set_memory(Memory::Released);
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

    pub(super) fn resume_memory(&mut self, order: u64) {
        match self.memory {
            Memory::Resident => {
                self.mode_done(pb::ModeDone { order, ok: true, ..Default::default() })
            }
            Memory::Released if self.loader.serving().is_some() => {
                self.set_memory(Memory::Resident);
                self.mode_done(pb::ModeDone { order, ok: true, ..Default::default() });
            }
            Memory::Released => {
                self.set_memory(Memory::Resuming { order });
                self.act(Action::Call(Call::ResumeMemory));
            }
            Memory::Releasing { .. } | Memory::Resuming { .. } => {
                let error = "another change of memory is under way".to_owned();
                self.mode_done(pb::ModeDone { order, error, ..Default::default() });
            }
        }
    }

    pub(super) fn release_answered(&mut self, result: Result<(), String>) {
        let Memory::Releasing { order, .. } = self.memory else { return };
        self.timers.clear(Timer::MemoryDeadline);
        match result {
            Ok(()) => {
                tracing::info!("the engine's memory is released");
                self.set_memory(Memory::Released);
                self.weights_gone();
                self.memory_released(order);
            }
            Err(error) => {
                self.set_memory(Memory::Resident);
                let done = pb::ModeDone { order, drained: true, error, ..Default::default() };
                self.mode_done(done);
            }
        }
    }

    pub(super) fn resume_answered(&mut self, result: Result<(), String>) {
        let Memory::Resuming { order } = self.memory else { return };
        self.set_memory(if result.is_ok() { Memory::Resident } else { Memory::Released });
        self.answer(order, result);
    }
}
