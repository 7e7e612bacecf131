//! One Data stream: ticks go into the ledger here, their facts to the core, then the tick is
//! acknowledged. An agent may send a tick again after a re-attach; the ledger takes it once.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_proto::pb::{self, data_from_agent::Kind, data_to_agent};
use anabranch_proto::tokens::WIDTH;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic::{Status, Streaming};

use super::{FIRST_WORD, misbehaved};
use crate::event::Event;
use crate::ledger::Taken;
use crate::wire::gate::Gate;
use crate::wire::inbox::{Closed, Input};
use crate::wire::streams::Out;
use crate::wire::streams::sessions::Attached;

/// An ack goes out after so many ticks, or so long after the first that it covers.
const ACK_TICKS: u64 = 4;
const ACK_AFTER: Duration = Duration::from_millis(50);

pub(super) async fn run(
    gate: Arc<Gate>,
    mut from: Streaming<pb::DataFromAgent>,
    out: Out<pb::DataToAgent>,
) {
    let attached = match bind(&gate, &mut from, &out).await {
        Ok(attached) => attached,
        Err(status) => {
            let _ = out.send(Err(status)).await;
            return;
        }
    };
    let mut stream = DataStream { gate: gate.clone(), from, out, attached, unacked: None };
    let Some(why) = stream.pump().await else { return };
    // A session without its Data stream is as good as lost; the agent opens both again.
    let link = stream.attached.link;
    let _ = gate.inbox.send(Input::LinkLost { link, why }).await;
}

async fn bind(
    gate: &Gate,
    from: &mut Streaming<pb::DataFromAgent>,
    out: &Out<pb::DataToAgent>,
) -> Result<Attached, Status> {
    let first = tokio::time::timeout(FIRST_WORD, from.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("no Bind within 5 s"))??;
    let Some(pb::DataFromAgent { kind: Some(Kind::Bind(bind)) }) = first else {
        return Err(Status::invalid_argument("the first message of Data must be Bind"));
    };
    let unknown = || Status::not_found("no such session; attach again over Control");
    let session = gate.life.read(bind.session).ok_or_else(unknown)?;
    let (answer, bound) = oneshot::channel();
    let input = Input::Bind { session, out: out.clone(), answer };
    gate.inbox.send(input).await?;
    bound.await.map_err(|_| unknown())
}

struct DataStream {
    gate: Arc<Gate>,
    from: Streaming<pb::DataFromAgent>,
    out: Out<pb::DataToAgent>,
    attached: Attached,
    unacked: Option<Unacked>,
}

/// Ticks that were taken and not acknowledged.
struct Unacked {
    upto: u64,
    ticks: u64,
    due: Instant,
}

impl DataStream {
    /// Runs until the stream is over; says why, unless the loop knows already. Only waiting for the next
    /// message is cut short: a tick that the ledger took must reach the core, or its facts are lost.
    async fn pump(&mut self) -> Option<&'static str> {
        let closed = self.attached.closed.clone();
        loop {
            let due = self.unacked.as_ref().map(|unacked| unacked.due);
            let ack = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let message = tokio::select! {
                () = closed.cancelled() => return None,
                message = self.from.message() => Some(message),
                () = ack => None,
            };
            let went_on = match message {
                None => self.ack(),
                Some(Ok(Some(message))) => self.take(message).await,
                Some(Ok(None)) => Err("the agent closed its data stream"),
                Some(Err(_)) => Err("the data stream of its agent broke"),
            };
            if let Err(why) = went_on {
                return Some(why);
            }
        }
    }

    async fn take(&mut self, message: pb::DataFromAgent) -> Result<(), &'static str> {
        const STOPS: &str = "the manager stops";
        self.gate.inbox.engine_heard(&self.attached).await.map_err(|Closed| STOPS)?;
        match message.kind {
            Some(Kind::Tick(tick)) => self.tick(tick).await,
            Some(Kind::Bind(_)) => Err("Bind twice on one data stream"),
            None => Ok(()),
        }
    }

    async fn tick(&mut self, tick: pb::Tick) -> Result<(), &'static str> {
        let Attached { session, tally, .. } = &self.attached;
        let seq = tick.seq;
        let tokens = (tick.tokens.len() / WIDTH) as u64;
        let session = *session;
        let Taken { facts, tokens: new } =
            match self.gate.ledger.apply(self.gate.clock.now(), session, &tick) {
                Ok(taken) => taken,
                Err(bad) => {
                    self.gate.metrics.families.bad_ticks.increment(1);
                    misbehaved(&self.gate, &self.attached, &bad.to_string());
                    // Not to be sent again: what was in it is missing, and is found so sample by sample.
                    tally.acked_tick.fetch_max(seq, Ordering::AcqRel);
                    return Err("malformed tick");
                }
            };
        self.gate.metrics.tick(tokens, tick.held_ms);
        tally.tokens.fetch_add(new, Ordering::Relaxed);
        if !facts.is_empty() {
            let event = Event::FactsFound { session, facts };
            self.gate.inbox.event(event).await.map_err(|Closed| "the manager stops")?;
        }
        // Only now: what is acknowledged is in the core's inbox.
        self.attached.tally.acked_tick.fetch_max(seq, Ordering::AcqRel);
        self.taken(seq)
    }

    fn taken(&mut self, seq: u64) -> Result<(), &'static str> {
        let due = Instant::now() + ACK_AFTER;
        let unacked = self.unacked.get_or_insert(Unacked { upto: seq, ticks: 0, due });
        unacked.upto = unacked.upto.max(seq);
        unacked.ticks += 1;
        if unacked.ticks >= ACK_TICKS { self.ack() } else { Ok(()) }
    }

    fn ack(&mut self) -> Result<(), &'static str> {
        let Some(unacked) = self.unacked.take() else { return Ok(()) };
        let kind = Some(data_to_agent::Kind::Ack(pb::TickAck { seq: unacked.upto }));
        let sent = self.out.try_send(Ok(pb::DataToAgent { kind }));
        sent.map_err(|_| "the agent does not take what it is sent")
    }
}
