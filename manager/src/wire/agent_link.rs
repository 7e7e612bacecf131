//! The agents' calls: one task a stream. They check messages, apply ticks to the ledger themselves (so that
//! tokens never pass the loop), and say what happened. They decide nothing.

mod data;
mod hello;
mod reports;

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::EngineId;
use anabranch_proto::pb::{self, agent_server::Agent, from_agent::Kind, to_agent};
use anabranch_runtime::Role;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::action::Notice;
use crate::event::{EngineHello, Event, LinkId};
use crate::wire::auth::bearer;
use crate::wire::gate::Gate;
use crate::wire::inbox::{Attach, Closed, Input};
use crate::wire::streams::Out;
use crate::wire::streams::sessions::{Attached, OUTGOING};

/// For the first message of a stream.
const FIRST_WORD: Duration = Duration::from_secs(5);
/// Orders to one agent that it has not taken yet.
const ORDERS: usize = 256;
/// Pause before an agent that was refused may ask again.
const RETRY_MS: u32 = 1_000;

pub(crate) struct AgentService {
    pub gate: Arc<Gate>,
}

#[tonic::async_trait]
impl Agent for AgentService {
    type ControlStream = ReceiverStream<Result<pb::ToAgent, Status>>;
    type DataStream = ReceiverStream<Result<pb::DataToAgent, Status>>;

