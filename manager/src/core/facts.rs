//! Facts of the ledger: samples grow, finish, lose their attempt, or are silent.

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_proto::{Attempt, SampleId, SessionId};
use anabranch_runtime::clock::Now;

use super::Core;
use super::losing::Moved;
use crate::action::{Action, Finish, Notice};
use crate::fleet::EngineState;
use crate::ledger::{Ended, Fact, Finished, Silent};
use crate::rollout::Grown;
use crate::timer::Timer;

/// Pause of an engine that said "busy", or lost a stream.
const BUSY_PAUSE: Duration = Duration::from_millis(200);
/// Malformed streams from one engine, after which the engine must stay away for a while.
const MAX_BROKEN: u32 = 16;

impl Core {
    pub(super) fn facts_found(&mut self, now: Now, session: SessionId, facts: Vec<Fact>) {
        self.engine_heard(now, session);
        self.out.visit(facts.len());
        let mut moved: BTreeMap<&'static str, Moved> = BTreeMap::new();
        for fact in facts {
            match fact {
                Fact::Grew { sample, attempt, kept, oldest } => {
                    self.sample_grew(session, Grown { sample, attempt, kept, oldest });
                }
                Fact::Finished { sample, attempt, kept, oldest, how, running } => {
                    self.sample_grew(session, Grown { sample, attempt, kept, oldest });
                    if self.rollout.sample(sample).is_some_and(|sample| sample.is_open()) {
                        self.rollout.counted(sample, kept, oldest);
                    }
                    self.sample_finished(now, session, (sample, attempt), how, running);
                }
                Fact::Ended { sample, attempt, kept, oldest, why } => {
                    self.sample_grew(session, Grown { sample, attempt, kept, oldest });
                    if let Some((label, kept)) =
                        self.attempt_ended(now, session, (sample, attempt), why)
                    {
                        let moved = moved.entry(label).or_default();
                        moved.samples += 1;
                        moved.kept_tokens += u64::from(kept);
                    }
                }
            }
        }
        for (why, moved) in moved {
            self.tell_moved(session, moved, why);
        }
    }

    fn sample_grew(&mut self, session: SessionId, grown: Grown) {
        self.rollout.grew(session, grown, &mut self.out);
    }

    fn sample_finished(
        &mut self,
        now: Now,
        session: SessionId,
        (id, attempt): (SampleId, Attempt),
        how: Finished,
        running: bool,
    ) {
        if !self.rollout.sample(id).is_some_and(|sample| sample.is_open()) {
            return;
        }
        if self.rollout.is_current(session, id, attempt) {
            self.detach(id, session);
            if running {
                self.out.act(Action::Stop { session, sample: id, attempt, why: "finished" });
            }
        } else {
            // The finish was in the ledger before the sample was moved on.
            self.take_off(id, "finished elsewhere");
        }
        let how = match how {
            Finished::Stop(matched) => Finish::Stop(matched),
            Finished::Length => Finish::Length,
            Finished::Cancelled => Finish::Cancelled,
        };
        self.rollout.finish(self.at(now), id, how, &mut self.out);
    }

    /// An attempt is over and its sample is not. Says under which heading the sample moves, and its tokens.
    fn attempt_ended(
        &mut self,
        now: Now,
        session: SessionId,
        (id, attempt): (SampleId, Attempt),
        why: Ended,
    ) -> Option<(&'static str, u32)> {
        if !self.rollout.is_current(session, id, attempt) {
            return None;
        }
        self.detach(id, session);
        let kept = self.rollout.sample(id)?.live.kept;
        let label = match why {
            Ended::Refused(why) => {
                self.abandon(now, id, &format!("the engine refused it: {why}"));
                return None;
            }
            Ended::Aborted => "aborted",
            Ended::Busy(_) => {
                self.rest(now, session);
                "engine busy"
            }
            Ended::Lost(what) => {
                // The ledger may have ended it: the engine does not know.
                self.out.act(Action::Stop { session, sample: id, attempt, why: "lost" });
                // If the engine is dying, its other streams end too, and its death is heard in a moment.
                self.rest(now, session);
                self.note_loss(now, id, &what)?;
                "stream lost"
            }
            Ended::Broken(what) => {
                self.out.act(Action::Stop { session, sample: id, attempt, why: "broken stream" });
                self.note_broken(now, session, &what);
                self.note_loss(now, id, &what)?;
                "malformed stream"
            }
        };
        self.rollout.requeue(id, &mut self.out);
        Some((label, kept))
    }

    /// Attempts whose engine has said nothing about them for too long go on elsewhere.
    pub(super) fn silence_found(&mut self, now: Now, session: SessionId, silent: &[Silent]) {
        let Some(engine) = self.fleet.engine(session) else { return };
        // While it loads weights, and while its link is lost, an engine makes no tokens.
        let quiet = matches!(
            engine.state(),
            EngineState::Updating { .. } | EngineState::Suspect { .. } | EngineState::Gone { .. }
        );
        if engine.link.is_none() || quiet {
            return;
        }
        let (running, makes_since) = (engine.running.len(), engine.makes_since);
        self.out.visit(silent.len());
        let mut moved = Moved::default();
        for silent in silent {
            let id = silent.sample;
            let prefill = self.rollout.need(id).map_or(0, |need| need.prefill);
            let patience = self.config.silence(running, silent.had_token, prefill);
            if now.since(silent.since.max(makes_since)) <= patience
                || !self.rollout.is_current(session, id, silent.attempt)
            {
                continue;
            }
            moved.add(self.rollout.sample(id));
            self.take_off(id, "no progress");
            if self.note_loss(now, id, "no progress within its deadline").is_some() {
                self.rollout.requeue(id, &mut self.out);
            }
        }
        if moved.samples > 0 {
            // Do not send them straight back to an engine that hangs.
            self.rest_until(session, now + self.config.silence(0, true, 0));
        }
        self.tell_moved(session, moved, "no progress");
    }

    /// Nothing new for this engine for a moment.
    fn rest(&mut self, now: Now, session: SessionId) {
        let Some(engine) = self.fleet.engine(session) else { return };
        self.rest_until(session, engine.not_before.max(now + BUSY_PAUSE));
    }

    fn rest_until(&mut self, session: SessionId, until: Now) {
        self.fleet.rest(session, until);
        self.out.timers.set(Timer::Rested(session), until);
    }

    fn note_broken(&mut self, now: Now, session: SessionId, what: &str) {
        let news = self.fleet.update(session, |engine| {
            engine.broken += 1;
            (engine.broken, engine.id.clone())
        });
        let Some((broken, engine)) = news else { return };
        self.out.counters.misbehaved += 1;
        self.out.tell(Notice::PeerMisbehaved { engine, what: what.to_owned() });
        if broken >= MAX_BROKEN {
            self.quarantine(now, session, &format!("{broken} malformed streams, last: {what}"));
        }
    }
}
