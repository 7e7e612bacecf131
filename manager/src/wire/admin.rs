//! The calls of people and scripts over gRPC: the same state and events as over HTTP, and what can be
//! done to an engine.

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::pb::{self, admin_server::Admin, engines_request::Kind};
use anabranch_proto::word::check_name;
use anabranch_proto::{EngineId, Invalid};
use anabranch_runtime::Role;
use anabranch_views::{Notice, StatePage};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::action::Answer;
use crate::event::Event;
use crate::wire::auth::bearer;
use crate::wire::gate::Gate;
use crate::wire::http::state_json;
use crate::wire::ingress::failed;
use crate::wire::streams::Out;

const ANSWER: Duration = Duration::from_secs(10);
/// Deadline of a drain that names none.
const DRAIN: Duration = Duration::from_secs(30);
const EVENTS: usize = 256;

pub(crate) struct AdminService {
    pub gate: Arc<Gate>,
}

#[tonic::async_trait]
impl Admin for AdminService {
    type EventsStream = ReceiverStream<Result<pb::Json, Status>>;

    async fn state(
        &self,
        request: Request<pb::StateRequest>,
    ) -> Result<Response<pb::Json>, Status> {
        self.may_look(&request)?;
        let pb::StateRequest { from, limit, .. } = request.into_inner();
        let page = StatePage::new(from, limit);
        let page = page.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let text = state_json(&self.gate, page).await.map_err(Status::unavailable)?;
        Ok(Response::new(pb::Json { text }))
    }

    async fn engines(
        &self,
        request: Request<pb::EnginesRequest>,
    ) -> Result<Response<pb::EnginesReply>, Status> {
        self.gate.auth.check_call(request.metadata(), &[Role::Admin, Role::Trainer])?;
        let request = request.into_inner();
        check_name("engine", &request.engine)?;
        let engine = EngineId::new(&request.engine);
        let given = Duration::from_millis(request.deadline_ms.into());
        let deadline = if given.is_zero() { DRAIN } else { given };
        let answer = match request.kind() {
            Kind::Drain => {
                let event = |reply| Event::DrainRequested { engine, deadline, reply };
                self.gate.inbox.ask(deadline + ANSWER, event).await?
            }
            Kind::Remove => {
                let event = |reply| Event::RemoveRequested { engine, reply };
                self.gate.inbox.ask(ANSWER, event).await?
            }
            Kind::Unspecified => {
                return Err(Invalid::rule("kind", "must be drain or remove").into());
            }
        };
        match answer {
            Answer::Said(text) => Ok(Response::new(pb::EnginesReply { text })),
            Answer::Done => Ok(Response::new(pb::EnginesReply { text: "done".to_owned() })),
            other => Err(failed(other)),
        }
    }

    async fn events(
        &self,
        request: Request<pb::StateRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        self.may_look(&request)?;
        let (out, stream) = mpsc::channel(EVENTS);
        self.gate.drain.spawn("events", events(self.gate.clone(), out));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl AdminService {
    /// The token may stand in the message or in the metadata.
    fn may_look(&self, request: &Request<pb::StateRequest>) -> Result<(), Status> {
        let inside = Some(request.get_ref().token.as_str()).filter(|token| !token.is_empty());
        let token = inside.or_else(|| bearer(request.metadata()));
        let allowed = self.gate.auth.check(token, &[Role::Admin, Role::Trainer]);
        allowed.map_err(Status::unauthenticated)
    }
}

async fn events(gate: Arc<Gate>, out: Out<pb::Json>) {
    let mut heard = gate.notices.listen(0);
    for told in heard.replay {
        if out.send(Ok(pb::Json { text: told.json.clone() })).await.is_err() {
            return;
        }
    }
    loop {
        let told = tokio::select! {
            told = heard.live.recv() => told,
            () = out.closed() => return,
            () = gate.drain.cancelled() => return,
        };
        let message = match told {
            Ok(told) => pb::Json { text: told.json.clone() },
            Err(tokio::sync::broadcast::error::RecvError::Lagged(missed)) => {
                let missed = Notice::Missed { events: missed };
                pb::Json { text: serde_json::to_string(&missed).expect("a notice is plain data") }
            }
            Err(_) => return,
        };
        if out.send(Ok(message)).await.is_err() {
            return;
        }
    }
}
