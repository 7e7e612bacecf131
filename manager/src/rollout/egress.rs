//! Egress: the consumers of a work stream, and what each may be sent now. Volatile: batches' contents are kept
//! beside the books until they are committed, and a consumer starts behind what its shard has received.
//!
//! Credit = may send. Ack = received. Commit = in a checkpoint, may be forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anabranch_proto::{BatchSeq, SessionId};

use crate::action::{Batch, StepReport};
use crate::event::{ConsumerId, Shard};

/// Bytes of one token on its way: id and log-probability.
const TOKEN_BYTES: u64 = 8;
/// Bytes of one trajectory beside its tokens, about.
const TRAJECTORY_BYTES: u64 = 256;

#[derive(Default)]
pub(crate) struct Egress {
    items: BTreeMap<BatchSeq, Item>,
    consumers: BTreeMap<ConsumerId, Consumer>,
    /// Consumers for which something has changed since the last look.
    touched: BTreeSet<ConsumerId>,
}

struct Item {
    batch: Arc<Batch>,
    /// The step's report, behind the step's last batch.
    done: Option<Arc<StepReport>>,
}

struct Consumer {
    session: SessionId,
    shard: Shard,
    next: BatchSeq,
    /// Credit left; may go below zero by one batch, which is sent whole.
    bytes: i64,
    samples: i64,
}

/// One thing to send to one consumer.
pub(crate) enum Send {
    Batch { consumer: ConsumerId, batch: Arc<Batch>, samples: Vec<usize> },
    Done { consumer: ConsumerId, report: Arc<StepReport> },
}

impl Egress {
    pub fn push(&mut self, batch: Arc<Batch>, done: Option<Arc<StepReport>>) {
        self.items.insert(batch.seq, Item { batch, done });
        self.touched.extend(self.consumers.keys());
    }

    /// Checks a new consumer against the attached ones. Gives the consumer that the new one replaces: the same
    /// trainer's, whose stream broke.
    pub fn welcome(
        &mut self,
        session: SessionId,
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
            self.detach(old);
        }
        if let Some(other) = self.consumers.values().find(|c| c.shard.count != shard.count) {
            return Err(format!(
                "this consumer says the trainer has {} shards, an attached one says {}",
                shard.count, other.shard.count
            ));
        }
        Ok(old)
    }

    pub fn attach(
        &mut self,
        session: SessionId,
        consumer: ConsumerId,
        shard: Shard,
        next: BatchSeq,
    ) {
        self.consumers.insert(consumer, Consumer { session, shard, next, bytes: 0, samples: 0 });
        self.touched.insert(consumer);
    }

    /// The consumer's stream broke, or another one took its shard over.
    pub fn detach(&mut self, consumer: ConsumerId) -> bool {
        self.touched.remove(&consumer);
        self.consumers.remove(&consumer).is_some()
    }

    /// Every consumer is of an epoch that is over. Gives their ids.
    pub fn detach_all(&mut self) -> Vec<ConsumerId> {
        self.touched.clear();
        std::mem::take(&mut self.consumers).into_keys().collect()
    }

    pub fn has(&self, consumer: ConsumerId) -> bool {
        self.consumers.contains_key(&consumer)
    }

    pub fn has_consumers(&self) -> bool {
        !self.consumers.is_empty()
    }

    pub fn credit(&mut self, id: ConsumerId, bytes: u64, samples: u64) {
        if let Some(consumer) = self.consumers.get_mut(&id) {
            consumer.bytes = consumer.bytes.saturating_add_unsigned(bytes);
            consumer.samples = consumer.samples.saturating_add_unsigned(samples);
            self.touched.insert(id);
        }
    }

    pub fn shard_of(&self, consumer: ConsumerId) -> Option<u32> {
        self.consumers.get(&consumer).map(|consumer| consumer.shard.index)
    }

    pub fn forget(&mut self, seq: BatchSeq) {
        self.items.remove(&seq);
    }

    /// What may go out now, consumer by consumer.
    pub fn sendable(&mut self) -> Vec<Send> {
        let mut sends = Vec::new();
        for id in std::mem::take(&mut self.touched) {
            let Some(consumer) = self.consumers.get_mut(&id) else { continue };
            while let Some(item) = self.items.get(&consumer.next) {
                let (of, Shard { index, count }) = (item.batch.samples.len(), consumer.shard);
                // An empty batch (an explicit last one) needs no credit.
                let is_empty = of <= index as usize;
                if !is_empty && (consumer.bytes <= 0 || consumer.samples <= 0) {
                    break;
                }
                let of_shard: Vec<usize> =
                    (index as usize..of).step_by(count.max(1) as usize).collect();
                let size = |index: &usize| {
                    u64::from(item.batch.samples[*index].tokens) * TOKEN_BYTES + TRAJECTORY_BYTES
                };
                let bytes: u64 = of_shard.iter().map(size).sum();
                consumer.bytes = consumer.bytes.saturating_sub_unsigned(bytes);
                consumer.samples -= of_shard.len() as i64;
                consumer.next = BatchSeq(consumer.next.0 + 1);
                let batch = item.batch.clone();
                sends.push(Send::Batch { consumer: id, batch, samples: of_shard });
                sends.extend(item.done.clone().map(|report| Send::Done { consumer: id, report }));
            }
        }
        sends
    }
}
