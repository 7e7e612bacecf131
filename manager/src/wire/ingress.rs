//! The trainer's calls: check, hand to the core, give its answer back. One short task per stream. Decides
//! nothing.

mod consume;
mod convert;
mod publish;
mod versions;

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::millis::{duration, millis};
use anabranch_proto::pb::{self, trainer_server::Trainer};
use anabranch_proto::word::check_name;
use anabranch_proto::{EngineId, Invalid, SessionId, Step, Version};
use anabranch_runtime::Role;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::action::{Answer, FailKind, SubmitResult, SubmitVerdict};
use crate::event::Event;
use crate::wire::gate::Gate;

/// The core answers at once; only a stuck one takes so long.
const ANSWER: Duration = Duration::from_secs(10);
/// A mode switch answers at its own deadline; so much later something is wrong.
const MODE_SLACK: Duration = Duration::from_secs(10);
/// Deadline of a mode switch that names none.
const MODE_DEADLINE: Duration = Duration::from_secs(30);

pub(crate) struct TrainerService {
    pub gate: Arc<Gate>,
}

type Stream<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl Trainer for TrainerService {
    type ConsumeStream = Stream<pb::ToConsumer>;
    type PublishStream = Stream<pb::PublishEvent>;
    type WatchVersionsStream = Stream<pb::VersionStatus>;

    async fn open(
        &self,
        request: Request<pb::OpenRequest>,
    ) -> Result<Response<pb::Opened>, Status> {
        let open = Box::new(convert::open(self.admit(request).await?)?);
        let answer = self.gate.inbox.ask(ANSWER, |reply| Event::JobOpened { open, reply }).await?;
        match answer {
            Answer::Opened { session, floor, current, serve_key, resumed, .. } => {
                Ok(Response::new(pb::Opened {
                    session: self.gate.life.mark(session),
                    manager_epoch: self.gate.life.epoch,
                    floor_cursor: floor.0,
                    current: Some(current.into()),
                    serve_key: bytes::Bytes::copy_from_slice(&serve_key),
                    resumed,
                }))
            }
            other => Err(failed(other)),
        }
    }

    async fn submit(
        &self,
        request: Request<pb::SubmitRequest>,
    ) -> Result<Response<pb::Submitted>, Status> {
        let request = self.admit(request).await?;
        let session = self.gate.session(request.session)?;
        let groups = convert::groups(request.groups)?;
        let (step, is_final) = (Step(request.step), request.r#final);
        let event = |reply| Event::GroupsSubmitted { session, step, is_final, groups, reply };
        match self.gate.inbox.ask(ANSWER, event).await? {
            Answer::Submitted(results) => {
                let results = results.into_iter().map(submitted).collect();
                Ok(Response::new(pb::Submitted { results }))
            }
            other => Err(failed(other)),
        }
    }

    async fn cancel(
        &self,
        request: Request<pb::CancelRequest>,
    ) -> Result<Response<pb::Cancelled>, Status> {
        let request = self.admit(request).await?;
        let session = self.gate.session(request.session)?;
        let keep_partial = request.keep_partial;
        let what = convert::cancel(request)?;
        let event = |reply| Event::GroupsCancelled { session, what, keep_partial, reply };
        match self.gate.inbox.ask(ANSWER, event).await? {
            Answer::Cancelled { groups, samples } => {
                Ok(Response::new(pb::Cancelled { groups, samples }))
            }
            other => Err(failed(other)),
        }
    }

    async fn consume(
        &self,
        request: Request<Streaming<pb::FromConsumer>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        Ok(Response::new(consume::start(self.gate.clone(), self.admit(request).await?)))
    }

    async fn set_mode(
        &self,
        request: Request<pb::SetModeRequest>,
    ) -> Result<Response<pb::ModeSet>, Status> {
        let request = self.admit(request).await?;
        let session = self.gate.session(request.session)?;
        let train = match request.mode() {
            pb::set_mode_request::Mode::Train => true,
            pb::set_mode_request::Mode::Generate => false,
            pb::set_mode_request::Mode::Unspecified => {
                return Err(Invalid::rule("mode", "must be train or generate").into());
            }
        };
        let given = request.deadline_ms;
        let deadline = if given == 0 { MODE_DEADLINE } else { duration(given) };
        let event = |reply| Event::ModeRequested { session, train, deadline, reply };
        match self.gate.inbox.ask(deadline + MODE_SLACK, event).await? {
            Answer::ModeSet(engines) => Ok(Response::new(mode_set(engines))),
            other => Err(failed(other)),
        }
    }

    async fn report_engine(
        &self,
        request: Request<pb::EngineReport>,
    ) -> Result<Response<pb::EngineReported>, Status> {
        let request = self.admit(request).await?;
        let session = self.gate.session(request.session)?;
        check_name("engine", &request.engine)?;
        let engine = EngineId::new(&request.engine);
        let version = Version::required("version", request.version)?;
        let event = |reply| Event::EngineReported { session, engine, version, reply };
        done(self.gate.inbox.ask(ANSWER, event).await?)?;
        Ok(Response::new(pb::EngineReported {}))
    }

    async fn publish(
        &self,
        request: Request<Streaming<pb::PublishPart>>,
    ) -> Result<Response<Self::PublishStream>, Status> {
        Ok(Response::new(publish::start(self.gate.clone(), self.admit(request).await?)))
    }

    async fn watch_versions(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchVersionsStream>, Status> {
        // Anybody who may talk to us may look; a session is not needed.
        self.admit(request).await?;
        Ok(Response::new(versions::watch(self.gate.clone())))
    }

    async fn close(
        &self,
        request: Request<pb::CloseRequest>,
    ) -> Result<Response<pb::Closed>, Status> {
        let request = self.admit(request).await?;
        let session = self.gate.session(request.session)?;
        let cancel_running = request.cancel_running;
        let event = |reply| Event::JobClosed { session, cancel_running, reply };
        done(self.gate.inbox.ask(ANSWER, event).await?)?;
        Ok(Response::new(pb::Closed {}))
    }
}

impl TrainerService {
    /// Lets a trainer in, and notes that it lives.
    async fn admit<T>(&self, request: Request<T>) -> Result<T, Status> {
        self.gate.auth.check_call(request.metadata(), &[Role::Trainer])?;
        self.gate.inbox.trainer_heard().await?;
        Ok(request.into_inner())
    }
}

impl Gate {
    /// The trainer's session, unless it belongs to another life of the manager.
    pub fn session(&self, wire: u64) -> Result<SessionId, Status> {
        self.life.read(wire).ok_or_else(|| {
            Status::not_found(
                "session: this manager does not know it (was it restarted?); open the job again",
            )
        })
    }
}

fn submitted(result: SubmitResult) -> pb::submitted::Result {
    use pb::submitted::result::Kind;
    let (kind, why, retry_after) = match result.verdict {
        SubmitVerdict::Accepted => (Kind::Accepted, String::new(), None),
        SubmitVerdict::Duplicate => (Kind::Duplicate, String::new(), None),
        SubmitVerdict::Rejected { why, retry_after } => (Kind::Rejected, why, retry_after),
    };
    let retry_after_ms = retry_after.map_or(0, millis);
    pb::submitted::Result { key: result.key, kind: kind.into(), why, retry_after_ms }
}

fn mode_set(engines: Vec<crate::action::EngineModeSet>) -> pb::ModeSet {
    let one = |engine: crate::action::EngineModeSet| pb::mode_set::PerEngine {
        engine: engine.engine.to_string(),
        drained: engine.drained,
        memory_released: engine.memory_released,
        moved_samples: engine.moved,
        error: engine.error,
    };
    pb::ModeSet { engines: engines.into_iter().map(one).collect() }
}

fn done(answer: Answer) -> Result<(), Status> {
    match answer {
        Answer::Done => Ok(()),
        other => Err(failed(other)),
    }
}

/// An answer that is not the one that was asked for.
pub(crate) fn failed(answer: Answer) -> Status {
    match answer {
        Answer::Failed { why, kind: FailKind::BadRequest } => Status::invalid_argument(why),
        Answer::Failed { why, kind: FailKind::NotFound } => Status::not_found(why),
        Answer::Failed { why, kind: FailKind::Conflict } => Status::failed_precondition(why),
        Answer::Failed { why, kind: FailKind::Unavailable } => Status::unavailable(why),
        other => Status::internal(format!("the core answered something else: {other:?}")),
    }
}
