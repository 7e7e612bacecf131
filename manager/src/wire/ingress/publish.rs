//! One Publish stream: Begin, Seal, then how the version spreads, for as long as it can be fetched from
//! this trainer.

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::pb::{self, publish_event, publish_part::Kind};
use anabranch_proto::{Invalid, Root, Version};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{ANSWER, convert, done};
use crate::action::VersionStatus;
use crate::event::{Event, PublisherId};
use crate::wire::gate::Gate;
use crate::wire::inbox::{Closed, Input};
use crate::wire::streams::{Out, ToPublisher};

/// Statuses that the trainer has not taken; each replaces the one before.
const STATUSES: usize = 64;
const ALIVE: Duration = Duration::from_secs(1);

pub(super) fn start(
    gate: Arc<Gate>,
    from: Streaming<pb::PublishPart>,
) -> ReceiverStream<Result<pb::PublishEvent, Status>> {
    let (out, stream) = mpsc::channel(STATUSES);
    gate.drain.clone().spawn("publish", run(gate, from, out));
    ReceiverStream::new(stream)
}

async fn run(gate: Arc<Gate>, from: Streaming<pb::PublishPart>, out: Out<pb::PublishEvent>) {
    let publisher = PublisherId(gate.inbox.next_id());
    let mut publish = Publish { gate, from, out, publisher };
    let ended = publish.talk().await;
    // While shutting down nobody needs to know.
    let _ = publish.gate.inbox.send(Input::PublisherLost(publisher)).await;
    if let Err(status) = ended {
        let _ = publish.out.send(Err(status)).await;
    }
}

struct Publish {
    gate: Arc<Gate>,
    from: Streaming<pb::PublishPart>,
    out: Out<pb::PublishEvent>,
    publisher: PublisherId,
}

impl Publish {
    async fn talk(&mut self) -> Result<(), Status> {
        let (tell, mut told) = mpsc::channel(STATUSES);
        let input = Input::PublisherOpened { publisher: self.publisher, out: tell };
        self.gate.inbox.send(input).await?;
        let Some(version) = self.begin().await? else { return Ok(()) };
        let mut alive = tokio::time::interval(ALIVE);
        loop {
            tokio::select! {
                part = self.from.message() => match part? {
                    Some(part) => self.seal(version, part).await?,
                    None => return Ok(()),
                },
                news = told.recv() => match news {
                    Some(ToPublisher::Status(status)) => {
                        self.say(publish_event::Kind::Status(status_to_wire(status))).await?;
                    }
                    Some(ToPublisher::Dial(dial)) => {
                        self.say(publish_event::Kind::Dial(dial)).await?;
                    }
                    None => return Err(Closed.into()),
                },
                _ = alive.tick() => self.gate.inbox.trainer_heard().await?,
            }
        }
    }

    async fn begin(&mut self) -> Result<Option<Version>, Status> {
        let begin = match self.from.message().await? {
            Some(pb::PublishPart { kind: Some(Kind::Begin(begin)) }) => begin,
            Some(_) => {
                return Err(Invalid::rule("publish", "the first message must be Begin").into());
            }
            None => return Ok(None),
        };
        let session = self.gate.session(begin.session)?;
        let announce = Box::new(convert::announce(begin, session)?);
        let (version, publisher) = (announce.version, self.publisher);
        let event = |reply| Event::VersionAnnounced { publisher, announce, reply };
        done(self.gate.inbox.ask(ANSWER, event).await?)?;
        self.say(publish_event::Kind::Accepted(pb::publish_event::Accepted {})).await?;
        Ok(Some(version))
    }

    async fn seal(&self, version: Version, part: pb::PublishPart) -> Result<(), Status> {
        let Some(Kind::Seal(seal)) = part.kind else {
            return Err(Invalid::rule("publish", "after Begin comes Seal").into());
        };
        let root: [u8; 32] = seal.root.as_ref().try_into().map_err(|_| {
            Invalid::rule("seal.root", format!("has {} bytes, expected 32", seal.root.len()))
        })?;
        let version = Version { root: Root(root), ..version };
        let publisher = self.publisher;
        let event = |reply| Event::VersionSealed { publisher, version, reply };
        done(self.gate.inbox.ask(ANSWER, event).await?)?;
        self.say(publish_event::Kind::Sealed(pb::publish_event::Sealed {})).await
    }

    async fn say(&self, kind: publish_event::Kind) -> Result<(), Status> {
        let event = pb::PublishEvent { kind: Some(kind) };
        self.out.send(Ok(event)).await.map_err(|_| Status::cancelled("the trainer hung up"))
    }
}

fn status_to_wire(status: VersionStatus) -> pb::VersionStatus {
    let engine = |on: crate::action::OnEngine| pb::version_status::OnEngine {
        engine: on.engine.to_string(),
        stage: on.stage.name().to_owned(),
        bytes: on.bytes,
        since_ms: u64::try_from(on.since_sealed.as_millis()).unwrap_or(u64::MAX),
        error: on.error,
    };
    pb::VersionStatus {
        version: Some(status.version.into()),
        state: status.state.to_owned(),
        bytes: status.bytes,
        engines: status.engines.into_iter().map(engine).collect(),
        settled: status.settled,
    }
}
