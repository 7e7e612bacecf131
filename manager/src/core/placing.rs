//! Placing: waiting samples, in the order of the queue, onto engines that may run them.

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_proto::{SampleId, SessionId, seed};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::{Action, Notice, StartOrder};
use crate::event::SeedKeying;
use crate::fleet::Running;
use crate::need::{Allowed, Need};
use crate::rollout::{Pass, Rank, SampleState};

/// Samples that one pass has placed on one engine.
#[derive(Default)]
struct Placed {
    samples: u32,
    resumed: u32,
}

impl Core {
    /// One pass over the queue.
    pub(super) fn place(&mut self, now: Now) {
        self.lift_reserves();
        let Some(job) = self.job.settings() else { return };
        if self.job.is_paused() || self.rollout.queue().is_empty() || !self.fleet.any_serving() {
            return;
        }
        let max_lag = job.staleness.max_lag;
        let allowed = Allowed { current: self.weights.current(), max_lag };
        let waits_for_version = self.weights.books().pending().is_some();
        let mut placed: BTreeMap<SessionId, Placed> = BTreeMap::new();
        let mut pass = Pass::new(self.rollout.queue());
        while let Some((place, class)) = pass.next() {
            self.out.visit(1);
            if !self.rollout.queue().contains(place.sample) {
                pass.placed(self.rollout.queue(), place, class);
                continue;
            }
            // While a version waits for older groups to end, new groups wait for it.
            if waits_for_version && class.afresh {
                continue;
            }
            let choice = self.choose(allowed, place.sample);
            let Some(session) = choice else {
                pass.missed(self.rollout.queue(), place, class);
                continue;
            };
            let tally = placed.entry(session).or_default();
            tally.samples += 1;
            tally.resumed += u32::from(place.rank == Rank::Resumed);
            pass.placed(self.rollout.queue(), place, class);
            self.rollout.unqueue(place.sample);
            self.start(now, place.sample, session);
        }
        for (session, Placed { samples, resumed }) in placed {
            let Some(engine) = self.fleet.engine(session) else { continue };
            let engine = engine.id.clone();
            self.out.tell(Notice::SamplesPlaced { engine, samples, resumed });
        }
    }

    fn choose(&mut self, allowed: Allowed, id: SampleId) -> Option<SessionId> {
        let need: Need = self.rollout.need(id)?;
        let (choice, looked) = self.fleet.choose(&need, allowed);
        self.out.visit(looked);
        if choice.is_none() && need.alone && self.fleet.reserve_for(&need, allowed) {
            self.out.wake_placement();
        }
        choice
    }

    /// A reserved engine waits for its sample only while the sample waits to run alone, or runs there.
    fn lift_reserves(&mut self) {
        for (sample, session) in self.fleet.reserves() {
            let serves = self.fleet.engine(session).is_some_and(|e| e.serving().is_some());
            let waits = self.rollout.sample(sample).is_some_and(|record| match record.state() {
                SampleState::Waiting if self.rollout.queue().contains(sample) => {
                    self.rollout.need(sample).is_some_and(|need| need.alone)
                }
                // Its first token has cleared the sample.
                _ => {
                    record.running_on().is_some_and(|(at, _)| at == session)
                        && self.rollout.need(sample).is_some_and(|need| need.alone)
                }
            });
            if !serves || !waits {
                self.fleet.unreserve(session);
            }
        }
    }

    fn start(&mut self, now: Now, id: SampleId, session: SessionId) {
        let model = self.job.settings().expect("place has checked it").model.clone();
        if let Err(reject) = self.rollout.open_page(id, &model, &mut self.out) {
            return self.give_up_group(now, id.group, &reject.to_string(), false);
        }
        let Some(need) = self.rollout.need(id) else { return };
        let leader_wait = Duration::from_millis(self.config.leader_wait_ms);
        let attempt = self.rollout.start(now, id, session, leader_wait, &mut self.out);
        let Some(group) = self.rollout.group(id.group) else { return };
        let spec = group.spec.clone();
        let weight = need.weight();
        self.fleet.add(session, id, Running { attempt, weight, digest: spec.digest });
        let Some(engine) = self.fleet.engine(session) else { return };
        let own = group.samples()[id.index as usize].seed();
        let seed = match engine.hello.seed_keying {
            SeedKeying::AbsolutePosition => own,
            SeedKeying::Stream | SeedKeying::Unkeyed => seed::of_attempt(own, attempt.0),
        };
        let order = StartOrder {
            session,
            maker: engine.maker.clone(),
            sample: id,
            attempt,
            prompt: spec.prompt.clone(),
            prompt_digest: spec.digest,
            sampling: spec.sampling.clone(),
            stop_ids: self.rollout.stop_ids(id),
            seed,
            min_version: engine.version().unwrap_or(self.weights.current()),
            max_version: spec.pin,
            conversation: spec.conversation.clone(),
        };
        self.out.act(Action::Start(Box::new(order)));
    }
}
