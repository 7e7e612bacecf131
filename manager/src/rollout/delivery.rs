//! Delivery: finished samples become micro-batches, and batches go to the consumers.

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{BatchSeq, SampleId, SessionId, Step};

use super::change::{BatchBook, Change};
use super::egress::Send;
use super::microbatch::Cut;
use super::sample::SampleState;
use super::{Moment, Rollout};
use crate::action::{Action, Batch, BatchSample, Notice, StepReport};
use crate::event::{ConsumerId, Pack, Shard};
use crate::outbox::Outbox;
use crate::timer::Timer;

impl Rollout {
    /// Attaches a consumer of one shard. `Err` says why not; the consumer that this one replaces is closed.
    pub fn attach_consumer(
        &mut self,
        session: SessionId,
        consumer: ConsumerId,
        shard: Shard,
        out: &mut Outbox,
    ) -> Result<(), String> {
        if let Some(old) = self.egress.welcome(session, shard)? {
            let why = format!("this trainer consumes shard {} on a newer stream", shard.index);
            out.act(Action::CloseConsumer { consumer: old, why });
        }
        if self.books.shard_count() != shard.count {
            self.commit_change(Change::Sharded { count: shard.count });
        }
        let acked = self.books.marks(shard.index).acked;
        let next = BatchSeq(acked.max(self.books.floor()).0 + 1);
        self.egress.attach(session, consumer, shard, next);
        Ok(())
    }

    pub fn detach_consumer(&mut self, consumer: ConsumerId) -> bool {
        self.egress.detach(consumer)
    }

    pub fn credit(&mut self, consumer: ConsumerId, bytes: u64, samples: u64) {
        self.egress.credit(consumer, bytes, samples);
    }

    /// The trainer packs by `pack` from now on. Pools that were filled under another rule are sorted again.
    pub fn repack(&mut self, at: Moment, pack: Pack, out: &mut Outbox) {
        let changed = self.pack.is_none_or(|old| old.whole_groups != pack.whole_groups);
        self.pack = Some(pack);
        if changed {
            self.sort_pools(pack);
        }
        let steps: Vec<Step> = self.books.steps().map(|(step, _)| step).collect();
        for step in steps {
            self.cut_batches(at, step, out);
        }
    }

    fn sort_pools(&mut self, pack: Pack) {
        for (_, book) in self.books.steps() {
            for &group in &book.groups {
                let Some(step) = self.books.group(group).map(|group| group.spec.step) else {
                    continue;
                };
                let pool = self.pools.entry(step).or_default();
                for sample in pool.drop_group(group) {
                    pool.add(sample, Some(pack));
                }
                if self.books.group(group).is_some_and(|group| group.is_over()) {
                    pool.complete(group);
                }
            }
        }
    }

    /// A finished sample is ready for a batch. Its group counts as offered from here on.
    pub(super) fn pool_sample(&mut self, at: Moment, id: SampleId, out: &mut Outbox) {
        let Some(group) = self.books.group(id.group) else { return };
        let step = group.spec.step;
        if group.offered_at().is_none() {
            self.offer_group(at, id);
        }
        self.pools.entry(step).or_default().add(id, self.pack);
        if let Some(wait) = self.pack.and_then(|pack| pack.max_wait) {
            out.set_if_unset(Timer::Flush(step), at.now + wait);
        }
        self.cut_batches(at, step, out);
    }

    /// Offers a group: a new version does not make it too old from here on.
    fn offer_group(&mut self, at: Moment, id: SampleId) {
        let Some(group) = self.books.group(id.group).filter(|group| group.ages()) else {
            return self.commit_change(Change::Offered { group: id.group, at: at.current });
        };
        let running: Vec<SessionId> =
            group.samples().iter().filter_map(|s| s.running_on()).map(|(at, _)| at).collect();
        running.into_iter().for_each(|session| self.exposure.count(session, false));
        self.commit_change(Change::Offered { group: id.group, at: at.current });
        self.ages_changed(id.group);
    }

    pub fn cut_batches(&mut self, at: Moment, step: Step, out: &mut Outbox) {
        let Some(pack) = self.pack else { return };
        while let Some(book) = self.books.step(step).filter(|book| !book.over) {
            let last = book.is_final && book.open_groups == 0;
            let cut = if last { Cut::Last } else { Cut::Full };
            let pool = self.pools.entry(step).or_default();
            let Some(samples) = pool.cut(pack, cut) else { return };
            self.cut_batch(at, step, &samples, last, out);
        }
    }

