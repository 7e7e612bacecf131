//! Consumers of finished batches. A batch is queued as names; its consumer's own task turns it into parts
//! ([`crate::wire::deliver`]) as fast as the trainer takes them, so tokens are copied out of the ledger only then.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anabranch_proto::SampleId;
use tokio::sync::mpsc;

use super::Overflow;
use crate::action::{Batch, StepReport};
use crate::event::ConsumerId;
use crate::ledger::Fact;

/// Batches that wait to be sent: names only. The core's credit and admission bound what stands behind them.
pub(crate) const WAITING_BATCHES: usize = 8_192;

pub(crate) enum ToConsumer {
    Batch(OutgoingBatch),
    StepDone(Arc<StepReport>),
    Close(String),
}

pub(crate) struct OutgoingBatch {
    pub batch: Arc<Batch>,
    /// Indices into the batch: this consumer's shard.
    pub samples: Vec<usize>,
    /// When the last of them finished.
    pub finished: Option<Instant>,
}

#[derive(Default)]
pub(crate) struct Consumers {
    open: BTreeMap<ConsumerId, mpsc::Sender<ToConsumer>>,
    /// Finish times of samples that are not forgotten yet, for the delivery delay.
    finished: BTreeMap<SampleId, Instant>,
}

impl Consumers {
    pub fn open(&mut self, id: ConsumerId, out: mpsc::Sender<ToConsumer>) {
        self.open.insert(id, out);
    }

    /// Notes when samples finished.
    pub fn note(&mut self, facts: &[Fact]) {
        for fact in facts {
            if let Fact::Finished { sample, .. } = fact {
                self.finished.insert(*sample, Instant::now());
            }
        }
    }

    pub fn forget(&mut self, samples: &[SampleId]) {
        for sample in samples {
            self.finished.remove(sample);
        }
    }

    pub fn outgoing(&self, batch: Arc<Batch>, samples: Vec<usize>) -> ToConsumer {
        let times =
            samples.iter().filter_map(|at| self.finished.get(&batch.samples.get(*at)?.sample));
        let finished = times.max().copied();
        ToConsumer::Batch(OutgoingBatch { batch, samples, finished })
    }

    pub fn send(&mut self, id: ConsumerId, message: ToConsumer) -> Result<(), Overflow> {
        // A consumer that is gone has said so, or will.
        let Some(out) = self.open.get(&id) else { return Ok(()) };
        match out.try_send(message) {
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.open.remove(&id);
                Err(Overflow)
            }
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
        }
    }

    /// After what was sent before.
    pub fn close(&mut self, id: ConsumerId, why: String) {
        if let Some(out) = self.open.remove(&id) {
            let _ = out.try_send(ToConsumer::Close(why));
        }
    }

    pub fn lost(&mut self, id: ConsumerId) {
        self.open.remove(&id);
    }

    pub fn close_all(&mut self) {
        for out in std::mem::take(&mut self.open).into_values() {
            let _ = out.try_send(ToConsumer::Close("the manager is shutting down".to_owned()));
        }
    }
}
