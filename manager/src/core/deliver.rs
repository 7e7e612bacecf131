//! Finished samples become micro-batches, and batches go to the trainer.

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{BatchSeq, GroupId, SampleId, SessionId, Step};
use anabranch_runtime::clock::Now;

use super::Core;
use super::timer::Timer;
use crate::action::{Action, Batch, BatchSample, Finish, Notice, ShortGroup, StepReport};
use crate::event::{ConsumerId, Pack, Shard};
use crate::rollout::egress::Send;
use crate::rollout::microbatch::Cut;
use crate::rollout::sample::SampleState;

impl Core {
    pub(super) fn attach_consumer(
        &mut self,
        now: Now,
        session: SessionId,
        consumer: ConsumerId,
        pack: Pack,
        shard: Shard,
    ) {
        if let Err((_, why)) = self.job_of(session) {
            return self.act(Action::CloseConsumer { consumer, why });
        }
        match self.egress.attach(session, consumer, shard) {
            Err(why) => return self.act(Action::CloseConsumer { consumer, why }),
            Ok(Some(old)) => {
                let why = format!("this trainer consumes shard {} on a newer stream", shard.index);
                self.act(Action::CloseConsumer { consumer: old, why });
            }
            Ok(None) => {}
        }
        self.trainer_heard(now);
        if let Some(job) = self.job.as_mut() {
            job.paused = false;
        }
        self.placeable = true;
        self.repack(pack);
        let steps: Vec<Step> = self.steps.keys().copied().collect();
        for step in steps {
            self.cut_batches(now, step);
        }
    }

    /// Pools were filled under another packing rule: sort their samples again.
    fn repack(&mut self, pack: Pack) {
        let changed = self.pack.is_none_or(|old| old.whole_groups != pack.whole_groups);
        self.pack = Some(pack);
        if !changed {
            return;
        }
        for state in self.steps.values_mut() {
            for group in state.groups.clone() {
                let samples = state.pool.drop_group(group);
                for sample in samples {
                    state.pool.add(sample, Some(pack));
                }
                if self.groups.get(&group).is_some_and(|group| group.is_over()) {
                    state.pool.complete(group);
                }
            }
        }
    }

    pub(super) fn lose_consumer(&mut self, now: Now, consumer: ConsumerId) {
        if self.egress.detach(consumer) {
            self.trainer_heard(now);
        }
    }

    /// A finished sample is ready for a batch. Its group counts as offered from here on.
    pub(super) fn pool_sample(&mut self, now: Now, id: SampleId) {
        let current = self.current;
        let Some(group) = self.groups.get_mut(&id.group) else { return };
        group.offered_at.get_or_insert(current);
        let step = group.step;
        let pack = self.pack;
        let state = self.steps.entry(step).or_default();
        state.pool.add(id, pack);
        if let Some(wait) = pack.and_then(|pack| pack.max_wait)
            && self.timers.get(Timer::Flush(step)).is_none()
        {
            self.timers.set(Timer::Flush(step), now + wait);
        }
        self.cut_batches(now, step);
    }

    pub(super) fn cut_batches(&mut self, now: Now, step: Step) {
        let Some(pack) = self.pack else { return };
        while let Some(state) = self.steps.get_mut(&step).filter(|state| !state.over) {
            let last = state.is_final && state.open_groups == 0;
            let cut = if last { Cut::Last } else { Cut::Full };
            let Some(samples) = state.pool.cut(pack, cut) else { return };
            self.offer(now, step, samples, last);
        }
    }

    /// What is there goes out although it is less than `min`.
    pub(super) fn flush(&mut self, now: Now, step: Step) {
        let Some(pack) = self.pack else { return };
        let Some(state) = self.steps.get_mut(&step).filter(|state| !state.over) else { return };
        let samples = state.pool.cut(pack, Cut::Flush);
        if state.pool.has_ready()
            && let Some(wait) = pack.max_wait
        {
            self.timers.set(Timer::Flush(step), now + wait.max(Duration::from_millis(1)));
        }
        if let Some(samples) = samples {
            self.offer(now, step, samples, false);
        }
    }

    fn offer(&mut self, now: Now, step: Step, samples: Vec<SampleId>, last: bool) {
        let seq = self.egress.next_seq();
        let samples: Vec<BatchSample> =
            samples.into_iter().filter_map(|id| self.batch_sample(id, seq)).collect();
        let tokens: u64 = samples.iter().map(|sample| u64::from(sample.tokens)).sum();
        let count = samples.len() as u32;
        let state = self.steps.get_mut(&step).expect("cut from its pool");
        state.delivered += u64::from(count);
        state.tokens += tokens;
        self.counters.delivered += u64::from(count);
        self.counters.delivered_tokens += tokens;
        self.tell(Notice::BatchOffered { seq, step: step.0, samples: count, tokens, last });
        let done = last.then(|| self.end_step(step, seq));
        self.egress.push(Arc::new(Batch { seq, step, last_of_step: last, samples }), done);
        if !last {
            self.rearm_flush(now, step);
        }
    }

    fn rearm_flush(&mut self, now: Now, step: Step) {
        let waits = self.steps.get(&step).is_some_and(|state| state.pool.has_ready());
        match self.pack.and_then(|pack| pack.max_wait) {
            Some(wait) if waits => self.timers.set(Timer::Flush(step), now + wait),
            _ => {
                self.timers.clear(Timer::Flush(step));
            }
        }
    }

