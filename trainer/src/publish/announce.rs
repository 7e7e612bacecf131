//! The stream that tells the manager of one version: where its bytes are, and its root once they are hashed.
//! The stream stays open while the bytes can be fetched here.

use std::convert::Infallible;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::address::AddressError;
use anabranch_proto::{Root, SenderOf, Version, pb};
use anabranch_transfer::checkpoint::Checkpoint;
use anabranch_transfer::directory::{ReadOptions, index_directory};
use anabranch_transfer::{FeedOrder, Publisher, Sender};
use bytes::Bytes;
use pb::publish_event::Kind as In;
use pb::publish_part::Kind as Out;
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::published::{Progress, failed};
use crate::error::{Error, Failure};
use crate::session::Session;
use crate::stream::{Attach, Link};
use crate::versions::VersionStatus;

/// Name of the call in errors and logs.
const CALL: &str = "publish";
/// Time for a receiver to accept a stream.
const DIAL_PATIENCE: Duration = Duration::from_secs(5);
/// How long a lost manager is looked for.
const LOST_AFTER: Duration = Duration::from_secs(600);
/// Kind of a version that is whole, on the wire.
const FULL: u32 = 1;

/// Gives the version with its root, or why there is none.
type Sealing = Pin<Box<dyn Future<Output = Result<Version, String>> + Send>>;

/// A version on its way to its seal.
pub(super) struct Offer {
    pub number: u64,
    /// Size of the whole version.
    pub bytes: u64,
    pub source: Source,
    /// This process has some of the chunks only.
    pub part: bool,
    pub sealing: Sealing,
}

/// Place that engines get a version from.
pub(super) enum Source {
    /// This process.
    Publisher(Arc<Publisher>),
    /// A directory, which they can read themselves.
    Directory(String),
}

/// Stream of one version.
pub(super) struct Announcement {
    source: Source,
    /// Number of this process among several senders.
    sender: Option<SenderOf>,
    /// Receivers cannot reach this process.
    dials: bool,
    number: u64,
    bytes: u64,
    epoch: u32,
    sealing: Sealing,
    sealed: Option<Version>,
    progress: watch::Sender<Progress>,
}

/// Event that wakes an announcement up.
enum Turn {
    Hashed(Result<Version, String>),
    Event(Result<Option<pb::PublishEvent>, Status>),
}

// === impl Offer ===

impl Offer {
    /// A checkpoint that engines read where it lies. Hashing begins when the offer is announced.
    pub(super) async fn in_place(
        number: u64,
        epoch: u32,
        path: &Path,
        threads: usize,
    ) -> Result<Self, Error> {
        // As engines name it: links of this host are not resolved.
        let path = std::path::absolute(path).map_err(|error| failed(number, error))?;
        let directory = path.to_str().map(str::to_owned);
        let directory = directory.ok_or_else(|| failed(number, "its path is not UTF-8"))?;
        let at = path.clone();
        let checkpoint = spawn_blocking(move || Checkpoint::open(&at)).await;
        let checkpoint = checkpoint.map_err(|error| failed(number, error))?;
        let checkpoint = checkpoint.map_err(|error| failed(number, error))?;
        let bytes = checkpoint.tensors().iter().map(|tensor| tensor.len).sum();
        let options = ReadOptions { threads, ..ReadOptions::default() };
        let sealing = Box::pin(async move {
            let indexed = spawn_blocking(move || index_directory(&path, &options)).await;
            let indexed = indexed.map_err(|error| error.to_string())?;
            let root = indexed.map_err(|error| error.to_string())?.root;
            Ok(Version { epoch, number, root })
        });
        let source = Source::Directory(directory);
        Ok(Self { number, bytes, source, part: false, sealing })
    }
}

// === impl Announcement ===

impl Announcement {
    pub(super) fn new(session: &Session, offer: Offer, progress: watch::Sender<Progress>) -> Self {
        let Offer { number, bytes, source, part, sealing } = offer;
        let config = session.config();
        let served = matches!(source, Source::Publisher(_));
        let sender = config.weights.sender.filter(|_| served);
        let sender = sender.map(|Sender { index, count }| SenderOf { index, count, part });
        let (dials, epoch) = (served && config.weights.dials, config.epoch);
        Self { source, sender, dials, number, bytes, epoch, sealing, sealed: None, progress }
    }

