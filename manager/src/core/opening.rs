//! Opening: the trainer opens, joins and closes the job, and may be lost.

use anabranch_proto::{SampleId, SessionId};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::{Action, Answer, FailKind, Notice};
use crate::event::{OpenJob, ReplyTo};
use crate::job::Settings;
use crate::timer::Timer;

impl Core {
    pub(super) fn open_job(&mut self, now: Now, open: OpenJob, reply: ReplyTo) {
        let joins = match self.job.settings() {
            Some(job) if job.name == open.job && job.epoch == open.epoch => {
                let differ = job.differ(&open).filter(|_| !open.join && !job.provisional);
                if let Some(differ) = differ {
                    let why = format!(
                        "job {} is open at epoch {} with other settings ({differ}); open it with the same ones, with \
                         join to take them as they are, or with a higher epoch",
                        job.name, job.epoch
                    );
                    return self.out.fail(reply, FailKind::Conflict, why);
                }
                true
            }
            Some(job) if job.name == open.job && open.epoch < job.epoch => {
                let why = format!(
                    "job {} is at epoch {}, asked for epoch {}: an older trainer is fenced off",
                    job.name, job.epoch, open.epoch
                );
                return self.out.fail(reply, FailKind::Conflict, why);
            }
            // A job whose trainer was killed is lost after `on_trainer_lost`; then another may take its place.
            Some(job)
                if job.name != open.job
                    && !self.job.books().sessions().is_empty()
                    && !self.job.is_paused() =>
            {
                let why = format!(
                    "this manager runs job {}; close it first, or start another manager for {}",
                    job.name, open.job
                );
                return self.out.fail(reply, FailKind::Conflict, why);
            }
            _ => false,
        };
        let resume = open.resume;
        let name = open.job.clone();
        let epoch = open.epoch;
        if let Some(Err(why)) = resume.map(|cursor| self.rollout.check_cursor(cursor)) {
            return self.out.fail(reply, FailKind::Conflict, why);
        }
        if !joins {
            self.begin_epoch(now, open);
        } else if !open.join {
            self.settle_job(now, open);
        }
        let session = SessionId(self.out.fresh_id());
        // Another rank of a trainer that has begun already resumes with the first one.
        let begins = !joins || !self.rollout.egress().has_consumers();
        if let Some(cursor) = resume.filter(|_| begins) {
            self.rollout.rewind(cursor, &mut self.out);
        }
        let (floor, current) = (self.rollout.books().floor(), self.weights.current());
        let serve_key = self.config.serve_key("trainer", session.0);
        self.job.open_session(session);
        self.job.pause(false);
        self.trainer_heard(now);
        self.out.wake_placement();
        let resumed = joins || resume.is_some();
        self.out.tell(Notice::JobOpened { job: name, epoch, resumed });
        let Some(settings) = self.job.settings() else { return };
        let (job, logprobs_mode) = (settings.name.clone(), settings.logprobs_mode);
        self.out.reply(
            reply,
            Answer::Opened { session, floor, current, serve_key, resumed, job, logprobs_mode },
        );
    }

    /// Begins a new job, or a new epoch of this one. The same job's undelivered work goes on: its trainer was
    /// restarted and will ask for that work from its cursor; another job's work is dropped.
    fn begin_epoch(&mut self, now: Now, open: OpenJob) {
        let same_job = self.job.settings().is_some_and(|job| job.name == open.job);
        self.rollout.begin_epoch(&mut self.out);
        if !same_job {
            self.drop_everything(now);
        }
        self.weights.begin(open.epoch, &mut self.out);
        self.job.begin(now, open);
        for session in self.fleet.sessions() {
            self.join_job(now, session);
        }
    }

    /// The trainer opens a job that somebody beside it had opened, with settings of its own.
    fn settle_job(&mut self, now: Now, open: OpenJob) {
        if !self.job.settings().is_some_and(|job| job.provisional) {
            return;
        }
        self.job.settle(open);
        for session in self.fleet.sessions() {
            self.join_job(now, session);
        }
    }

    fn drop_everything(&mut self, now: Now) {
        let groups: Vec<_> = self.rollout.books().groups().map(|(id, _)| id).collect();
        for group in groups {
            self.give_up_group(now, group, "another job took over", false);
            let samples = self.rollout.samples_of(group);
            self.out.act(Action::Forget { samples });
        }
        self.rollout.clear();
    }

    pub(super) fn trainer_heard(&mut self, now: Now) {
        let Some(job) = self.job.settings() else { return };
        let at = now + job.on_trainer_lost;
        self.job.heard(now);
        self.out.timers.set(Timer::TrainerLost, at);
    }

    /// Nobody has come for the results for too long: stop burning GPUs. Everything is kept.
    pub(super) fn trainer_lost(&mut self, now: Now) {
        if self.rollout.egress().has_consumers() {
            return self.trainer_heard(now);
        }
        self.job.pause(true);
        let running: Vec<SampleId> =
            self.fleet.engines().flat_map(|engine| engine.running.keys().copied()).collect();
        self.out.tell(Notice::TrainerLost { running: running.len() as u32 });
        for sample in running {
            self.take_off(sample, "the trainer is lost");
            self.rollout.requeue(sample, &mut self.out);
        }
    }

    pub(super) fn close_job(
        &mut self,
        now: Now,
        session: SessionId,
        cancel_running: bool,
        reply: ReplyTo,
    ) {
        let speaks = self.job_of(session).is_ok();
        self.job.close_session(session);
        // An old epoch's trainer may say that it is over; the work is another's.
        if cancel_running && speaks {
            for group in self.rollout.open_groups() {
                self.give_up_group(now, group, "the trainer closed the job", false);
            }
        }
        self.out.reply(reply, Answer::Done);
    }

    /// The job, if this session is one of its trainer's.
    pub(super) fn job_of(&self, session: SessionId) -> Result<&Settings, (FailKind, String)> {
        match self.job.settings() {
            Some(job) if self.job.books().sessions().contains(&session) => Ok(job),
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
}
