//! The stream that tells the manager of one version: where its bytes are, its root once they are hashed.
//! It stays open while they can be fetched here, and is opened again after a lost link.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anabranch_proto::{Root, Version, pb};
use anabranch_transfer::{FeedOrder, PublishError, Published, Publisher, Publishing};
use bytes::Bytes;
use pb::publish_event::Kind as In;
use pb::publish_part::Kind as Out;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::client::Tries;
use crate::error::{Error, Failure};
use crate::job::{Inner, Job};
use crate::publish::Progress;
use crate::versions::VersionStatus;

const CALL: &str = "publish";

/// For a receiver to accept.
const DIAL_PATIENCE: Duration = Duration::from_secs(5);
/// How long a lost manager is looked for.
const LOST_AFTER: Duration = Duration::from_secs(600);

type Sealing = Pin<Box<dyn Future<Output = Result<Published, PublishError>> + Send>>;

pub(crate) struct Announcement {
    /// Weak: the job owns this task.
    job: Weak<Inner>,
    publisher: Arc<Publisher>,
    /// Receivers cannot reach it.
    dials: bool,
    number: u64,
    bytes: u64,
    epoch: u32,
    sealing: Sealing,
    sealed: Option<Version>,
    progress: watch::Sender<Progress>,
    tries: Tries,
    /// The session that the newest stream named.
    session: u64,
}

// === impl Announcement ===

impl Announcement {
    pub(crate) fn new(
        job: &Job,
        publisher: Arc<Publisher>,
        publishing: Publishing,
        progress: watch::Sender<Progress>,
    ) -> Self {
        Self {
            job: job.downgrade(),
            publisher,
            dials: job.config().weights.dials,
            number: publishing.number,
            bytes: publishing.bytes,
            epoch: job.config().epoch,
            sealing: Box::pin(publishing.sealed()),
            sealed: None,
            progress,
            tries: Tries::new(CALL, LOST_AFTER),
            session: 0,
        }
    }

    pub(crate) async fn run(mut self) {
        loop {
            let Err(failure) = self.attachment().await;
            if let Err(error) = self.after(failure).await {
                tracing::warn!(number = self.number, %error, "a version's roll-out is no longer followed");
                self.progress.send_replace(Progress::Failed(error.to_string()));
                return;
            }
        }
    }

    async fn attachment(&mut self) -> Result<Infallible, Failure> {
        let (out, messages) = mpsc::channel(2);
        let job = self.job()?;
        self.session = job.session().await.id;
        out.try_send(self.begin()).expect("a new channel has room");
        if let Some(version) = self.sealed {
            out.try_send(seal(version)).expect("two messages were made room for");
        }
        let mut rpc = job.client().rpc();
        drop(job);
        let reply = rpc.publish(ReceiverStream::new(messages)).await;
        let mut events = reply.map_err(|status| Failure::of(CALL, &status))?.into_inner();
        loop {
            tokio::select! {
                sealed = &mut self.sealing, if self.sealed.is_none() => {
                    let version = sealed.map_err(|error| Failure::Final(self.failed(error)))?.version;
                    self.sealed = Some(version);
                    self.progress.send_replace(Progress::Sealed(version));
                    let sent = out.send(seal(version)).await;
                    sent.map_err(|_| Failure::Transport("the stream ended".into()))?;
                }
                event = events.message() => self.event(event)?,
            }
        }
    }

    fn begin(&self) -> pb::PublishPart {
        let version = Version { epoch: self.epoch, number: self.number, root: Root::default() };
        let begin = pb::publish_part::Begin {
            session: self.session,
            version: Some(pb::Version { root: Bytes::new(), ..version.into() }),
            kind: 1,
            addresses: if self.dials { Vec::new() } else { self.publisher.addresses() },
            dials: self.dials,
            bytes: self.bytes,
            ..Default::default()
        };
        pb::PublishPart { kind: Some(Out::Begin(begin)) }
    }

    fn event(&mut self, event: Result<Option<pb::PublishEvent>, Status>) -> Result<(), Failure> {
        let event = match event {
            Ok(Some(event)) => event,
            Ok(None) => return Err(Failure::Transport("the manager ended the stream".into())),
            Err(status) => return Err(Failure::of(CALL, &status)),
        };
        self.tries.reset();
        match (event.kind, self.sealed) {
            (Some(In::Status(status)), Some(version)) => {
                let status = VersionStatus::try_from(status)
                    .map_err(|what| Failure::Final(Error::Protocol { call: CALL, what }))?;
                self.progress.send_replace(Progress::Rolling(version, status));
            }
            (Some(In::Dial(dial)), _) => self.dial(dial),
            _ => {}
        }
        Ok(())
    }

    /// A receiver that shall fetch from here, and cannot reach us.
    fn dial(&self, order: pb::publish_event::DialReceiver) {
        let receiver = order.receiver;
        let order = FeedOrder {
            addrs: order.addresses,
            grant: order.grant.to_vec(),
            streams: order.streams as usize,
            connect: DIAL_PATIENCE,
        };
        if let Err(error) = self.publisher.server().feed(order) {
            tracing::warn!(receiver, %error, "cannot dial a receiver of the weights");
        }
    }

    /// Makes ready for the next attachment, or says why there is none.
    async fn after(&mut self, failure: Failure) -> Result<(), Error> {
        let detail = match failure {
            Failure::Final(error) => return Err(error),
            Failure::NotFound(_) => {
                let job = self.job().map_err(|_| Error::Closed)?;
                job.renew(self.session, self.tries.left()).await?;
                self.publisher.set_serve_key(job.session().await.serve_key);
                "the session was opened again".to_owned()
            }
            Failure::Transport(detail) => detail,
        };
        self.tries.pause(&detail).await?;
        self.job().map_err(|_| Error::Closed)?.client().after_loss().await;
        Ok(())
    }

    fn job(&self) -> Result<Job, Failure> {
        Job::upgrade(&self.job).ok_or(Failure::Final(Error::Closed))
    }

    fn failed(&self, error: PublishError) -> Error {
        Error::Publish { number: self.number, why: error.to_string() }
    }
}

fn seal(version: Version) -> pb::PublishPart {
    let root = Bytes::copy_from_slice(&version.root.0);
    pb::PublishPart { kind: Some(Out::Seal(pb::publish_part::Seal { root })) }
}
