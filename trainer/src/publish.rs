//! Publishing weights: the snapshot goes into the arena, its chunks are served from here, and one
//! stream per version tells the manager where they are for as long as they are there. Moving the bytes
//! is the transfer crate's.
//!
//! ```text
//!   Sealing ── hashes made ──► Sealed{version} ── manager knows ──► Announced{version} ── its news ──► Rolling{status}
//!      └───────────────┴── refused, or given up ──► Failed{why}
//! ```

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_proto::Version;
use anabranch_proto::manifest::DType;
use anabranch_transfer::checkpoint::Checkpoint;
use anabranch_transfer::directory::{ReadOptions, index_directory};
use anabranch_transfer::{
    LinkKind, PublishError, Publisher, PublisherConfig, Publishing, PublishingPart, Sender,
    ShmArena, TensorRef,
};
use bytes::Bytes;
use tokio::sync::{Mutex, watch};
use tokio::task::{JoinSet, spawn_blocking};

use crate::announce::{Announcement, Offer, Source};
use crate::error::Error;
use crate::job::Job;
use crate::versions::{VersionState, VersionStatus};

/// One tensor as engines shall load it: their names, their dtype.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    /// Row-major, little endian.
    pub data: Bytes,
}

/// Where this process serves its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightServer {
    /// Default: a free port, on loopback where the manager is there, else on the address that faces it.
    pub listen: Option<SocketAddr>,
    /// HOST or HOST:PORT that receivers shall dial, where it is not the one listened on.
    pub advertise: Vec<String>,
    /// How, best first. Empty: tcp (in the clear) on loopback, tls anywhere else.
    pub links: Vec<LinkKind>,
    /// Receivers cannot reach this process: it dials them. They need a listener (an agent's or a relay's
    /// `--listen`).
    pub dials: bool,
    /// Threads that hash a version. Default 1.
    pub hash_threads: usize,
    /// Only one version will be published: no memory is got for a second before it comes.
    pub single: bool,
    /// How engines of this host get at the weights. Default [`Shm::Auto`].
    pub shm: Shm,
    /// Also write each version into this directory of a shared file system, for engines that reach no
    /// socket of this process, or outlive it. They must see it under the same path.
    pub export: Option<PathBuf>,
    /// This process is one of several that publish each version of the job together, each from its own host
    /// or NIC: with all of the tensors ([`Job::publish`] and the like) or with a part ([`Job::publish_part`]).
    pub sender: Option<Sender>,
}

/// Whether receivers of this host take the memory over instead of copying it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Shm {
    /// Where /dev/shm has room for it: else versions lie in anonymous memory and engines get copies.
    #[default]
    Auto,
    /// As `Auto`, for one of several processes that publish for the job from this host: those of another
    /// scope do not count as the same trainer.
    AutoAt {
        scope: String,
    },
    /// In this directory of a tmpfs, or it is an error.
    At(PathBuf),
    Off,
}

/// A version whose snapshot was taken. Dropping this changes nothing: the roll-out goes on.
#[derive(Clone, Debug)]
pub struct Published {
    pub number: u64,
    pub bytes: u64,
    /// How long the trainer was kept.
    pub copied_in: Duration,
    progress: watch::Receiver<Progress>,
}

#[derive(Clone, Debug)]
pub(crate) enum Progress {
    Sealing,
    Sealed(Version),
    Announced(Version),
    Rolling(Version, VersionStatus),
    Failed(String),
}

pub(crate) enum Weights {
    Tensors(Vec<NamedTensor>),
    Directory(PathBuf),
}

/// Announced versions that are followed, as the arena keeps two.
const KEPT: usize = 2;

/// All versions that this job published and still serves.
#[derive(Default)]
pub(crate) struct Publications {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    publisher: Option<Arc<Publisher>>,
    /// One announcing task per version; at most two, as the arena has two slots.
    announced: VecDeque<JoinSet<()>>,
}

// === impl Publications ===

impl Publications {
    pub(crate) async fn publish(
        &self,
        job: &Job,
        number: u64,
        weights: Weights,
    ) -> Result<Published, Error> {
        check_number(number)?;
        let mut state = self.state.lock().await;
        let publisher = state.publisher(job).await?;
        // The new version takes the older slot: that one can no longer be fetched here.
        while state.announced.len() > 1 {
            state.announced.pop_front();
        }
        let writer = publisher.clone();
        let publishing = tokio::task::spawn_blocking(move || weights.write(&writer, number))
            .await
            .map_err(|error| failed(number, error))?
            .map_err(|error| failed(number, error))?;
        let (bytes, copied_in) = (publishing.bytes, publishing.copied_in);
        let sealing = async {
            let sealed = publishing.sealed().await;
            sealed.map(|p| p.version).map_err(|error| error.to_string())
        };
        let source = Source::Publisher(publisher);
        let offer = Offer { number, bytes, source, part: false, sealing: Box::pin(sealing) };
        Ok(state.follow(job, offer, copied_in))
    }