    /// Cuts a batch of what is there although that is less than `min`.
    pub fn flush(&mut self, at: Moment, step: Step, out: &mut Outbox) {
        let Some(pack) = self.pack else { return };
        if self.books.step(step).is_none_or(|book| book.over) {
            return;
        }
        let Some(pool) = self.pools.get_mut(&step) else { return };
        let samples = pool.cut(pack, Cut::Flush);
        if pool.has_ready()
            && let Some(wait) = pack.max_wait
        {
            out.timers.set(Timer::Flush(step), at.now + wait.max(Duration::from_millis(1)));
        }
        if let Some(samples) = samples {
            self.cut_batch(at, step, &samples, false, out);
        }
    }

    /// A version waits for groups to be offered: every step gives what it has.
    pub fn flush_all(&mut self, at: Moment, out: &mut Outbox) {
        let fresh = |(step, pool): (&Step, &mut super::Pool)| pool.take_news().then_some(*step);
        let steps: Vec<Step> = self.pools.iter_mut().filter_map(fresh).collect();
        steps.into_iter().for_each(|step| self.flush(at, step, out));
    }

    fn cut_batch(
        &mut self,
        at: Moment,
        step: Step,
        members: &[SampleId],
        last: bool,
        out: &mut Outbox,
    ) {
        let seq = BatchSeq(self.books.last().0 + 1);
        let mut samples = Vec::with_capacity(members.len());
        let mut max_lag = 0;
        for &id in members {
            let Some((sample, lag)) = self.batch_sample(at, id) else { continue };
            max_lag = max_lag.max(lag);
            samples.push(sample);
        }
        let tokens = samples.iter().map(|sample| u64::from(sample.tokens)).sum();
        let count = samples.len() as u32;
        let ids = samples.iter().map(|sample| sample.sample).collect();
        let book = BatchBook { step, last_of_step: last, samples: ids, tokens, max_lag };
        self.commit_change(Change::BatchCut { seq, batch: book });
        out.counters.delivered += u64::from(count);
        out.counters.delivered_tokens += tokens;
        out.tell(Notice::BatchOffered { seq, step: step.0, samples: count, tokens, last });
        let done = last.then(|| self.end_step(step, seq, out));
        self.egress.push(Arc::new(Batch { seq, step, last_of_step: last, samples }), done);
        if !last {
            self.rearm_flush(at, step, out);
        }
    }

    fn rearm_flush(&mut self, at: Moment, step: Step, out: &mut Outbox) {
        let waits = self.pools.get(&step).is_some_and(|pool| pool.has_ready());
        match self.pack.and_then(|pack| pack.max_wait) {
            Some(wait) if waits => out.timers.set(Timer::Flush(step), at.now + wait),
            _ => {
                out.timers.clear(Timer::Flush(step));
            }
        }
    }

    /// A finished sample as a batch carries it, and the lag of its oldest token in versions.
    fn batch_sample(&self, at: Moment, id: SampleId) -> Option<(BatchSample, u64)> {
        let group = self.books.group(id.group)?;
        let sample = group.samples().get(id.index as usize)?;
        let SampleState::Finished { how } = sample.state() else { return None };
        let offered_at = group.offered_at().unwrap_or(at.current);
        let lag = match sample.live.kept {
            0 => 0,
            _ => offered_at.number.saturating_sub(sample.live.oldest),
        };
        let sample = BatchSample {
            sample: id,
            key: group.spec.key.clone(),
            meta: group.spec.meta.clone(),
            seed: sample.seed(),
            attempts: sample.attempts(),
            finish: how.clone(),
            offered_at,
            discarded_tokens: sample.discarded,
            tokens: sample.live.kept,
        };
        Some((sample, lag))
    }

    fn end_step(&mut self, step: Step, seq: BatchSeq, out: &mut Outbox) -> Arc<StepReport> {
        out.timers.clear(Timer::Flush(step));
        self.commit_change(Change::StepOver { step });
        let book = self.books.step(step).cloned().unwrap_or_default();
        out.tell(Notice::StepDone {
            step: step.0,
            delivered: book.delivered,
            tokens: book.tokens,
            short: book.short.len() as u32,
            dropped: book.dropped.len() as u32,
            discarded_tokens: book.discarded_tokens,
            max_lag: book.max_lag,
        });
        Arc::new(StepReport {
            step: step.0,
            seq,
            delivered: book.delivered,
            tokens: book.tokens,
            discarded_tokens: book.discarded_tokens,
            max_lag: book.max_lag,
            short: book.short,
            dropped: book.dropped,
        })
    }

    /// Sends what consumers have credit for.
    pub fn send_batches(&mut self, out: &mut Outbox) {
        for send in self.egress.sendable() {
            out.act(match send {
                Send::Batch { consumer, batch, samples } => {
                    Action::Deliver { consumer, batch, samples }
                }
                Send::Done { consumer, report } => Action::StepDone { consumer, report },
            });
        }
    }
}