    /// Answers at once, so that an agent may wait for the headers before it says Hello.
    async fn control(
        &self,
        request: Request<Streaming<pb::FromAgent>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        let token = bearer(request.metadata()).map(str::to_owned);
        let (out, stream) = mpsc::channel(ORDERS);
        let control = Control { gate: self.gate.clone(), from: request.into_inner(), out };
        self.gate.drain.spawn("control", control.run(token));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    /// Asks for no token: Bind names a session that only the agent's Control stream was told.
    async fn data(
        &self,
        request: Request<Streaming<pb::DataFromAgent>>,
    ) -> Result<Response<Self::DataStream>, Status> {
        let (out, stream) = mpsc::channel(OUTGOING);
        let task = data::run(self.gate.clone(), request.into_inner(), out);
        self.gate.drain.spawn("data", task);
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

struct Control {
    gate: Arc<Gate>,
    from: Streaming<pb::FromAgent>,
    out: Out<pb::ToAgent>,
}

impl Control {
    async fn run(mut self, token: Option<String>) {
        let hello = match self.hello(token).await {
            Ok(hello) => hello,
            Err(refused) => return self.refuse(refused),
        };
        let link = LinkId(self.gate.inbox.next_id());
        let closed = CancellationToken::new();
        let Ok(welcomed) = self.attach(link, hello, closed.clone()).await else { return };
        let Some(why) = self.talk(welcomed, closed).await else { return };
        // While shutting down nobody needs to know.
        let _ = self.gate.inbox.send(Input::LinkLost { link, why }).await;
    }

    async fn hello(&mut self, token: Option<String>) -> Result<EngineHello, pb::Refused> {
        let first = tokio::time::timeout(FIRST_WORD, self.from.message()).await;
        let refuse = |why: &str, retry| pb::Refused {
            why: why.to_owned(),
            retry,
            retry_after_ms: if retry { RETRY_MS } else { 0 },
        };
        let hello = match first {
            Ok(Ok(Some(pb::FromAgent { kind: Some(Kind::Hello(hello)) }))) => hello,
            Ok(Ok(Some(_))) => {
                return Err(refuse("the first message of Control must be Hello", false));
            }
            Ok(Ok(None) | Err(_)) => return Err(refuse("the stream ended before Hello", true)),
            Err(_) => return Err(refuse("no Hello within 5 s", true)),
        };
        let token = if hello.token.is_empty() { token } else { Some(hello.token.clone()) };
        let allowed = self.gate.auth.check(token.as_deref(), &[Role::Agent]);
        let engine = hello.engine.as_ref().map(|engine| engine.id.clone()).unwrap_or_default();
        let read = allowed.and_then(|()| {
            hello::read(hello, self.gate.life).map_err(|invalid| invalid.to_string())
        });
        read.map_err(|why| {
            self.tell_refused(&engine, &why);
            refuse(&why, false)
        })
    }

    fn tell_refused(&self, engine: &str, why: &str) {
        self.gate.metrics.families.hellos_refused.increment(1);
        let shown: String = engine.chars().filter(|c| !c.is_control()).take(40).collect();
        let engine = EngineId::new(if shown.is_empty() { "(unnamed)" } else { &shown });
        tell(&self.gate, &Notice::EngineRefused { engine, why: why.to_owned() });
    }

    fn refuse(&self, refused: pb::Refused) {
        let kind = Some(to_agent::Kind::Refused(refused));
        // The first message on a fresh queue always fits.
        let _ = self.out.try_send(Ok(pb::ToAgent { kind }));
    }

    async fn attach(
        &self,
        link: LinkId,
        hello: EngineHello,
        closed: CancellationToken,
    ) -> Result<oneshot::Receiver<Attached>, Closed> {
        let (welcomed, welcome) = oneshot::channel();
        let out = self.out.clone();
        let attach = Attach { link, hello, out, welcomed, closed };
        self.gate.inbox.send(Input::Attach(Box::new(attach))).await?;
        Ok(welcome)
    }

    /// Runs until the link is over; says why, unless the loop knows already (refused, replaced, over).
    async fn talk(
        &mut self,
        welcomed: oneshot::Receiver<Attached>,
        closed: CancellationToken,
    ) -> Option<&'static str> {
        let attached = tokio::select! {
            () = closed.cancelled() => return None,
            attached = welcomed => attached.ok()?,
            () = self.out.closed() => return Some("the agent hung up"),
        };
        loop {
            let message = tokio::select! {
                () = closed.cancelled() => return None,
                message = self.from.message() => message,
            };
            match message {
                Ok(Some(message)) => self.take(&attached, message).await.ok()?,
                Ok(None) => return Some("the agent closed its link"),
                Err(_) => return Some("the link to its agent broke"),
            }
        }
    }

    async fn take(&self, from: &Attached, message: pb::FromAgent) -> Result<(), Closed> {
        self.gate.inbox.engine_heard(from).await?;
        let session = from.session;
        let event = match message.kind {
            Some(Kind::Beat(beat)) => {
                self.ack(beat.seq);
                let kv_used =
                    if beat.kv_used.is_finite() { beat.kv_used.clamp(0.0, 1.0) } else { 1.0 };
                Event::EngineBeat { session, running: beat.running, waiting: beat.waiting, kv_used }
            }
            Some(Kind::LoadState(state)) => match reports::load(state) {
                Ok(report) => Event::LoadReported { session, report: Box::new(report) },
                Err(invalid) => return self.misbehaved(from, &invalid.to_string()),
            },
            Some(Kind::ModeDone(done)) => reports::mode(session, done),
            Some(Kind::Notice(notice)) => reports::preemption(session, notice),
            Some(Kind::EngineDown(down)) => Event::EngineDied { session, why: down.why },
            Some(Kind::Hello(_)) => {
                return self.misbehaved(from, "Hello twice on one Control stream");
            }
            // Of a newer protocol: what it means was negotiated to be optional.
            None => return Ok(()),
        };
        self.gate.inbox.event(event).await
    }

    fn ack(&self, seq: u64) {
        let kind = Some(to_agent::Kind::BeatAck(pb::BeatAck { seq }));
        // An agent that does not read its orders is found out by the order that does not fit.
        let _ = self.out.try_send(Ok(pb::ToAgent { kind }));
    }

    /// Tells of a message that makes no sense; the next one may make sense.
    fn misbehaved(&self, from: &Attached, what: &str) -> Result<(), Closed> {
        misbehaved(&self.gate, from, what);
        Ok(())
    }
}

fn misbehaved(gate: &Gate, from: &Attached, what: &str) {
    gate.metrics.families.misbehaved.increment(1);
    tell(gate, &Notice::PeerMisbehaved { engine: from.engine.clone(), what: what.to_owned() });
}

/// A notice that is not the core's: it concerns a message that never reached it.
fn tell(gate: &Gate, notice: &Notice) {
    crate::view::notice_log::log(notice);
    gate.notices.tell(notice);
}