    /// Copies a part; nobody is told of it before it is sealed.
    pub(crate) async fn publish_part(
        &self,
        job: &Job,
        number: u64,
        write: impl FnOnce(&Publisher) -> Result<PublishingPart, PublishError> + Send + 'static,
    ) -> Result<PublishingPart, Error> {
        check_number(number)?;
        let mut state = self.state.lock().await;
        let publisher = state.publisher(job).await?;
        while state.announced.len() > 1 {
            state.announced.pop_front();
        }
        let written = spawn_blocking(move || write(&publisher)).await;
        written.map_err(|error| failed(number, error))?.map_err(|error| failed(number, error))
    }

    /// Of a part that this process lends from now on.
    pub(crate) async fn publish_sealed(
        &self,
        job: &Job,
        version: Version,
        bytes: u64,
        copied_in: Duration,
    ) -> Result<Published, Error> {
        let mut state = self.state.lock().await;
        let source = Source::Publisher(state.publisher(job).await?);
        let sealing = Box::pin(std::future::ready(Ok(version)));
        let offer = Offer { number: version.number, bytes, source, part: true, sealing };
        Ok(state.follow(job, offer, copied_in))
    }

    /// Nothing is copied or served: engines read the directory.
    pub(crate) async fn publish_in_place(
        &self,
        job: &Job,
        number: u64,
        path: &Path,
    ) -> Result<Published, Error> {
        check_number(number)?;
        // As engines name it: links of this host are not resolved.
        let path = std::path::absolute(path).map_err(|error| failed(number, error))?;
        let directory = path.to_str().map(str::to_owned);
        let directory = directory.ok_or_else(|| failed(number, "its path is not UTF-8"))?;
        let started = Instant::now();
        let at = path.clone();
        let checkpoint = spawn_blocking(move || Checkpoint::open(&at)).await;
        let checkpoint = checkpoint.map_err(|error| failed(number, error))?;
        let checkpoint = checkpoint.map_err(|error| failed(number, error))?;
        let bytes = checkpoint.tensors().iter().map(|tensor| tensor.len).sum();
        let options = ReadOptions {
            threads: job.config().weights.hash_threads.max(1),
            ..ReadOptions::default()
        };
        let epoch = job.config().epoch;
        let sealing = async move {
            let indexed = spawn_blocking(move || index_directory(&path, &options)).await;
            let indexed = indexed.map_err(|error| error.to_string())?;
            let root = indexed.map_err(|error| error.to_string())?.root;
            Ok(Version { epoch, number, root })
        };
        let source = Source::Directory(directory);
        let mut state = self.state.lock().await;
        let offer = Offer { number, bytes, source, part: false, sealing: Box::pin(sealing) };
        Ok(state.follow(job, offer, started.elapsed()))
    }

    /// Stops serving.
    pub(crate) async fn close(&self) {
        *self.state.lock().await = State::default();
    }
}

fn check_number(number: u64) -> Result<(), Error> {
    match number {
        0 => Err(failed(number, "number 0 means the engines' start-up weights; count from 1")),
        _ => Ok(()),
    }
}

pub(crate) fn failed(number: u64, error: impl ToString) -> Error {
    Error::Publish { number, why: error.to_string() }
}

impl State {
    /// Tells the manager, and goes on telling it until newer versions take the place.
    fn follow(&mut self, job: &Job, offer: Offer, copied_in: Duration) -> Published {
        let (progress, seen) = watch::channel(Progress::Sealing);
        let (number, bytes) = (offer.number, offer.bytes);
        let mut task = JoinSet::new();
        task.spawn(Announcement::new(job, offer, progress).run());
        self.announced.push_back(task);
        while self.announced.len() > KEPT {
            self.announced.pop_front();
        }
        Published { number, bytes, copied_in, progress: seen }
    }

    /// Started at the first publication: a trainer that publishes nothing listens nowhere.
    async fn publisher(&mut self, job: &Job) -> Result<Arc<Publisher>, Error> {
        let key = job.session().await.serve_key;
        if let Some(publisher) = &self.publisher {
            publisher.set_serve_key(key);
            return Ok(publisher.clone());
        }
        let config = publisher_config(job)?;
        let publisher = Publisher::start(config).map_err(|error| failed(0, error))?;
        publisher.set_serve_key(key);
        Ok(self.publisher.insert(Arc::new(publisher)).clone())
    }
}

