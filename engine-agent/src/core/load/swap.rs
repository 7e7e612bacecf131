//! Changing the engine's weights, call by call: `impl Core` from quiet streams to the verdict of the probe.

use anabranch_proto::pb;
use anabranch_proto::pb::load_state::Stage;
use anabranch_proto::pb::probe::Verdict;
use anabranch_runtime::Now;

use super::job::{Job, verdict, wire};
use super::loader::{HeldBack, LoadState, Serving};
use crate::core::Core;
use crate::core::action::{Action, Exit};
use crate::core::event::{Call, ProbeResult, Staged};
use crate::core::timer::Timer;

impl Core {
    pub(in crate::core) fn called(&mut self, now: Now, call: Call, result: Result<(), String>) {
        match (call, result) {
            (Call::Freeze, Ok(())) => self.frozen(),
            (Call::Load, Ok(())) => self.loaded(),
            (Call::Thaw, Ok(())) => self.thawed(now),
            (Call::Freeze | Call::Load, Err(why)) => self.load_failed(why),
            (Call::Thaw, Err(why)) => self.thaw_failed(why),
            (call, result) => self.mode_called(call, result),
        }
    }

    fn frozen(&mut self) {
        match std::mem::take(&mut self.loader.state) {
            LoadState::Freezing(job, staged) => {
                self.report(job.report(Stage::Loading));
                let directory = staged.directory.clone();
                self.act(Action::LoadWeights { directory, label: job.to.to_string() });
                self.loader.state = LoadState::Loading(job, staged);
            }
            other => self.loader.state = other,
        }
    }

    /// The engine has new weights; from here on its tokens are theirs.
    fn loaded(&mut self) {
        match std::mem::take(&mut self.loader.state) {
            LoadState::Loading(job, staged) => {
                self.mark_boundaries();
                self.report(job.report(Stage::Probing));
                self.loader.state = LoadState::Thawing(job, staged);
                self.act(Action::Call(Call::Thaw));
            }
            // The old ones are back.
            LoadState::Restoring { job, why, .. } => {
                self.loader.state = LoadState::Restoring { job, why, reload: false };
                self.act(Action::Call(Call::Thaw));
            }
            other => self.loader.state = other,
        }
    }

    fn thawed(&mut self, now: Now) {
        match std::mem::take(&mut self.loader.state) {
            LoadState::Thawing(job, staged) => {
                self.loader.state = LoadState::Probing(job, staged);
                self.act(Action::Probe);
            }
            LoadState::Restoring { job, why, reload: false } => self.fail_load(now, job, why),
            other => self.loader.state = other,
        }
    }

    pub(in crate::core) fn probed(&mut self, now: Now, result: Result<ProbeResult, String>) {
        let (job, staged) = match std::mem::take(&mut self.loader.state) {
            LoadState::Probing(job, staged) => (job, staged),
            other => {
                self.loader.state = other;
                return;
            }
        };
        let probe = match result {
            Ok(probe) => probe,
            Err(why) => return self.go_back(now, job, format!("the probe failed: {why}")),
        };
        let verdict = verdict(&probe, job.reference.as_ref(), self.loader.last_probe.as_ref());
        if verdict == Verdict::Disagrees {
            let why =
                "its log-probabilities differ from a replica's at the same version".to_owned();
            let report =
                pb::LoadState { probe: Some(wire(&probe, verdict)), ..job.report(Stage::Probing) };
            self.report(report);
            return self.go_back(now, job, why);
        }
        self.activate(now, job, staged, probe, verdict);
    }

    fn activate(
        &mut self,
        now: Now,
        job: Job,
        staged: Staged,
        probe: ProbeResult,
        verdict: Verdict,
    ) {
        tracing::info!(version = %job.to, probe = verdict.as_str_name(), "version active");
        self.timers.clear(Timer::LoadDeadline);
        self.loader.take(Serving {
            version: job.to,
            label: job.to.to_string(),
            directory: Some(staged.directory.clone()),
        });
        self.loader.last_probe = Some(probe.clone());
        self.act(Action::KeepStaged { version: job.to, directory: staged.directory.clone() });
        self.report(job.active(Some(probe), verdict, Some(&staged)));
        for item in std::mem::take(&mut self.loader.held_back) {
            match item {
                HeldBack::Tokens { run, tokens, logprobs, spans } => {
                    self.take_tokens(now, run, &tokens, &logprobs, &spans);
                }
                HeldBack::End { run, end } => self.run_ended(now, run, end),
            }
        }
        self.finish_load(now);
    }

    /// The engine refused, or could not be paused: its weights are still the old ones.
    fn load_failed(&mut self, why: String) {
        match std::mem::take(&mut self.loader.state) {
            LoadState::Freezing(job, _) | LoadState::Loading(job, _) => {
                self.loader.state = LoadState::Restoring { job, why, reload: false };
                self.act(Action::Call(Call::Thaw));
            }
            LoadState::Restoring { job, why: first, .. } => {
                self.unverified(&job, &format!("{first}; and going back failed: {why}"));
            }
            other => self.loader.state = other,
        }
    }

    fn thaw_failed(&mut self, why: String) {
        match std::mem::take(&mut self.loader.state) {
            LoadState::Thawing(job, _) | LoadState::Restoring { job, .. } => {
                self.unverified(&job, &format!("the engine does not go on: {why}"));
            }
            other => self.loader.state = other,
        }
    }

    /// The new weights are in, and are not to be trusted: put the old ones back.
    fn go_back(&mut self, now: Now, job: Job, why: String) {
        tracing::warn!(version = %job.to, why, "load refused; going back");
        self.abort_unverified(now, "the new weights were refused");
        let old = self.loader.serving.clone();
        let Some((directory, label)) = old.and_then(|old| Some((old.directory?, old.label))) else {
            self.unverified(&job, &format!("{why}; no copy of the old weights can be read here"));
            return;
        };
        self.loader.state = LoadState::Restoring { job, why, reload: true };
        self.act(Action::LoadWeights { directory, label });
    }

    /// Nobody vouches for what the engine would generate.
    fn unverified(&mut self, job: &Job, why: &str) {
        self.report(job.failed(why.to_owned()));
        self.loader.serving = None;
        self.exit(Exit::Unverified { why: why.to_owned() });
    }
}
