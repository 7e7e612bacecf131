//! Delivering: consumers attach, acknowledge and commit.

use anabranch_proto::{BatchSeq, SessionId};
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::Action;
use crate::event::{ConsumerId, Pack, Shard};

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
            return self.out.act(Action::CloseConsumer { consumer, why });
        }
        if let Err(why) = self.rollout.attach_consumer(session, consumer, shard, &mut self.out) {
            return self.out.act(Action::CloseConsumer { consumer, why });
        }
        self.trainer_heard(now);
        self.job.pause(false);
        self.out.wake_placement();
        self.rollout.repack(self.at(now), pack, &mut self.out);
    }

    pub(super) fn lose_consumer(&mut self, now: Now, consumer: ConsumerId) {
        if self.rollout.detach_consumer(consumer) {
            self.trainer_heard(now);
        }
    }

    pub(super) fn ack(&mut self, now: Now, consumer: ConsumerId, seq: BatchSeq) {
        if !self.rollout.egress().has(consumer) {
            return;
        }
        self.trainer_heard(now);
        self.rollout.ack(consumer, seq, &mut self.out);
    }

    pub(super) fn commit(&mut self, now: Now, consumer: ConsumerId, seq: BatchSeq) {
        if !self.rollout.egress().has(consumer) {
            return;
        }
        self.trainer_heard(now);
        self.rollout.commit(consumer, seq, &mut self.out);
    }
}