fn publisher_config(job: &Job) -> Result<PublisherConfig, Error> {
    let config = job.config();
    let WeightServer { listen, advertise, links, dials, hash_threads, single, shm, export, sender } =
        config.weights.clone();
    let listen = match listen {
        None if dials => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        Some(listen) => listen,
        None => SocketAddr::new(job.client().facing_address()?, 0),
    };
    if listen.ip().is_unspecified() && advertise.is_empty() && !dials {
        return Err(Error::Invalid(format!(
            "weights are served on {listen}, which no receiver can dial: name addresses to advertise"
        )));
    }
    let hash_threads = hash_threads.max(1);
    let shm = match (shm, sender) {
        // Several senders may well be on one host.
        (Shm::Auto, Some(Sender { index, .. })) => {
            let scope = format!("{} sender {index}", job.client().manager());
            Shm::AutoAt { scope }
        }
        (shm, _) => shm,
    };
    let shm = match shm {
        Shm::Auto => Some(ShmArena::of_job(&config.job, job.client().manager())),
        Shm::AutoAt { scope } => Some(ShmArena::of_job(&config.job, &scope)),
        Shm::At(dir) => Some(ShmArena { dir, required: true }),
        Shm::Off => None,
    };
    let base = PublisherConfig::loopback(&config.job, config.epoch);
    Ok(PublisherConfig { listen, advertise, links, hash_threads, single, shm, export, ..base })
}

// === impl Weights ===

impl Weights {
    /// Blocks for the copy.
    fn write(self, publisher: &Publisher, number: u64) -> Result<Publishing, PublishError> {
        match self {
            Weights::Directory(path) => publisher.publish_directory(number, &path),
            Weights::Tensors(tensors) => {
                let tensors: Vec<TensorRef<'_>> = tensors.iter().map(NamedTensor::borrow).collect();
                publisher.publish(number, &tensors)
            }
        }
    }
}

impl NamedTensor {
    fn borrow(&self) -> TensorRef<'_> {
        TensorRef { name: &self.name, dtype: self.dtype, shape: &self.shape, data: &self.data }
    }
}

impl Default for WeightServer {
    fn default() -> Self {
        Self {
            listen: None,
            advertise: Vec::new(),
            links: Vec::new(),
            dials: false,
            hash_threads: 1,
            single: false,
            shm: Shm::Auto,
            export: None,
            sender: None,
        }
    }
}

/// The address of this host that a connection to `to` would come from.
pub(crate) fn address_facing(to: SocketAddr) -> std::io::Result<IpAddr> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    // Connecting a UDP socket sends nothing; it only picks the route.
    let socket = std::net::UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

// === impl Published ===

impl Published {
    /// Waits until all is hashed: from then on engines may load it.
    pub async fn sealed(&self) -> Result<Version, Error> {
        let done = |p: &Progress| match p {
            Progress::Sealing => None,
            Progress::Sealed(version)
            | Progress::Announced(version)
            | Progress::Rolling(version, _) => Some(Ok(*version)),
            Progress::Failed(why) => Some(Err(why.clone())),
        };
        self.wait(done).await
    }

    /// Waits until the manager knows that engines may load it. From then on a version that is loaded in
    /// place needs this process no more.
    pub async fn announced(&self) -> Result<Version, Error> {
        let done = |p: &Progress| match p {
            Progress::Sealing | Progress::Sealed(_) => None,
            Progress::Announced(version) | Progress::Rolling(version, _) => Some(Ok(*version)),
            Progress::Failed(why) => Some(Err(why.clone())),
        };
        self.wait(done).await
    }

    /// Waits until every live engine that should have it is active, or a newer version took its place
    /// (the state says which).
    pub async fn settled(&self) -> Result<VersionStatus, Error> {
        let over = |s: &VersionStatus| {
            s.settled || matches!(s.state, VersionState::Superseded | VersionState::Retired)
        };
        let done = |p: &Progress| match p {
            Progress::Rolling(_, status) if over(status) => Some(Ok(status.clone())),
            Progress::Failed(why) => Some(Err(why.clone())),
            _ => None,
        };
        self.wait(done).await
    }

    /// The manager's newest word on the roll-out.
    pub fn status(&self) -> Option<VersionStatus> {
        match &*self.progress.borrow() {
            Progress::Rolling(_, status) => Some(status.clone()),
            _ => None,
        }
    }

    /// Waits for news since the last call, for those who show progress.
    pub async fn changed(&mut self) -> Result<Option<VersionStatus>, Error> {
        let given_up = || failed(self.number, GIVEN_UP);
        self.progress.changed().await.map_err(|_| given_up())?;
        match &*self.progress.borrow_and_update() {
            Progress::Rolling(_, status) => Ok(Some(status.clone())),
            Progress::Failed(why) => Err(failed(self.number, why)),
            Progress::Sealing | Progress::Sealed(_) | Progress::Announced(_) => Ok(None),
        }
    }

    async fn wait<T>(
        &self,
        done: impl Fn(&Progress) -> Option<Result<T, String>>,
    ) -> Result<T, Error> {
        let mut progress = self.progress.clone();
        let reached = progress.wait_for(|p| done(p).is_some()).await;
        let outcome = match reached {
            Ok(progress) => done(&progress),
            Err(_) => None,
        };
        outcome
            .unwrap_or_else(|| Err(GIVEN_UP.into()))
            .map_err(|why| Error::Publish { number: self.number, why })
    }
}

const GIVEN_UP: &str = "newer versions took its place in the arena, or the job was closed";
