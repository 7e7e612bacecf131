//! The manager's orders beside loads: `impl Core` for drain, leave, memory, pause and continue.

use std::time::Duration;

use anabranch_proto::pb::{self, from_agent, mode};
use anabranch_runtime::Now;

use super::Core;
use super::action::Action;
use super::event::Call;

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

    pub(super) fn answer(&mut self, order: u64, result: Result<(), String>) {
        let ok = result.is_ok();
        let error = result.err().unwrap_or_default();
        self.mode_done(pb::ModeDone { order, ok, error, ..Default::default() });
    }

    pub(super) fn mode_done(&mut self, done: pb::ModeDone) {
        self.tell(from_agent::Kind::ModeDone(done));
    }
}
