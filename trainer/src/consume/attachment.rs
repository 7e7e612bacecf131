//! The stream behind a [`super::Consumer`]: moves messages while it is attached. What to grant, what to
//! acknowledge and what is a whole batch is decided in `credit`, `due` and `assembly`.

use std::ops::ControlFlow;
use std::sync::Arc;

use anabranch_proto::{BatchSeq, Pack, Shard, Version, pb};
use pb::from_consumer::Kind as Out;
use pb::to_consumer::Kind as In;
use tokio::sync::mpsc::{self, Permit};
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::assembly::{Assembly, Took};
use super::credit::{Amount, Credit};
use super::due::Due;
use super::{Delivery, Taken, Window};
use crate::client::Rpc;
use crate::error::{Error, Failure};
use crate::stream::{Attach, Link};

/// Name of the call in errors and logs.
pub(super) const CALL: &str = "consume";

/// Messages on their way out. Each is derived from state, so a full queue only delays them.
const OUTBOX: usize = 16;

/// About what a trajectory costs beside its tokens and log-probabilities.
const TRAJECTORY_BYTES: usize = 256;

/// Way to the caller: deliveries with their cost, and the last word.
pub(super) type Outbox = mpsc::UnboundedSender<Result<(Delivery, Amount), Error>>;

/// Ends an attachment: well, or with what went wrong.
type Flow = ControlFlow<Result<(), Failure>>;

/// One consumer's side of the stream, over all its attachments.
pub(super) struct Attachment {
    pack: Pack,
    shard: Shard,
    taken: Arc<Taken>,
    outbox: Outbox,
    commits: watch::Receiver<Option<(BatchSeq, Version)>>,
    committed: watch::Sender<BatchSeq>,
    assembly: Assembly,
    credit: Credit,
    due: Due,
}

/// Event that wakes an attachment up.
enum Turn<'a> {
    /// There is room for a message to the manager.
    Room(Permit<'a, pb::FromConsumer>),
    /// The manager does not listen any more.
    Deaf,
    Message(Result<Option<pb::ToConsumer>, Status>),
    /// The caller took a delivery.
    Taken,
    Commit(Option<(BatchSeq, Version)>),
    /// The consumer was dropped.
    Dropped,
}

// === impl Attachment ===

impl Attachment {
    pub(super) fn new(
        (pack, shard, window): (Pack, Shard, Window),
        (taken, outbox): (Arc<Taken>, Outbox),
        (commits, committed): (
            watch::Receiver<Option<(BatchSeq, Version)>>,
            watch::Sender<BatchSeq>,
        ),
    ) -> Self {
        let credit = Credit::new(window.amount());
        let (assembly, due) = (Assembly::default(), Due::default());
        Self { pack, shard, taken, outbox, commits, committed, assembly, credit, due }
    }

    /// Runs until the consumer is dropped or the stream cannot go on; its last word is an error.
    pub(super) async fn run(mut self, mut link: Link) {
        let error = link.run(&mut self).await.err().unwrap_or(Error::Closed);
        // Nobody listens if the consumer was dropped.
        let _ = self.outbox.send(Err(error));
    }

    async fn open(
        &self,
        mut rpc: Rpc,
        session: u64,
        messages: mpsc::Receiver<pb::FromConsumer>,
    ) -> Result<Streaming<pb::ToConsumer>, Failure> {
        let reply = rpc.consume(ReceiverStream::new(messages)).await;
        tracing::debug!(session, shard = self.shard.index, "attached to the trajectories");
        Ok(reply.map_err(|status| Failure::of(CALL, &status))?.into_inner())
    }

    fn hello(&self, session: u64) -> pb::FromConsumer {
        let attach = pb::Attach {
            session,
            pack: Some(self.pack.into()),
            shard_index: self.shard.index,
            shard_count: self.shard.count,
        };
        pb::FromConsumer { kind: Some(Out::Attach(attach)) }
    }

    /// Says the most urgent thing; only called if there is one.
    fn say(&mut self, permit: Permit<'_, pb::FromConsumer>, grant: Option<Amount>) {
        let kind = match grant {
            Some(amount) => {
                self.credit.granted(amount);
                let (bytes, samples) = (amount.bytes as u64, amount.samples as u64);
                Out::Credit(pb::Credit { bytes, samples })
            }
            None => self.due.next(),
        };
        permit.send(pb::FromConsumer { kind: Some(kind) });
        let said = self.due.committed();
        self.committed.send_if_modified(|at| std::mem::replace(at, said.max(*at)) < said);
    }

