//! Changing the engine's weights, call by call: `impl Core` from quiet streams to the verdict of
//! the probe.

use anabranch_proto::{LoadStage, Verdict, pb};
use anabranch_runtime::Now;

use super::loader::{Serving, Withheld};
use super::order::{LoadOrder, verdict, wire};
use super::state::LoadState;
use crate::core::Core;
use crate::core::action::{Action, ExitReason};
use crate::core::event::{Call, ProbeResult, StagedVersion};
use crate::core::timer::Timer;

impl Core {
    pub(in crate::core) fn called(&mut self, now: Now, call: Call, result: Result<(), String>) {
        match (call, result) {
            (Call::PauseForLoad, Ok(())) => self.paused_for_load(),
            (Call::Load, Ok(())) => self.loaded(),
            (Call::ContinueAfterLoad, Ok(())) => self.continued(now),
            (Call::PauseForLoad | Call::Load, Err(why)) => self.load_failed(why),
            (Call::ContinueAfterLoad, Err(why)) => self.continue_failed(why),
            (call, result) => self.mode_called(call, result),
        }
    }

    fn paused_for_load(&mut self) {
        if let LoadState::Pausing(order, staged) = self.loader.state().clone() {
            self.report(order.report(LoadStage::Loading));
            let directory = staged.directory.clone();
            self.act(Action::LoadWeights { directory, label: order.to.to_string() });
            self.loader.set_state(LoadState::Loading(order, staged));
        }
    }

    /// Notes that the engine has new weights: from here on its tokens belong to the new version.
    fn loaded(&mut self) {
        match self.loader.state().clone() {
            LoadState::Loading(order, staged) => {
                self.mark_boundaries();
                self.report(order.report(LoadStage::Probing));
                self.loader.set_state(LoadState::Continuing(order, staged));
                self.act(Action::Call(Call::ContinueAfterLoad));
            }
            // The old weights are back in the engine.
            LoadState::Restoring { order, why, reload: true } => {
                self.loader.set_state(LoadState::Restoring { order, why, reload: false });
                self.act(Action::Call(Call::ContinueAfterLoad));
            }
            _ => {}
        }
    }

    fn continued(&mut self, now: Now) {
        match self.loader.state().clone() {
            LoadState::Continuing(order, staged) => {
                self.loader.set_state(LoadState::Probing(order, staged));
                self.act(Action::Probe);
            }
            LoadState::Restoring { order, why, reload: false } => self.fail_load(now, order, why),
            _ => {}
        }
    }

    pub(in crate::core) fn probed(&mut self, now: Now, result: Result<ProbeResult, String>) {
        let LoadState::Probing(order, staged) = self.loader.state().clone() else { return };
        let probe = match result {
            Ok(probe) => probe,
            Err(why) => return self.go_back(now, order, format!("the probe failed: {why}")),
        };
        let verdict = verdict(&probe, order.reference.as_ref(), self.loader.last_probe.as_ref());
        if verdict == Verdict::Disagrees {
            let why =
                "its log-probabilities differ from a replica's at the same version".to_owned();
            let report = pb::LoadState {
                probe: Some(wire(&probe, verdict)),
                ..order.report(LoadStage::Probing)
            };
            self.report(report);
            return self.go_back(now, order, why);
        }
        self.activate(now, order, staged, probe, verdict);
    }

    fn activate(
        &mut self,
        now: Now,
        order: LoadOrder,
        staged: StagedVersion,
        probe: ProbeResult,
        verdict: Verdict,
    ) {
        tracing::info!(version = %order.to, probe = verdict.name(), "version active");
        self.timers.clear(Timer::LoadDeadline);
        self.loader.take(Serving {
            version: order.to,
            label: order.to.to_string(),
            directory: Some(staged.directory.clone()),
        });
        self.loader.last_probe = Some(probe.clone());
        self.act(Action::KeepStaged { version: order.to, directory: staged.directory.clone() });
        self.report(order.active(Some(probe), verdict, Some(&staged)));
        // Nothing is withheld from here on, so the replay below reaches the attempts.
        self.loader.set_state(LoadState::Active);
        for item in std::mem::take(&mut self.loader.withheld) {
            match item {
                Withheld::Tokens { attempt, tokens, logprobs, spans } => {
                    self.take_tokens(now, attempt, &tokens, &logprobs, &spans);
                }
                Withheld::End { attempt, end } => self.request_ended(now, attempt, end),
            }
        }
        self.finish_load(now);
    }

    /// Undoes the pause after a refusal: the engine's weights are still the old ones.
    fn load_failed(&mut self, why: String) {
        match self.loader.state().clone() {
            LoadState::Pausing(order, _) | LoadState::Loading(order, _) => {
                self.loader.set_state(LoadState::Restoring { order, why, reload: false });
                self.act(Action::Call(Call::ContinueAfterLoad));
            }
            LoadState::Restoring { order, why: first, .. } => {
                self.unverified(&order, &format!("{first}; and going back failed: {why}"));
            }
            _ => {}
        }
    }

    fn continue_failed(&mut self, why: String) {
        match self.loader.state().clone() {
            LoadState::Continuing(order, _) | LoadState::Restoring { order, .. } => {
                self.unverified(&order, &format!("the engine does not go on: {why}"));
            }
            _ => {}
        }
    }

    /// Puts the old weights back: the new ones are in the engine, and are not to be trusted.
    fn go_back(&mut self, now: Now, order: LoadOrder, why: String) {
        tracing::warn!(version = %order.to, why, "load refused; going back");
        self.abort_unverified(now, "the new weights were refused");
        let old = self.loader.serving.clone();
        let Some((directory, label)) = old.and_then(|old| Some((old.directory?, old.label))) else {
            self.unverified(&order, &format!("{why}; no copy of the old weights can be read here"));
            return;
        };
        self.loader.set_state(LoadState::Restoring { order, why, reload: true });
        self.act(Action::LoadWeights { directory, label });
    }

    /// Ends the agent: nobody vouches for what the engine would generate.
    fn unverified(&mut self, order: &LoadOrder, why: &str) {
        self.report(order.failed(why.to_owned()));
        self.loader.serving = None;
        self.loader.set_state(LoadState::Active);
        self.exit(ExitReason::Unverified { why: why.to_owned() });
    }
}
