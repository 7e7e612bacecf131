//! The task behind a [`super::Consumer`]: attaches, moves messages, attaches again. What to grant, and what
//! is a whole batch, is decided in `credit` and `assembly`.

use std::sync::Arc;

use anabranch_proto::{Version, pb};
use pb::from_consumer::Kind as Out;
use pb::to_consumer::Kind as In;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::assembly::{Assembly, Took};
use super::credit::{Amount, Credit};
use super::{Advice, Delivery, Pack, Shard, Shared, Window};
use crate::client::Tries;
use crate::error::{Error, Failure};
use crate::job::Job;

/// Messages on their way out. Each is derived from state, so a full queue only delays them.
const OUTBOX: usize = 16;

/// A trajectory beside its tokens and log-probabilities, about.
const TRAJECTORY_BYTES: usize = 256;

type Outbox = mpsc::UnboundedSender<Result<(Delivery, Amount), Error>>;

pub(super) struct Link {
    job: Job,
    pack: Pack,
    shard: Shard,
    tries: Tries,
    shared: Arc<Shared>,
    outbox: Outbox,
    assembly: Assembly,
    credit: Credit,
    due: Due,
    /// The session that the newest attachment named.
    session: u64,
}

/// What the manager has still to hear, most urgent first.
#[derive(Debug, Default)]
struct Due {
    acked: u64,
    received: u64,
    /// A step's last batch is acknowledged with its `StepDone`, which would else be lost with the link.
    step_open: Option<u64>,
    /// Given to the stream of this attachment.
    committed: u64,
    commit: Option<(u64, Version)>,
}

/// Why an attachment ended.
enum Ended {
    Lost(Failure),
    /// The consumer was dropped or the job closed.
    Done,
    Bad(Error),
}

// === impl Link ===

impl Link {
    pub(super) fn new(
        job: Job,
        (pack, shard, window): (Pack, Shard, Window),
        shared: Arc<Shared>,
        outbox: Outbox,
    ) -> Self {
        let tries = Tries::new("consume", window.lost_after);
        let credit = Credit::new(window.amount());
        let (assembly, due) = (Assembly::default(), Due::default());
        Self { job, pack, shard, tries, shared, outbox, assembly, credit, due, session: 0 }
    }

    pub(super) async fn run(
        mut self,
        mut commits: watch::Receiver<Option<(u64, Version)>>,
        sent: watch::Sender<u64>,
    ) {
        let closed = self.job.closed().clone();
        let error = loop {
            let ended = tokio::select! {
                _ = closed.cancelled() => Ended::Done,
                ended = self.attachment(&mut commits, &sent) => ended,
            };
            match self.after(ended).await {
                Ok(true) => {}
                Ok(false) => break Error::Closed,
                Err(error) => break error,
            }
        };
        // Nobody listens where the consumer was dropped.
        let _ = self.outbox.send(Err(error));
    }

    /// Whether to attach again.
    async fn after(&mut self, ended: Ended) -> Result<bool, Error> {
        let failure = match ended {
            Ended::Done => return Ok(false),
            Ended::Bad(error) => return Err(error),
            Ended::Lost(failure) => failure,
        };
        let detail = match failure {
            Failure::Final(error) => return Err(error),
            Failure::NotFound(_) => {
                self.job.renew(self.session, self.tries.left()).await?;
                "the session was opened again".to_owned()
            }
            Failure::Transport(detail) => detail,
        };
        if self.tries.is_first() {
            tracing::warn!(detail, "the stream of trajectories was lost; attaching again");
        }
        self.tries.pause(&detail).await?;
        self.job.client().after_loss().await;
        Ok(true)
    }

    async fn attachment(
        &mut self,
        commits: &mut watch::Receiver<Option<(u64, Version)>>,
        sent: &watch::Sender<u64>,
    ) -> Ended {
        let (out, messages) = mpsc::channel(OUTBOX);
        self.session = self.job.session().await.id;
        let mut inbound = match self.attach(&out, messages).await {
            Ok(inbound) => inbound,
            Err(status) => return Ended::Lost(Failure::of("consume", &status)),
        };
        self.assembly.reattached();
        self.credit.reattached();
        self.due.reattached();
        commits.mark_changed();
        loop {
            self.credit.taken(self.shared.drain());
            let grant = self.credit.due();
            tokio::select! {
                permit = out.reserve(), if grant.is_some() || self.due.any() => {
                    let Ok(permit) = permit else {
                        return Ended::Lost(Failure::Transport("the stream ended".into()));
                    };
                    permit.send(pb::FromConsumer { kind: Some(self.next_out(grant)) });
                    let committed = self.due.committed;
                    sent.send_if_modified(|at| std::mem::replace(at, committed.max(*at)) < committed);
                }
                message = inbound.message() => {
                    if let Err(ended) = self.inbound(message) {
                        return ended;
                    }
                }
                _ = self.shared.changed.notified() => {}
                changed = commits.changed() => match changed {
                    Ok(()) => self.due.commit = *commits.borrow_and_update(),
                    Err(_) => return Ended::Done,
                },
            }
        }
    }

