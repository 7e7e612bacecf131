//! Admitting: groups that the trainer submits, cancels, or gave a deadline.

use std::collections::BTreeMap;

use anabranch_proto::{GroupId, SessionId, Step, tokens};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::{Answer, Notice, SubmitResult, SubmitVerdict};
use crate::event::{CancelWhat, NewGroup, ReplyTo};
use crate::rollout::admission::{self, Reject};
use crate::rollout::{GroupSpec, replay};
use crate::timer::Timer;

impl Core {
    pub(super) fn submit(
        &mut self,
        now: Now,
        session: SessionId,
        step: Step,
        is_final: bool,
        groups: Vec<NewGroup>,
        reply: ReplyTo,
    ) {
        if let Err((kind, why)) = self.job_of(session) {
            return self.out.fail(reply, kind, why);
        }
        self.trainer_heard(now);
        let books = self.rollout.books();
        let over = books.is_over(step);
        if over && groups.iter().any(|group| books.by_key(&group.key).is_none()) {
            let why = format!(
                "step {} is over: its last batch was cut; submit under a later step",
                step.0
            );
            return self.out.fail(reply, crate::action::FailKind::BadRequest, why);
        }
        let mut results = Vec::with_capacity(groups.len());
        let (mut accepted, mut samples) = (0, 0);
        for group in groups {
            let (key, n) = (group.key.clone(), group.n);
            let verdict = self.admit(now, step, group);
            if verdict == SubmitVerdict::Accepted {
                accepted += 1;
                samples += n;
            }
            results.push(SubmitResult { key, verdict });
        }
        // A full manager has not got the whole step yet: the trainer says "final" again with the rest.
        let complete = !results
            .iter()
            .any(|r| matches!(r.verdict, SubmitVerdict::Rejected { retry_after: Some(_), .. }));
        if !over {
            self.rollout.name_step(step, is_final && complete);
        }
        if accepted > 0 {
            self.out.tell(Notice::StepSubmitted { step: step.0, groups: accepted, samples });
        }
        self.out.reply(reply, Answer::Submitted(results));
        self.out.wake_placement();
        self.rollout.cut_batches(self.at(now), step, &mut self.out);
    }

    fn admit(&mut self, now: Now, step: Step, new: NewGroup) -> SubmitVerdict {
        let books = self.rollout.books();
        if books.by_key(&new.key).is_some() {
            return SubmitVerdict::Duplicate;
        }
        let job = self.job.settings().expect("submit has checked it");
        let (booked, limit) = (books.admitted_tokens(), self.config.admission_tokens);
        let verdict = match self.check_pin(&new) {
            Ok(()) => admission::check(&new, &job.model, booked, limit),
            Err(reject) => Err(reject),
        };
        match verdict {
            Err(reject) => SubmitVerdict::Rejected {
                retry_after: reject.retry_after(),
                why: reject.to_string(),
            },
            Ok(_) => {
                let seed = new.sampling.seed.unwrap_or(job.seed);
                let id = GroupId(self.out.fresh_id());
                if let Some(deadline) = new.deadline {
                    self.out.timers.set(Timer::Group(id), now + deadline);
                }
                self.rollout.admit(id, spec(step, new, seed), &mut self.out);
                SubmitVerdict::Accepted
            }
        }
    }

    fn check_pin(&self, new: &NewGroup) -> Result<(), Reject> {
        match new.pin {
            Some(pin)
                if pin != self.weights.current() && self.weights.books().find(pin).is_none() =>
            {
                Err(Reject::UnknownPin { pin })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn cancel(
        &mut self,
        now: Now,
        session: SessionId,
        what: CancelWhat,
        keep_partial: bool,
        reply: ReplyTo,
    ) {
        if let Err((kind, why)) = self.job_of(session) {
            return self.out.fail(reply, kind, why);
        }
        self.trainer_heard(now);
        let books = self.rollout.books();
        let wanted: Vec<GroupId> = match what {
            CancelWhat::All => self.rollout.open_groups(),
            CancelWhat::Keys(keys) => keys.iter().filter_map(|key| books.by_key(key)).collect(),
            CancelWhat::Step(step) => {
                books.step(step).map(|s| s.groups.iter().copied().collect()).unwrap_or_default()
            }
        };
        let open: BTreeMap<GroupId, u32> = wanted
            .into_iter()
            .filter_map(|id| books.group(id).map(|group| (id, group.open_samples())))
            .filter(|(_, open)| *open > 0)
            .collect();
        let (groups, samples) = (open.len() as u32, open.values().sum());
        for group in open.into_keys() {
            self.give_up_group(now, group, "cancelled by the trainer", keep_partial);
        }
        self.out.reply(reply, Answer::Cancelled { groups, samples });
    }

    pub(super) fn group_overdue(&mut self, now: Now, group: GroupId) {
        if self.rollout.group(group).is_some_and(|group| !group.is_over()) {
            self.give_up_group(now, group, "its deadline passed", false);
        }
    }
}

fn spec(step: Step, new: NewGroup, seed: u64) -> GroupSpec {
    GroupSpec {
        key: new.key.as_str().into(),
        step,
        prompt_tokens: (new.prompt.len() / tokens::WIDTH) as u32,
        digest: tokens::prompt_digest(&new.prompt),
        prompt: new.prompt,
        n: new.n,
        restarts: !replay::unreplayable(&new.sampling).is_empty(),
        sampling: new.sampling,
        seed,
        pin: new.pin,
        priority: new.priority,
        meta: new.meta,
        conversation: new.session,
    }
}
