//! Placement: waiting samples, in queue order, onto engines that may run them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{Attempt, SampleId, SessionId, seed};
use anabranch_runtime::clock::Now;

use super::Core;
use super::timer::Timer;
use crate::action::{Action, Notice, StartOrder};
use crate::event::SeedKeying;
use crate::fleet::placement::{Allowed, Need};
use crate::fleet::{Engine, Running};
use crate::ledger::StopRules;
use crate::rollout::admission;
use crate::rollout::queue::{Class, Place};
use crate::rollout::sample::SampleState;

/// A pass gives up after so many samples that no engine can take: the rest of the queue wants the same.
const MAX_MISSES: usize = 256;

#[derive(Default)]
struct Placed {
    samples: u32,
    resumed: u32,
}

impl Core {
    pub(super) fn place(&mut self, now: Now) {
        self.lift_reservations();
        let Some(job) = &self.job else { return };
        if job.paused
            || self.queue.is_empty()
            || !self.engines.values().any(|e| e.serving().is_some())
        {
            return;
        }
        let allowed = Allowed { current: self.current, max_lag: job.staleness.max_lag };
        let waits_for_version = self.versions.pending().is_some();
        let mut placed: BTreeMap<SessionId, Placed> = BTreeMap::new();
        let mut misses = 0;
        let places: Vec<Place> = self.queue.iter().copied().collect();
        for place in places {
            if misses >= MAX_MISSES {
                break;
            }
            // While a version waits for older groups to end, new groups wait for it.
            if waits_for_version && self.starts_afresh(place.sample) {
                misses += 1;
                continue;
            }
            match self.choose(now, allowed, place) {
                Some(session) => {
                    self.queue.remove(&place);
                    let tally = placed.entry(session).or_default();
                    tally.samples += 1;
                    tally.resumed += u32::from(place.class == Class::Resumed);
                    self.start(now, place.sample, session);
                }
                None => misses += 1,
            }
        }
        for (session, Placed { samples, resumed }) in placed {
            let Some(engine) = self.engines.get(&session) else { continue };
            let engine = engine.id.clone();
            self.tell(Notice::SamplesPlaced { engine, samples, resumed });
        }
    }

    /// No sample of its group has a token yet.
    fn starts_afresh(&self, sample: SampleId) -> bool {
        self.groups.get(&sample.group).is_some_and(|g| g.pin.is_none() && g.oldest() == u64::MAX)
    }

    fn choose(&mut self, now: Now, allowed: Allowed, place: Place) -> Option<SessionId> {
        let group = &self.groups[&place.sample.group];
        let sample = &group.samples[place.sample.index as usize];
        let need = Need {
            sample: place.sample,
            prefill: group.prompt_tokens + sample.kept,
            remaining: group.sampling.max_tokens.saturating_sub(sample.kept),
            pin: group.pin,
            warm: group.warm,
            alone: place.class == Class::Held,
        };
        let choice = need.choose(now, allowed, self.engines.values());
        if choice.is_none() && need.alone {
            self.reserve_for(&need, allowed);
        }
        choice
    }

    /// A reserved engine waits for its sample only while that waits for it, or runs there.
    fn lift_reservations(&mut self) {
        let lapsed = |core: &Self, session: SessionId, id: SampleId| match core.sample(id) {
            Some(sample) if sample.state == SampleState::Waiting { queued: true } => {
                core.place_of(id).class != Class::Held
            }
            Some(sample) => sample.running_on().is_none_or(|(at, _)| at != session),
            None => true,
        };
        let over: Vec<SessionId> = self
            .engines
            .values()
            .filter(|e| {
                e.reserved.is_some_and(|id| e.serving().is_none() || lapsed(self, e.session, id))
            })
            .map(|engine| engine.session)
            .collect();
        for session in over {
            if let Some(engine) = self.engines.get_mut(&session) {
                engine.reserved = None;
            }
        }
    }

