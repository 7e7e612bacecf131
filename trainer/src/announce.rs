//! The stream that tells the manager of one version: where its bytes are, its root once they are hashed.
//! It stays open while they can be fetched here, and is opened again after a lost link.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anabranch_proto::address::AddressError;
use anabranch_proto::{Root, Version, pb};
use anabranch_transfer::{FeedOrder, Publisher, Sender};
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

/// Gives the version with its root, or why there is none.
type Sealing = Pin<Box<dyn Future<Output = Result<Version, String>> + Send>>;

/// A version on its way to its seal.
pub(crate) struct Offer {
    pub number: u64,
    pub bytes: u64,
    pub source: Source,
    /// It has some of the chunks only.
    pub part: bool,
    pub sealing: Sealing,
}

/// Where engines get it.
pub(crate) enum Source {
    Publisher(Arc<Publisher>),
    /// They load this directory, which they can read.
    Directory(String),
}

pub(crate) struct Announcement {
    /// Weak: the job owns this task.
    job: Weak<Inner>,
    source: Source,
    /// Where there are several.
    sender: Option<pb::publish_part::Sender>,
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

impl Source {
    fn dials(&self, job: &Job) -> bool {
        matches!(self, Source::Publisher(_)) && job.config().weights.dials
    }
}

impl Announcement {
    pub(crate) fn new(job: &Job, offer: Offer, progress: watch::Sender<Progress>) -> Self {
        let Offer { number, bytes, source, part, sealing } = offer;
        let sender =
            job.config().weights.sender.filter(|_| !matches!(source, Source::Directory(_)));
        let sender =
            sender.map(|Sender { index, count }| pb::publish_part::Sender { index, count, part });
        Self {
            job: job.downgrade(),
            sender,
            dials: source.dials(job),
            source,
            number,
            bytes,
            epoch: job.config().epoch,
            sealing,
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
                    let version = sealed.map_err(|why| Failure::Final(self.failed(why)))?;
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
        let (mut addresses, directory) = match &self.source {
            Source::Publisher(_) if self.dials => (Vec::new(), String::new()),
            Source::Publisher(publisher) => (publisher.addresses(), String::new()),
            Source::Directory(path) => (Vec::new(), path.clone()),
        };
        if self.sender.is_some_and(|sender| sender.part) {
            // What is no whole is not passed on as memory.
            addresses.retain(|addr| !addr.is_within_host());
        }
        let begin = pb::publish_part::Begin {
            session: self.session,
            version: Some(pb::Version { root: Bytes::new(), ..version.into() }),
            kind: 1,
            addresses: addresses.iter().map(ToString::to_string).collect(),
            directory,
            dials: self.dials,
            bytes: self.bytes,
            sender: self.sender,
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
            (Some(In::Sealed(_)), Some(version)) => {
                self.progress.send_if_modified(|progress| {
                    let first = matches!(progress, Progress::Sealed(_));
                    if first {
                        *progress = Progress::Announced(version);
                    }
                    first
                });
            }
            _ => {}
        }
        Ok(())
    }

    /// A receiver that shall fetch from here, and cannot reach us.
    fn dial(&self, order: pb::publish_event::DialReceiver) {
        // Nobody was told that a directory dials.
        let Source::Publisher(publisher) = &self.source else { return };
        let receiver = order.receiver;
        let address = |addr: &String| {
            let refused =
                |error: &AddressError| tracing::warn!(receiver, %error, "not dialled there");
            addr.parse().inspect_err(refused).ok()
        };
        let order = FeedOrder {
            addrs: order.addresses.iter().filter_map(address).collect(),
            grant: order.grant.to_vec(),
            streams: order.streams as usize,
            connect: DIAL_PATIENCE,
        };
        if let Err(error) = publisher.server().feed(order) {
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
                if let Source::Publisher(publisher) = &self.source {
                    publisher.set_serve_key(job.session().await.serve_key);
                }
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

    fn failed(&self, why: String) -> Error {
        Error::Publish { number: self.number, why }
    }
}

fn seal(version: Version) -> pb::PublishPart {
    let root = Bytes::copy_from_slice(&version.root.0);
    pb::PublishPart { kind: Some(Out::Seal(pb::publish_part::Seal { root })) }
}
