//! The trainer's side: open, submit, cancel, close, and what happens when it is lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::{GroupId, SampleId, SessionId, Step, Version, seed, tokens};
use anabranch_runtime::clock::Now;

use super::timer::Timer;
use super::{Core, StepState};
use crate::action::{Action, Answer, FailKind, Notice, SubmitResult, SubmitVerdict};
use crate::core::job::Job;
use crate::event::{CancelWhat, NewGroup, OpenJob, ReplyTo};
use crate::rollout::admission::{self, Reject};
use crate::rollout::egress::Egress;
use crate::rollout::group::Group;
use crate::rollout::queue::Queue;
use crate::rollout::replay;
use crate::rollout::sample::Sample;
use crate::weights::versions::Versions;

impl Core {
    pub(super) fn open_job(&mut self, now: Now, open: OpenJob, reply: ReplyTo) {
        let joins = match &self.job {
            Some(job) if job.name == open.job && job.epoch == open.epoch => true,
            Some(job) if job.name == open.job && open.epoch < job.epoch => {
                let why = format!(
                    "job {} is at epoch {}, asked for epoch {}: an older trainer is fenced off",
                    job.name, job.epoch, open.epoch
                );
                return self.fail(reply, FailKind::Conflict, why);
            }
            Some(job) if job.name != open.job && !job.sessions.is_empty() => {
                let why = format!(
                    "this manager runs job {}; close it first, or start another manager for {}",
                    job.name, open.job
                );
                return self.fail(reply, FailKind::Conflict, why);
            }
            _ => false,
        };
        let resume = open.resume;
        let name = open.job.clone();
        let epoch = open.epoch;
        if !joins {
            self.begin_epoch(now, open);
        }
        let session = SessionId(self.fresh_id());
        if let Some(cursor) = resume {
            let forgotten = self.egress.rewind(cursor);
            self.forget_batches(&forgotten);
        }
        let (floor, current) = (self.egress.floor(), self.current);
        let serve_key = self.config.serve_key("trainer", session.0);
        let job = self.job.as_mut().expect("joined or begun above");
        job.sessions.insert(session);
        job.paused = false;
        self.trainer_heard(now);
        self.placeable = true;
        let resumed = joins || resume.is_some();
        self.tell(Notice::JobOpened { job: name, epoch, resumed });
        self.reply(reply, Answer::Opened { session, floor, current, serve_key, resumed });
    }

    /// A new job, or a new epoch of this one. The same job's undelivered work goes on: its trainer was
    /// restarted and will ask for it from its cursor; another job's work is dropped.
    fn begin_epoch(&mut self, now: Now, open: OpenJob) {
        let same_job = self.job.as_ref().is_some_and(|job| job.name == open.job);
        if !same_job {
            self.drop_everything(now);
            self.egress = Egress::default();
            self.pack = None;
        }
        // Another epoch may use a key again once its group is committed and forgotten.
        let groups = &self.groups;
        self.keys.retain(|_, group| groups.contains_key(group));
        self.past_steps.clear();
        self.current = Version::base(open.epoch);
        self.versions = Versions::default();
        self.job = Some(Job::new(open, now));
        let sessions: Vec<SessionId> = self.engines.keys().copied().collect();
        for session in sessions {
            self.join_job(now, session);
        }
    }

    fn drop_everything(&mut self, now: Now) {
        let groups: Vec<GroupId> = self.groups.keys().copied().collect();
        for group in groups {
            self.give_up_group(now, group, "another job took over", false);
            let samples = self.samples_of(group);
            self.act(Action::Forget { samples });
        }
        self.groups.clear();
        self.keys.clear();
        self.steps.clear();
        self.queue = Queue::default();
        self.admitted_tokens = 0;
    }

    pub(super) fn samples_of(&self, group: GroupId) -> Vec<SampleId> {
        let n = self.groups.get(&group).map_or(0, Group::n);
        (0..n).map(|index| SampleId { group, index }).collect()
    }

    pub(super) fn trainer_heard(&mut self, now: Now) {
        let Some(job) = self.job.as_mut() else { return };
        job.last_heard = now;
        let at = now + job.on_trainer_lost;
        self.timers.set(Timer::TrainerLost, at);
    }

    /// Nobody has come for the results for too long: stop burning GPUs. Everything is kept.
    pub(super) fn trainer_lost(&mut self, now: Now) {
        if self.egress.has_consumers() {
            return self.trainer_heard(now);
        }
        let Some(job) = self.job.as_mut() else { return };
        job.paused = true;
        let running: Vec<SampleId> =
            self.engines.values().flat_map(|engine| engine.running.keys().copied()).collect();
        self.tell(Notice::TrainerLost { running: running.len() as u32 });
        for sample in running {
            self.take_off(now, sample, "the trainer is lost");
            self.requeue(now, sample);
        }
    }

    pub(super) fn close_job(
        &mut self,
        now: Now,
        session: SessionId,
        cancel_running: bool,
        reply: ReplyTo,
    ) {
        if let Some(job) = self.job.as_mut() {
            job.sessions.remove(&session);
        }
        if cancel_running {
            let open: Vec<GroupId> = self.open_groups();
            for group in open {
                self.give_up_group(now, group, "the trainer closed the job", false);
            }
        }
        self.reply(reply, Answer::Done);
    }

    fn open_groups(&self) -> Vec<GroupId> {
        self.groups.iter().filter(|(_, g)| !g.is_over()).map(|(id, _)| *id).collect()
    }

