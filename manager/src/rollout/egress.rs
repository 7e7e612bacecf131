//! Delivery: batches in order to every shard of the trainer, as far as its credit goes. A batch is kept
//! until all shards committed it; what was not acknowledged is offered again after a reconnect.
//!
//! Credit = may send. Ack = received. Commit = in a checkpoint, may be forgotten.

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::{BatchSeq, SessionId};

use crate::action::{Batch, StepReport};
use crate::event::{ConsumerId, Shard};

/// Bytes of one token on its way: id and log-probability.
const TOKEN_BYTES: u64 = 8;
/// Of one trajectory beside its tokens, about.
const TRAJECTORY_BYTES: u64 = 256;

#[derive(Default)]
pub(crate) struct Egress {
    items: BTreeMap<BatchSeq, Item>,
    consumers: BTreeMap<ConsumerId, Consumer>,
    /// By shard index: they survive a consumer's reconnect.
    shards: BTreeMap<u32, Marks>,
    last: BatchSeq,
    floor: BatchSeq,
}

struct Item {
    batch: Arc<Batch>,
    done: Option<Arc<StepReport>>,
}

struct Consumer {
    session: SessionId,
    shard: Shard,
    next: BatchSeq,
    /// May go below zero by one batch: it is sent whole.
    bytes: i64,
    samples: i64,
}

#[derive(Clone, Copy, Default)]
struct Marks {
    acked: BatchSeq,
    committed: BatchSeq,
}

/// What to send to whom, in order.
pub(crate) enum Send {
    Batch { consumer: ConsumerId, batch: Arc<Batch>, samples: Vec<usize> },
    Done { consumer: ConsumerId, report: Arc<StepReport> },
}

impl Egress {
    pub fn next_seq(&mut self) -> BatchSeq {
        self.last = BatchSeq(self.last.0 + 1);
        self.last
    }

    pub fn push(&mut self, batch: Arc<Batch>, done: Option<Arc<StepReport>>) {
        self.items.insert(batch.seq, Item { batch, done });
    }

    /// Gives the consumer that this one replaces: the same trainer's, whose stream broke.
    pub fn attach(
        &mut self,
        session: SessionId,
        consumer: ConsumerId,
        shard: Shard,
    ) -> Result<Option<ConsumerId>, String> {
        let holder = self.consumers.iter().find(|(_, c)| c.shard.index == shard.index);
        let old = holder.map(|(id, c)| (*id, c.session));
        if let Some((_, other)) = old.filter(|(_, other)| *other != session) {
            return Err(format!(
                "trainer session {} consumes shard {} already; one loop per shard (a dead one is noticed in seconds)",
                other.0, shard.index
            ));
        }
        let old = old.map(|(id, _)| id);
        if let Some(old) = old {
            self.consumers.remove(&old);
        }
        if let Some(other) = self.consumers.values().find(|c| c.shard.count != shard.count) {
            return Err(format!(
                "this consumer says the trainer has {} shards, an attached one says {}",
                shard.count, other.shard.count
            ));
        }
        let acked = self.shards.entry(shard.index).or_default().acked;
        let next = BatchSeq(acked.max(self.floor).0 + 1);
        self.consumers.insert(consumer, Consumer { session, shard, next, bytes: 0, samples: 0 });
        Ok(old)
    }

    /// Another consumer took this shard over, or its stream broke.
    pub fn detach(&mut self, consumer: ConsumerId) -> bool {
        self.consumers.remove(&consumer).is_some()
    }

    pub fn has_consumers(&self) -> bool {
        !self.consumers.is_empty()
    }

    pub fn credit(&mut self, consumer: ConsumerId, bytes: u64, samples: u64) {
        if let Some(consumer) = self.consumers.get_mut(&consumer) {
            consumer.bytes = consumer.bytes.saturating_add(bytes.try_into().unwrap_or(i64::MAX));
            consumer.samples =
                consumer.samples.saturating_add(samples.try_into().unwrap_or(i64::MAX));
        }
    }

    /// True where this moved the mark of the slowest shard.
    pub fn ack(&mut self, consumer: ConsumerId, seq: BatchSeq) -> bool {
        let before = self.acked();
        let last = self.last;
        if let Some(marks) = self.marks(consumer) {
            marks.acked = marks.acked.max(seq.min(last));
        }
        self.acked() > before
    }

    /// The batches that no shard needs any more.
    pub fn commit(&mut self, consumer: ConsumerId, seq: BatchSeq) -> Vec<Arc<Batch>> {
        let last = self.last;
        if let Some(marks) = self.marks(consumer) {
            marks.committed = marks.committed.max(seq.min(last));
            marks.acked = marks.acked.max(marks.committed);
        }
        let floor = self.shards.values().map(|marks| marks.committed).min().unwrap_or(self.floor);
        self.raise_floor(floor)
    }

    /// A trainer restarted from a checkpoint that holds everything up to `cursor`: offer the rest again.
    pub fn rewind(&mut self, cursor: BatchSeq) -> Vec<Arc<Batch>> {
        let cursor = cursor.min(self.last);
        for marks in self.shards.values_mut() {
            *marks = Marks { acked: cursor, committed: cursor.max(self.floor) };
        }
        self.raise_floor(cursor)
    }

    /// What may go out now.
    pub fn sendable(&mut self) -> Vec<Send> {
        let mut sends = Vec::new();
        for (&id, consumer) in &mut self.consumers {
            while let Some(item) = self.items.get(&consumer.next) {
                let of_shard: Vec<usize> = (0..item.batch.samples.len())
                    .filter(|index| (*index as u32) % consumer.shard.count == consumer.shard.index)
                    .collect();
                // An empty batch (an explicit last one) needs no credit.
                if !of_shard.is_empty() && (consumer.bytes <= 0 || consumer.samples <= 0) {
                    break;
                }
                let size = |index: &usize| {
                    u64::from(item.batch.samples[*index].tokens) * TOKEN_BYTES + TRAJECTORY_BYTES
                };
                let bytes: u64 = of_shard.iter().map(size).sum();
                consumer.bytes -= bytes as i64;
                consumer.samples -= of_shard.len() as i64;
                consumer.next = BatchSeq(consumer.next.0 + 1);
                sends.push(Send::Batch {
                    consumer: id,
                    batch: item.batch.clone(),
                    samples: of_shard,
                });
                sends.extend(item.done.clone().map(|report| Send::Done { consumer: id, report }));
            }
        }
        sends
    }

    pub fn floor(&self) -> BatchSeq {
        self.floor
    }

    pub fn last(&self) -> BatchSeq {
        self.last
    }

    /// What every shard has.
    pub fn acked(&self) -> BatchSeq {
        self.shards.values().map(|marks| marks.acked).min().unwrap_or_default()
    }

    pub fn retained(&self) -> usize {
        self.items.len()
    }

    fn marks(&mut self, consumer: ConsumerId) -> Option<&mut Marks> {
        let index = self.consumers.get(&consumer)?.shard.index;
        self.shards.get_mut(&index)
    }

    fn raise_floor(&mut self, floor: BatchSeq) -> Vec<Arc<Batch>> {
        self.floor = self.floor.max(floor);
        let keep = self.items.split_off(&BatchSeq(self.floor.0 + 1));
        std::mem::replace(&mut self.items, keep).into_values().map(|item| item.batch).collect()
    }
}
