//! Publishing weights: the snapshot goes into the arena, its chunks are served from here, and one
//! stream per version tells the manager where they are for as long as they are there. Moving the bytes
//! is the transfer crate's.
//!
//! ```text
//!   Sealing ── hashes made ──► Sealed{version} ── manager's news ──► Rolling{status}
//!      └───────────────┴── refused, or given up ──► Failed{why}
//! ```

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::Version;
use anabranch_proto::manifest::DType;
use anabranch_transfer::{
    LinkKind, PublishError, Publisher, PublisherConfig, Publishing, TensorRef,
};
use bytes::Bytes;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;

use crate::announce::Announcement;
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
    Rolling(Version, VersionStatus),
    Failed(String),
}

pub(crate) enum Weights {
    Tensors(Vec<NamedTensor>),
    Directory(PathBuf),
}

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
        if number == 0 {
            let why = "number 0 means the engines' start-up weights; count from 1".into();
            return Err(Error::Publish { number, why });
        }
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
        let (progress, seen) = watch::channel(Progress::Sealing);
        let published = Published {
            number,
            bytes: publishing.bytes,
            copied_in: publishing.copied_in,
            progress: seen,
        };
        let announcement = Announcement::new(job, publisher, publishing, progress);
        let mut task = JoinSet::new();
        task.spawn(announcement.run());
        state.announced.push_back(task);
        Ok(published)
    }

    /// Stops serving.
    pub(crate) async fn close(&self) {
        *self.state.lock().await = State::default();
    }
}

fn failed(number: u64, error: impl ToString) -> Error {
    Error::Publish { number, why: error.to_string() }
}

impl State {
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
    let WeightServer { listen, advertise, links, dials, hash_threads } = config.weights.clone();
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
    let base = PublisherConfig::loopback(&config.job, config.epoch);
    Ok(PublisherConfig { listen, advertise, links, hash_threads, ..base })
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
            Progress::Sealed(version) | Progress::Rolling(version, _) => Some(Ok(*version)),
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
            Progress::Sealing | Progress::Sealed(_) => Ok(None),
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