    /// The job, if this session is one of its trainer's.
    pub(super) fn job_of(&self, session: SessionId) -> Result<&Job, (FailKind, String)> {
        match &self.job {
            Some(job) if job.sessions.contains(&session) => Ok(job),
            Some(job) => Err((
                FailKind::Conflict,
                format!(
                    "session {} is over: job {} is at epoch {} now; open it again",
                    session.0, job.name, job.epoch
                ),
            )),
            None => {
                Err((FailKind::NotFound, "no job is open on this manager; open one first".into()))
            }
        }
    }

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
            return self.fail(reply, kind, why);
        }
        self.trainer_heard(now);
        let over = self.past_steps.contains(&step) || self.steps.get(&step).is_some_and(|s| s.over);
        if over && groups.iter().any(|g| !self.keys.contains_key(g.key.as_str())) {
            let why = format!(
                "step {} is over: its last batch was cut; submit under a later step",
                step.0
            );
            return self.fail(reply, FailKind::BadRequest, why);
        }
        let mut results = Vec::with_capacity(groups.len());
        let (mut accepted, mut samples) = (0, 0);
        for group in groups {
            let key = group.key.clone();
            let n = group.n;
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
            self.steps.entry(step).or_default().is_final |= is_final && complete;
        }
        if accepted > 0 {
            self.tell(Notice::StepSubmitted { step: step.0, groups: accepted, samples });
        }
        self.reply(reply, Answer::Submitted(results));
        self.placeable = true;
        self.cut_batches(now, step);
    }

    fn admit(&mut self, now: Now, step: Step, new: NewGroup) -> SubmitVerdict {
        if self.keys.contains_key(new.key.as_str()) {
            return SubmitVerdict::Duplicate;
        }
        let job = self.job.as_ref().expect("submit has checked it");
        let limit = self.config.admission_tokens;
        let verdict = match self.check_pin(&new) {
            Ok(()) => admission::check(&new, &job.model, self.admitted_tokens, limit),
            Err(reject) => Err(reject),
        };
        match verdict {
            Err(reject) => SubmitVerdict::Rejected {
                retry_after: reject.retry_after(),
                why: reject.to_string(),
            },
            Ok(tokens) => {
                self.admitted_tokens += tokens;
                self.insert_group(now, step, new);
                SubmitVerdict::Accepted
            }
        }
    }

    fn check_pin(&self, new: &NewGroup) -> Result<(), Reject> {
        match new.pin {
            Some(pin)
                if pin != self.current
                    && self.versions.get(pin.number).is_none_or(|r| r.version != pin) =>
            {
                Err(Reject::UnknownPin { pin })
            }
            _ => Ok(()),
        }
    }

    fn insert_group(&mut self, now: Now, step: Step, new: NewGroup) {
        let job_seed = self.job.as_ref().expect("submit has checked it").seed;
        let base = new.sampling.seed.unwrap_or(job_seed);
        let id = GroupId(self.fresh_id());
        let key: Arc<str> = new.key.as_str().into();
        let samples = (0..new.n).map(|i| Sample::new(seed::of_sample(base, &key, i))).collect();
        if let Some(deadline) = new.deadline {
            self.timers.set(Timer::Group(id), now + deadline);
        }
        let group = Group {
            key: key.clone(),
            step,
            prompt_tokens: (new.prompt.len() / tokens::WIDTH) as u32,
            digest: tokens::prompt_digest(&new.prompt),
            prompt: new.prompt,
            restarts: !replay::unreplayable(&new.sampling).is_empty(),
            sampling: new.sampling,
            stop_ids: None,
            pin: new.pin,
            priority: new.priority,
            meta: new.meta,
            conversation: new.session,
            samples,
            warm: None,
            released: false,
            offered_at: None,
            why_short: None,
        };
        self.pins_in_use |= group.pin.is_some();
        self.keys.insert(key, id);
        self.groups.insert(id, group);
        let state: &mut StepState = self.steps.entry(step).or_default();
        state.groups.insert(id);
        state.open_groups += 1;
        // The leader goes first; its siblings follow when its prefix is cached.
        self.enqueue(SampleId { group: id, index: 0 });
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
            return self.fail(reply, kind, why);
        }
        self.trainer_heard(now);
        let wanted: Vec<GroupId> = match what {
            CancelWhat::All => self.open_groups(),
            CancelWhat::Keys(keys) => {
                keys.iter().filter_map(|key| self.keys.get(key.as_str()).copied()).collect()
            }
            CancelWhat::Step(step) => self
                .steps
                .get(&step)
                .map(|s| s.groups.iter().copied().collect())
                .unwrap_or_default(),
        };
        let open: BTreeMap<GroupId, u32> = wanted
            .into_iter()
            .filter_map(|id| self.groups.get(&id).map(|group| (id, group.open_samples())))
            .filter(|(_, open)| *open > 0)
            .collect();
        let (groups, samples) = (open.len() as u32, open.values().sum());
        for group in open.into_keys() {
            self.give_up_group(now, group, "cancelled by the trainer", keep_partial);
        }
        self.reply(reply, Answer::Cancelled { groups, samples });
    }

    pub(super) fn group_overdue(&mut self, now: Now, group: GroupId) {
        if self.groups.get(&group).is_some_and(|group| !group.is_over()) {
            self.give_up_group(now, group, "its deadline passed", false);
        }
    }
}