    async fn attach(
        &self,
        out: &mpsc::Sender<pb::FromConsumer>,
        messages: mpsc::Receiver<pb::FromConsumer>,
    ) -> Result<Streaming<pb::ToConsumer>, Status> {
        let attach = pb::Attach {
            session: self.session,
            pack: Some(self.pack.into()),
            shard_index: self.shard.index,
            shard_count: self.shard.count,
        };
        let first = pb::FromConsumer { kind: Some(Out::Attach(attach)) };
        out.try_send(first).expect("a new channel has room");
        let mut rpc = self.job.client().rpc();
        Ok(rpc.consume(ReceiverStream::new(messages)).await?.into_inner())
    }

    /// Only called where something is due.
    fn next_out(&mut self, grant: Option<Amount>) -> Out {
        if let Some(amount) = grant {
            self.credit.granted(amount);
            let (bytes, samples) = (amount.bytes as u64, amount.samples as u64);
            return Out::Credit(pb::Credit { bytes, samples });
        }
        self.due.next()
    }

    fn inbound(&mut self, message: Result<Option<pb::ToConsumer>, Status>) -> Result<(), Ended> {
        let lost = |why: &str| Ended::Lost(Failure::Transport(why.into()));
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => return Err(lost("the manager ended the stream")),
            Err(status) => return Err(Ended::Lost(Failure::of("consume", &status))),
        };
        self.tries.reset();
        let delivery = match message.kind {
            Some(In::Part(part)) => return self.part(part),
            Some(In::StepDone(done)) => {
                self.due.step_done(done.seq);
                self.assembly.step_done(done).map(Delivery::StepDone)
            }
            Some(In::Advice(advice)) => Some(Delivery::Advice(Advice::from(advice))),
            // A kind of a newer manager.
            None => None,
        };
        delivery.map_or(Ok(()), |delivery| self.deliver(delivery, Amount::default()))
    }

    fn part(&mut self, part: pb::Part) -> Result<(), Ended> {
        let (seq, cost) = (part.seq, cost(&part));
        self.credit.spent(cost);
        match self.assembly.part(part, cost) {
            Ok(Took::More) => Ok(()),
            Ok(Took::Again { seq }) => {
                self.due.again(seq);
                Ok(())
            }
            Ok(Took::Whole { batch, cost }) => {
                self.due.received(batch.seq, batch.last_of_step);
                self.credit.held(cost);
                self.deliver(Delivery::Batch(batch), cost)
            }
            Err(why) => Err(Ended::Bad(Error::Malformed { seq, why })),
        }
    }

    fn deliver(&mut self, delivery: Delivery, cost: Amount) -> Result<(), Ended> {
        self.outbox.send(Ok((delivery, cost))).map_err(|_| Ended::Done)
    }
}

/// What a part takes from the credit. The manager's egress counts the same way, or the two would drift.
fn cost(part: &pb::Part) -> Amount {
    let bytes = |t: &pb::Trajectory| t.tokens.len() + t.logprobs.len() + TRAJECTORY_BYTES;
    let bytes: usize = part.trajectories.iter().map(bytes).sum();
    Amount { bytes: bytes as i64, samples: part.trajectories.len() as i64 }
}

// === impl Due ===

impl Due {
    /// The manager may not have heard what was said on the old stream.
    fn reattached(&mut self) {
        self.committed = 0;
    }

    fn received(&mut self, seq: u64, last_of_step: bool) {
        if self.received == 0 {
            self.acked = seq.saturating_sub(1);
        }
        self.received = seq;
        self.step_open = last_of_step.then_some(seq);
    }

    fn step_done(&mut self, seq: u64) {
        self.step_open = self.step_open.filter(|open| *open > seq);
    }

    fn again(&mut self, seq: u64) {
        self.acked = self.acked.min(seq.saturating_sub(1));
    }

    fn ack_to(&self) -> u64 {
        self.step_open.map_or(self.received, |open| open - 1)
    }

    fn any(&self) -> bool {
        self.acked < self.ack_to() || self.commit_due().is_some()
    }

    fn commit_due(&self) -> Option<(u64, Version)> {
        self.commit.filter(|(seq, _)| *seq > self.committed)
    }

    fn next(&mut self) -> Out {
        if self.acked < self.ack_to() {
            self.acked += 1;
            return Out::Ack(pb::Ack { seq: self.acked });
        }
        let (seq, version) = self.commit_due().expect("next is called where something is due");
        self.committed = seq;
        Out::Commit(pb::Commit { seq, version: Some(version.into()) })
    }
}