    fn message(&mut self, message: pb::ToConsumer) -> Flow {
        match message.kind {
            Some(In::Part(part)) => self.part(part),
            Some(In::StepDone(done)) => {
                self.due.step_done(done.seq);
                match self.assembly.step_done(done) {
                    Some(done) => self.deliver(Delivery::StepDone(done), Amount::default()),
                    None => Flow::Continue(()),
                }
            }
            // Nothing that a trainer must know of: the manager's advice, or a kind of a newer manager.
            Some(In::Advice(_)) | None => Flow::Continue(()),
        }
    }

    fn part(&mut self, part: pb::Part) -> Flow {
        let (seq, cost) = (part.seq, cost(&part));
        self.credit.spent(cost);
        match self.assembly.part(part, cost) {
            Ok(Took::More) => Flow::Continue(()),
            Ok(Took::Again { seq }) => {
                self.due.again(seq);
                Flow::Continue(())
            }
            Ok(Took::Whole { batch, cost }) => {
                self.due.received(batch.seq.0, batch.last_of_step);
                self.credit.held(cost);
                self.deliver(Delivery::Batch(batch), cost)
            }
            Err(why) => {
                let seq = BatchSeq(seq);
                Flow::Break(Err(Failure::Final(Error::Malformed { seq, why })))
            }
        }
    }

    fn deliver(&mut self, delivery: Delivery, cost: Amount) -> Flow {
        match self.outbox.send(Ok((delivery, cost))) {
            Ok(()) => Flow::Continue(()),
            Err(_) => Flow::Break(Ok(())),
        }
    }

    fn turn(&mut self, turn: Turn<'_>, grant: Option<Amount>, link: &mut Link) -> Flow {
        let lost = |why: &str| Flow::Break(Err(Failure::Transport(why.into())));
        match turn {
            Turn::Room(permit) => self.say(permit, grant),
            Turn::Deaf => return lost("the stream ended"),
            Turn::Message(Ok(Some(message))) => {
                link.heard();
                return self.message(message);
            }
            Turn::Message(Ok(None)) => return lost("the manager ended the stream"),
            Turn::Message(Err(status)) => return Flow::Break(Err(Failure::of(CALL, &status))),
            Turn::Taken => {}
            Turn::Commit(commit) => self.due.commit(commit),
            Turn::Dropped => return Flow::Break(Ok(())),
        }
        Flow::Continue(())
    }
}

impl Attach for Attachment {
    type Done = ();

    async fn attach(&mut self, link: &mut Link) -> Result<(), Failure> {
        let (out, messages) = mpsc::channel(OUTBOX);
        let (rpc, opened) = link.begin().await;
        out.try_send(self.hello(opened.id.0)).expect("a new channel has room");
        let mut inbound = self.open(rpc, opened.id.0, messages).await?;
        self.assembly.reattached();
        self.credit.reattached();
        self.due.reattached();
        self.commits.mark_changed();
        loop {
            self.credit.taken(self.taken.drain());
            let grant = self.credit.due();
            let turn = tokio::select! {
                permit = out.reserve(), if grant.is_some() || self.due.any() => {
                    permit.map_or(Turn::Deaf, Turn::Room)
                }
                message = inbound.message() => Turn::Message(message),
                () = self.taken.changed() => Turn::Taken,
                changed = self.commits.changed() => match changed {
                    Ok(()) => Turn::Commit(*self.commits.borrow_and_update()),
                    Err(_) => Turn::Dropped,
                },
            };
            if let ControlFlow::Break(ended) = self.turn(turn, grant, link) {
                return ended;
            }
        }
    }
}

/// Credit that a part takes. The manager's egress counts the same way, or the two would drift.
fn cost(part: &pb::Part) -> Amount {
    let bytes = |t: &pb::Trajectory| t.tokens.len() + t.logprobs.len() + TRAJECTORY_BYTES;
    let bytes: usize = part.trajectories.iter().map(bytes).sum();
    Amount { bytes: bytes as i64, samples: part.trajectories.len() as i64 }
}