    fn batch_sample(&mut self, id: SampleId, seq: BatchSeq) -> Option<BatchSample> {
        let current = self.current;
        let group = self.groups.get_mut(&id.group)?;
        let offered_at = *group.offered_at.get_or_insert(current);
        let (key, meta, step) = (group.key.clone(), group.meta.clone(), group.step);
        let sample = &mut group.samples[id.index as usize];
        let SampleState::Finished { how } = &sample.state else { return None };
        let finish: Finish = how.clone();
        sample.state = SampleState::Delivered { seq };
        let lag =
            if sample.kept == 0 { 0 } else { offered_at.number.saturating_sub(sample.oldest) };
        let sample = BatchSample {
            sample: id,
            key,
            meta,
            seed: sample.seed,
            attempts: sample.attempts,
            finish,
            offered_at,
            discarded_tokens: sample.discarded,
            tokens: sample.kept,
        };
        let state = self.steps.get_mut(&step).expect("its group is in it");
        state.max_lag = state.max_lag.max(lag);
        Some(sample)
    }

    fn end_step(&mut self, step: Step, seq: BatchSeq) -> Arc<StepReport> {
        self.timers.clear(Timer::Flush(step));
        let state = self.steps.get_mut(&step).expect("offer has looked it up");
        state.over = true;
        let report = StepReport {
            step: step.0,
            seq,
            delivered: state.delivered,
            tokens: state.tokens,
            discarded_tokens: state.discarded_tokens,
            max_lag: state.max_lag,
            short: state.short.clone(),
            dropped: state.dropped.clone(),
        };
        self.tell(Notice::StepDone {
            step: step.0,
            delivered: report.delivered,
            tokens: report.tokens,
            short: report.short.len() as u32,
            dropped: report.dropped.len() as u32,
            discarded_tokens: report.discarded_tokens,
            max_lag: report.max_lag,
        });
        Arc::new(report)
    }

    /// The whole group goes: running samples, and finished ones that are in no batch yet.
    pub(super) fn drop_group(&mut self, now: Now, id: GroupId, why: &str) {
        let Some(group) = self.groups.get(&id) else { return };
        let step = group.step;
        let lengths = group.lengths();
        let (key, n) = (group.key.clone(), group.n());
        let already_over = group.is_over();
        let Some(state) = self.steps.get_mut(&step) else { return };
        let pooled = state.pool.drop_group(id);
        for sample in &pooled {
            if let Some(record) = self.sample_mut(*sample) {
                record.state = SampleState::Abandoned { why: why.to_owned() };
            }
        }
        self.counters.dropped += pooled.len() as u64;
        self.act(Action::Forget { samples: pooled });
        if already_over {
            let delivered = self.groups[&id].delivered();
            let report = ShortGroup { key, delivered, n, why: why.to_owned(), lengths };
            if let Some(state) = self.steps.get_mut(&step) {
                state.dropped.push(report);
            }
        } else {
            self.give_up_group(now, id, why, false);
        }
    }

    pub(super) fn ack(&mut self, now: Now, consumer: ConsumerId, seq: BatchSeq) {
        self.trainer_heard(now);
        if self.egress.ack(consumer, seq) {
            let seq = self.egress.acked();
            self.tell(Notice::BatchAcked { seq });
        }
    }

    pub(super) fn commit(&mut self, now: Now, consumer: ConsumerId, seq: BatchSeq) {
        self.trainer_heard(now);
        let forgotten = self.egress.commit(consumer, seq);
        self.forget_batches(&forgotten);
    }

    /// Committed: nobody will ask for these again.
    pub(super) fn forget_batches(&mut self, batches: &[Arc<Batch>]) {
        for batch in batches {
            let samples: Vec<SampleId> = batch.samples.iter().map(|s| s.sample).collect();
            self.counters.committed += samples.len() as u64;
            let groups: std::collections::BTreeSet<GroupId> =
                samples.iter().map(|s| s.group).collect();
            self.act(Action::Forget { samples });
            let floor = batch.seq;
            for group in groups {
                self.forget_group_if_committed(group, floor);
            }
            if batch.last_of_step {
                self.forget_step(batch.step);
            }
        }
    }

    fn forget_group_if_committed(&mut self, id: GroupId, floor: BatchSeq) {
        let Some(group) = self.groups.get(&id) else { return };
        let committed = group.samples.iter().all(|sample| match &sample.state {
            SampleState::Delivered { seq } => *seq <= floor,
            SampleState::Abandoned { .. } => true,
            _ => false,
        });
        if committed {
            self.admitted_tokens -= group.budget();
            self.groups.remove(&id);
        }
    }

    fn forget_step(&mut self, step: Step) {
        let Some(state) = self.steps.remove(&step) else { return };
        self.past_steps.insert(step);
        for group in state.groups {
            // Groups of which nothing was delivered are in no batch.
            if let Some(record) = self.groups.remove(&group) {
                self.admitted_tokens -= record.budget();
            }
        }
    }

    pub(super) fn send_batches(&mut self) {
        for send in self.egress.sendable() {
            match send {
                Send::Batch { consumer, batch, samples } => {
                    self.act(Action::Deliver { consumer, batch, samples });
                }
                Send::Done { consumer, report } => self.act(Action::StepDone { consumer, report }),
            }
        }
    }
}
