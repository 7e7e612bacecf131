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

    /// Checks the cursor of a trainer that restarted from a checkpoint. A cursor beyond the last batch counts batches of
    /// another life of the manager: no batch of this life may be taken for one of them.
    pub fn check_cursor(&self, cursor: BatchSeq) -> Result<(), String> {
        let (last, retained) = (self.books.last(), self.books.retained());
        if cursor <= last || retained == 0 {
            return Ok(());
        }
        Err(format!(
            "the checkpoint has batches up to {}, this manager has made {} and keeps {retained} of them uncommitted: \
             the checkpoint is from another manager or an earlier life of this one; resume from a checkpoint that \
             was made with this manager, or open the job without resume",
            cursor.0, last.0
        ))
    }

    /// A trainer restarted from a checkpoint that holds everything up to `cursor`: the rest is offered again. Batches
    /// that are cut from now on are numbered behind the cursor.
    pub fn rewind(&mut self, cursor: BatchSeq, out: &mut Outbox) {
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
