//! Acknowledgements and commits of the trainer: what was received, and what may be forgotten.

use anabranch_proto::BatchSeq;

use super::Rollout;
use super::change::Change;
use crate::action::{Action, Notice};
use crate::event::ConsumerId;
use crate::outbox::Outbox;

impl Rollout {
    /// The consumer's shard has received everything up to `seq`.
    pub fn ack(&mut self, consumer: ConsumerId, seq: BatchSeq, out: &mut Outbox) {
        let Some(shard) = self.egress.shard_of(consumer) else { return };
        let before = self.books.acked();
        let seq = seq.min(self.books.last());
        if seq > self.books.marks(shard).acked {
            self.commit_change(Change::Acked { shard, seq });
        }
        let acked = self.books.acked();
        if acked > before {
            out.tell(Notice::BatchAcked { seq: acked });
        }
    }

    /// The consumer's shard has everything up to `seq` in a checkpoint. What every shard has is forgotten.
    pub fn commit(&mut self, consumer: ConsumerId, seq: BatchSeq, out: &mut Outbox) {
        if let Some(shard) = self.egress.shard_of(consumer) {
            let seq = seq.min(self.books.last());
            if seq > self.books.marks(shard).committed {
                self.commit_change(Change::Committed { shard, seq });
            }
        }
        self.forget_up_to(self.books.committed(), out);
    }

    /// A trainer restarted from a checkpoint that holds everything up to `cursor`: the rest is offered again.
    pub fn rewind(&mut self, cursor: BatchSeq, out: &mut Outbox) {
        let cursor = cursor.min(self.books.last());
        self.commit_change(Change::Rewound { cursor });
        self.forget_up_to(cursor, out);
    }

    fn forget_up_to(&mut self, floor: BatchSeq, out: &mut Outbox) {
        for seq in self.books.batches_up_to(floor) {
            let Some(batch) = self.books.batch(seq) else { continue };
            let (samples, step) = (batch.samples.clone(), batch.last_of_step.then_some(batch.step));
            out.counters.committed += samples.len() as u64;
            out.act(Action::Forget { samples });
            self.commit_change(Change::BatchForgotten { seq });
            self.egress.forget(seq);
            if let Some(step) = step {
                self.pools.remove(&step);
            }
        }
        if floor > self.books.floor() {
            self.commit_change(Change::FloorRaised { floor });
        }
    }
}
