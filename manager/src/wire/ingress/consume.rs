//! One Consume stream: what the trainer says goes to the core; batches are made into parts here, one at a
//! time, as fast as the trainer takes them.

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::pb::{self, from_consumer::Kind, to_consumer};
use anabranch_proto::{BatchSeq, Invalid, Pack, Shard};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::event::{ConsumerId, Event};
use crate::wire::deliver::{Parts, step_done};
use crate::wire::gate::Gate;
use crate::wire::inbox::{Input, NewConsumer};
use crate::wire::streams::Out;
use crate::wire::streams::consumers::{OutgoingBatch, ToConsumer, WAITING_BATCHES};

/// Parts made and not yet taken by the transport: 1 MiB each.
const PARTS: usize = 2;
/// An open stream means that its trainer lives, however long it is silent between steps: the transport's
/// keepalive ends the streams of dead ones.
const ALIVE: Duration = Duration::from_secs(1);
const FIRST_WORD: Duration = Duration::from_secs(5);

pub(super) fn start(
    gate: Arc<Gate>,
    from: Streaming<pb::FromConsumer>,
) -> ReceiverStream<Result<pb::ToConsumer, Status>> {
    let (out, stream) = mpsc::channel(PARTS);
    gate.drain.clone().spawn("consume", run(gate, from, out));
    ReceiverStream::new(stream)
}

async fn run(gate: Arc<Gate>, mut from: Streaming<pb::FromConsumer>, out: Out<pb::ToConsumer>) {
    let consumer = ConsumerId(gate.inbox.next_id());
    let (queue, waiting) = mpsc::channel(WAITING_BATCHES);
    if let Err(status) = attach(&gate, &mut from, consumer, queue).await {
        let _ = out.send(Err(status)).await;
        return;
    }
    // The writer ends when the loop drops its queue: after the reader's end, or by itself.
    gate.drain.spawn("consume-out", write(gate.clone(), waiting, out.clone()));
    tokio::select! {
        () = read(&gate, &mut from, consumer, &out) => {}
        () = out.closed() => {}
    }
    // While shutting down nobody needs to know.
    let _ = gate.inbox.send(Input::ConsumerLost(consumer)).await;
}

async fn attach(
    gate: &Gate,
    from: &mut Streaming<pb::FromConsumer>,
    consumer: ConsumerId,
    out: mpsc::Sender<ToConsumer>,
) -> Result<(), Status> {
    let first = tokio::time::timeout(FIRST_WORD, from.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("no Attach within 5 s"))??;
    let Some(pb::FromConsumer { kind: Some(Kind::Attach(attach)) }) = first else {
        return Err(Invalid::rule("consume", "the first message must be Attach").into());
    };
    let session = gate.session(attach.session)?;
    let pack = Pack::from(attach.pack.unwrap_or_default());
    let shard = Shard::new(attach.shard_index, attach.shard_count)?;
    let new = NewConsumer { session, consumer, pack, shard, out };
    Ok(gate.inbox.send(Input::ConsumerOpened(Box::new(new))).await?)
}

/// Runs until the trainer hangs up or says something that makes no sense.
async fn read(
    gate: &Gate,
    from: &mut Streaming<pb::FromConsumer>,
    consumer: ConsumerId,
    out: &Out<pb::ToConsumer>,
) {
    let mut alive = tokio::time::interval(ALIVE);
    loop {
        let message = tokio::select! {
            message = from.message() => Some(message),
            _ = alive.tick() => None,
        };
        let event = match message {
            None => None,
            Some(Ok(Some(pb::FromConsumer { kind }))) => match event(consumer, kind) {
                Ok(event) => event,
                Err(status) => {
                    let _ = out.send(Err(status)).await;
                    return;
                }
            },
            Some(Ok(None) | Err(_)) => return,
        };
        let sent = match event {
            Some(event) => gate.inbox.event(event).await,
            None => Ok(()),
        };
        if sent.is_err() || gate.inbox.trainer_heard().await.is_err() {
            return;
        }
    }
}

fn event(consumer: ConsumerId, kind: Option<Kind>) -> Result<Option<Event>, Status> {
    Ok(match kind {
        Some(Kind::Credit(pb::Credit { bytes, samples })) => {
            Some(Event::CreditGranted { consumer, bytes, samples })
        }
        Some(Kind::Ack(ack)) => Some(Event::BatchAcked { consumer, seq: BatchSeq(ack.seq) }),
        Some(Kind::Commit(commit)) => {
            Some(Event::BatchCommitted { consumer, seq: BatchSeq(commit.seq) })
        }
        Some(Kind::Attach(_)) => {
            return Err(Invalid::rule("consume", "Attach twice on one stream").into());
        }
        None => None,
    })
}

/// Runs until the loop closes the queue or the trainer is gone.
async fn write(gate: Arc<Gate>, mut waiting: mpsc::Receiver<ToConsumer>, out: Out<pb::ToConsumer>) {
    while let Some(next) = waiting.recv().await {
        let sent = match next {
            ToConsumer::Batch(batch) => write_batch(&gate, batch, &out).await,
            ToConsumer::StepDone(report) => {
                let done = to_consumer::Kind::StepDone(step_done(&report));
                out.send(Ok(pb::ToConsumer { kind: Some(done) })).await.is_ok()
            }
            ToConsumer::Close(why) => {
                let _ = out.send(Err(Status::failed_precondition(why))).await;
                false
            }
        };
        if !sent {
            return;
        }
    }
    // The loop gave this consumer up: its queue was full, or it is of an epoch that is over.
    let why = "this consumer did not take its batches in time and was let go; consume again";
    let _ = out.send(Err(Status::unavailable(why))).await;
}

async fn write_batch(gate: &Gate, outgoing: OutgoingBatch, out: &Out<pb::ToConsumer>) -> bool {
    for part in Parts::new(&gate.ledger, &outgoing.batch, &outgoing.samples) {
        let message = match part {
            Ok(part) => Ok(pb::ToConsumer { kind: Some(to_consumer::Kind::Part(part)) }),
            Err(vanished) => {
                tracing::error!("{vanished}");
                Err(Status::data_loss(vanished.to_string()))
            }
        };
        let failed = message.is_err();
        if out.send(message).await.is_err() || failed {
            return false;
        }
    }
    if let Some(finished) = outgoing.finished {
        gate.metrics.families.delivery.record(finished.elapsed().as_secs_f64());
    }
    true
}