    /// A sample that may be poison runs alone: the emptiest engine takes nothing new until it is free.
    fn reserve_for(&mut self, need: &Need, allowed: Allowed) {
        let sample = need.sample;
        if let Some(engine) = self.engines.values_mut().find(|e| e.reserved == Some(sample)) {
            if need.suits(allowed, engine) {
                return;
            }
            engine.reserved = None;
        }
        let suits = |e: &&mut Engine| e.reserved.is_none() && need.suits(allowed, e);
        let free = self.engines.values_mut().filter(suits);
        if let Some(engine) = free.min_by_key(|engine| engine.running.len()) {
            engine.reserved = Some(sample);
            self.placeable = true;
        }
    }

    fn start(&mut self, now: Now, id: SampleId, session: SessionId) {
        if !self.open_page(now, id) {
            return;
        }
        let first_of_group = {
            let group = self.groups.get_mut(&id.group).expect("it was in the queue");
            let first = group.warm.is_none();
            group.warm = Some(session);
            first
        };
        let group = &self.groups[&id.group];
        if first_of_group && group.n() > 1 && !group.released {
            let wait = Duration::from_millis(self.config.leader_wait_ms);
            self.timers.set(Timer::Leader(id.group), now + wait);
        }
        let order = self.order_start(now, id, session);
        self.act(Action::Start(Box::new(order)));
    }

    fn order_start(&mut self, now: Now, id: SampleId, session: SessionId) -> StartOrder {
        let silence = self.config.silence(0, true) / 4;
        let group = self.groups.get_mut(&id.group).expect("start has looked it up");
        let sample = &mut group.samples[id.index as usize];
        sample.attempts += 1;
        let attempt = Attempt(sample.attempts);
        sample.state =
            SampleState::Running { session, attempt, last_progress: now, had_token: false };
        let prefill = u64::from(group.prompt_tokens + sample.kept);
        let remaining = group.sampling.max_tokens.saturating_sub(sample.kept);
        let engine = self.engines.get_mut(&session).expect("chosen among them");
        let weight = prefill + u64::from(remaining.min(1024));
        engine.add(id, Running { attempt, weight, digest: group.digest });
        if self.timers.get(Timer::Progress(session)).is_none() {
            self.timers.set(Timer::Progress(session), now + silence);
        }
        let seed = match engine.hello.seed_keying {
            SeedKeying::AbsolutePosition => sample.seed,
            SeedKeying::Stream | SeedKeying::Unkeyed => seed::of_attempt(sample.seed, attempt.0),
        };
        StartOrder {
            session,
            maker: engine.maker.clone(),
            sample: id,
            attempt,
            prompt: group.prompt.clone(),
            prompt_digest: group.digest,
            sampling: group.sampling.clone(),
            stop_ids: group.stop_ids.clone().expect("open_page has set them"),
            seed,
            min_version: engine.version().unwrap_or(self.current),
            max_version: group.pin,
            conversation: group.conversation.clone(),
        }
    }

    /// Opens the ledger's page at the first placement, when the model is known. False where the sample
    /// turned out not to fit the model and was given up.
    fn open_page(&mut self, now: Now, id: SampleId) -> bool {
        let model = self.job.as_ref().expect("place has checked it").model.clone();
        let group = self.groups.get_mut(&id.group).expect("it was in the queue");
        if group.stop_ids.is_none() {
            let fits = admission::check_prompt(
                &group.prompt,
                group.prompt_tokens,
                group.sampling.max_tokens,
                &model,
            );
            if let Err(reject) = fits {
                self.give_up_group(now, id.group, &reject.to_string(), false);
                return false;
            }
            let mut stop_ids = group.sampling.stop_ids.clone();
            if !group.sampling.ignore_eos {
                stop_ids.extend(&model.eos_ids);
            }
            stop_ids.sort_unstable();
            stop_ids.dedup();
            group.stop_ids = Some(stop_ids.into());
        }
        let sample = &mut group.samples[id.index as usize];
        if !std::mem::replace(&mut sample.has_page, true) {
            let rules = StopRules {
                max_tokens: group.sampling.max_tokens,
                min_tokens: group.sampling.min_tokens,
                stop_ids: group.stop_ids.as_deref().unwrap_or_default().to_vec(),
                vocab: model.vocab,
                pin: group.pin,
            };
            self.act(Action::OpenPage { sample: id, rules: Arc::new(rules) });
        }
        true
    }
}