    /// Runs until the stream cannot go on; the owner aborts it when newer versions take the place.
    pub(super) async fn run(mut self, session: Session) {
        let mut link = Link::new(session, CALL, LOST_AFTER);
        let Err(error) = link.run(&mut self).await;
        if !matches!(error, Error::Closed) {
            let number = self.number;
            tracing::warn!(number, %error, "a version's roll-out is no longer followed");
        }
        self.progress.send_replace(Progress::Failed(why(error)));
    }

    fn begin(&self, session: u64) -> pb::PublishPart {
        let version = Version { epoch: self.epoch, number: self.number, root: Root::default() };
        let (mut addresses, directory) = match &self.source {
            Source::Publisher(_) if self.dials => (Vec::new(), String::new()),
            Source::Publisher(publisher) => (publisher.addresses(), String::new()),
            Source::Directory(path) => (Vec::new(), path.clone()),
        };
        if self.sender.is_some_and(|sender| sender.part) {
            // A part is not passed on as memory: receivers of this host take whole versions over.
            addresses.retain(|addr| !addr.is_within_host());
        }
        let begin = pb::publish_part::Begin {
            session,
            version: Some(pb::Version { root: Bytes::new(), ..version.into() }),
            kind: FULL,
            addresses: addresses.iter().map(ToString::to_string).collect(),
            directory,
            dials: self.dials,
            bytes: self.bytes,
            sender: self.sender.map(Into::into),
            ..Default::default()
        };
        pb::PublishPart { kind: Some(Out::Begin(begin)) }
    }

    async fn turn(
        &mut self,
        turn: Turn,
        out: &mpsc::Sender<pb::PublishPart>,
        link: &mut Link,
    ) -> Result<(), Failure> {
        let lost = |why: &str| Failure::Transport(why.into());
        match turn {
            Turn::Hashed(sealed) => {
                let version = sealed.map_err(|why| Failure::Final(failed(self.number, why)))?;
                self.sealed = Some(version);
                out.send(seal(version)).await.map_err(|_| lost("the stream ended"))
            }
            Turn::Event(Ok(Some(event))) => {
                link.heard();
                self.event(event)
            }
            Turn::Event(Ok(None)) => Err(lost("the manager ended the stream")),
            Turn::Event(Err(status)) => Err(Failure::of(CALL, &status)),
        }
    }

    fn event(&self, event: pb::PublishEvent) -> Result<(), Failure> {
        match (event.kind, self.sealed) {
            (Some(In::Status(status)), Some(version)) => {
                let status = VersionStatus::from_wire(status)
                    .map_err(|what| Failure::Final(Error::Protocol { call: CALL, what }))?;
                self.progress.send_replace(Progress::Rolling(version, status));
            }
            (Some(In::Dial(dial)), _) => self.dial(dial),
            (Some(In::Sealed(_)), Some(version)) => {
                self.progress.send_if_modified(|progress| {
                    let first = *progress == Progress::Hashing;
                    if first {
                        *progress = Progress::Sealed(version);
                    }
                    first
                });
            }
            _ => {}
        }
        Ok(())
    }

    /// Dials a receiver that shall fetch from here and cannot reach this process.
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
}

impl Attach for Announcement {
    type Done = Infallible;

    async fn attach(&mut self, link: &mut Link) -> Result<Infallible, Failure> {
        let (mut rpc, opened) = link.begin().await;
        if let Source::Publisher(publisher) = &self.source {
            // A session that was opened again has a key of its own.
            publisher.set_serve_key(opened.serve_key);
        }
        let (out, messages) = mpsc::channel(2);
        out.try_send(self.begin(opened.id.0)).expect("a new channel has room");
        if let Some(version) = self.sealed {
            out.try_send(seal(version)).expect("two messages were made room for");
        }
        let reply = rpc.publish(ReceiverStream::new(messages)).await;
        let reply = reply.map_err(|status| Failure::of(CALL, &status))?;
        let mut events: Streaming<pb::PublishEvent> = reply.into_inner();
        loop {
            let turn = tokio::select! {
                sealed = &mut self.sealing, if self.sealed.is_none() => Turn::Hashed(sealed),
                event = events.message() => Turn::Event(event),
            };
            self.turn(turn, &out, link).await?;
        }
    }
}

fn seal(version: Version) -> pb::PublishPart {
    let root = Bytes::copy_from_slice(&version.root.0);
    pb::PublishPart { kind: Some(Out::Seal(pb::publish_part::Seal { root })) }
}

/// Reason alone: the handle names the version itself.
fn why(error: Error) -> String {
    match error {
        Error::Publish { why, .. } => why,
        error => error.to_string(),
    }
}
