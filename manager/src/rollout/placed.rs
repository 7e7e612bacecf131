//! Placement from the side of a sample: what the sample wants of an engine, and its start there.

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{Attempt, SampleId, SessionId};
use anabranch_runtime::clock::Now;

use super::Rollout;
use super::admission::{self, Reject};
use super::change::Change;
use super::sample::SampleState;
use crate::action::Action;
use crate::event::Model;
use crate::ledger::StopRules;
use crate::need::Need;
use crate::outbox::Outbox;
use crate::timer::Timer;

impl Rollout {
    /// What a sample wants of an engine now.
    pub fn need(&self, id: SampleId) -> Option<Need> {
        let group = self.books.group(id.group)?;
        let sample = group.samples().get(id.index as usize)?;
        Some(Need {
            sample: id,
            prefill: group.spec.prompt_tokens + sample.live.kept,
            remaining: group.spec.sampling.max_tokens.saturating_sub(sample.live.kept),
            pin: group.spec.pin,
            warm: group.live.warm,
            alone: sample.live.deaths >= super::SUSPICIOUS_DEATHS,
        })
    }

    /// Opens the ledger's page at the first placement, when the model is known. `Err`: the group does not fit
    /// the model and must be given up.
    pub fn open_page(
        &mut self,
        id: SampleId,
        model: &Model,
        out: &mut Outbox,
    ) -> Result<(), Reject> {
        let Some(group) = self.books.group(id.group) else { return Ok(()) };
        let spec = group.spec.clone();
        let sampling = &spec.sampling;
        if group.live.stop_ids.is_none() {
            admission::check_prompt(&spec.prompt, spec.prompt_tokens, sampling.max_tokens, model)?;
            let mut stop_ids = sampling.stop_ids.clone();
            if !sampling.ignore_eos {
                stop_ids.extend(&model.eos_ids);
            }
            stop_ids.sort_unstable();
            stop_ids.dedup();
            if let Some(live) = self.books.live_mut(id.group) {
                live.stop_ids = Some(stop_ids.into());
            }
        }
        let has_page =
            self.books.sample_live_mut(id).map(|live| std::mem::replace(&mut live.has_page, true));
        if has_page == Some(false) {
            let rules = StopRules {
                max_tokens: sampling.max_tokens,
                min_tokens: sampling.min_tokens,
                stop_ids: self.stop_ids(id).to_vec(),
                vocab: model.vocab,
                pin: spec.pin,
            };
            out.act(Action::OpenPage { sample: id, rules: Arc::new(rules) });
        }
        Ok(())
    }

    /// EOS and stop ids of a sample's group; empty before its first placement.
    pub fn stop_ids(&self, id: SampleId) -> Arc<[u32]> {
        let group = self.books.group(id.group);
        group.and_then(|group| group.live.stop_ids.clone()).unwrap_or_default()
    }

    /// The sample runs on `session` from now on. Its first sibling there is the group's leader: the others
    /// wait for the leader's prefix for `leader_wait` at most.
    pub fn start(
        &mut self,
        now: Now,
        id: SampleId,
        session: SessionId,
        leader_wait: Duration,
        out: &mut Outbox,
    ) -> Attempt {
        let Some(group) = self.books.group(id.group) else { return Attempt::default() };
        let (leads, ages) = (group.live.warm.is_none(), group.ages());
        if leads && group.n() > 1 && !group.live.released {
            out.timers.set(Timer::Leader(id.group), now + leader_wait);
        }
        let attempt = Attempt(group.samples()[id.index as usize].attempts() + 1);
        if let Some(live) = self.books.live_mut(id.group) {
            live.warm = Some(session);
        }
        if let Some(live) = self.books.sample_live_mut(id) {
            live.had_token = false;
        }
        if ages {
            self.exposure.count(session, true);
        }
        self.commit_change(Change::Moved {
            sample: id,
            to: SampleState::Running { session, attempt },
        });
        attempt
    }
}
