//! Versions on this host: fetches them into staging, checks them against the engine's layout, keeps
//! what the engine may still read, and serves peers. Knows no engine calls.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use anabranch_proto::address::{Address, AddressError};
use anabranch_proto::{Version, pb};
use anabranch_transfer::checkpoint::{Baseline, Checkpoint};
use anabranch_transfer::directory::{DirectoryStamp, ReadOptions, verify_directory};
use anabranch_transfer::{
    FetchProgress, FetchRequest, Holder, Listen, Listener, ServeError, SourceRef, StageError,
    Staging,
};
use tokio_util::sync::CancellationToken;

use crate::core::{FetchOrder, Moved, StagedVersion};

mod data_plane;
mod layout;

use data_plane::DataPlane;
use layout::{Table, fits, image_bytes, table_of, table_of_manifest};

/// Callback with the bytes moved so far, called about ten times a second.
pub type Progress = Arc<dyn Fn(Moved) + Send + Sync>;

/// Versions of weights on this host.
pub struct Weights {
    staging: Staging,
    /// Socket for agents of this host, and the name of this host; `None` if memory is not passed.
    sharing: Option<(PathBuf, String)>,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Connections to peers; closed until the manager says which job this is.
    data_plane: DataPlane,
    /// Layout of the engine's tensors; `None` until the first loaded version tells.
    baseline: Option<Table>,
    /// Versions that the engine serves, loads, or may have to go back to, by directory.
    kept: BTreeMap<PathBuf, anabranch_transfer::Staged>,
    serving: Option<PathBuf>,
    /// Stamp of a shared directory at its last verification.
    verified: Option<DirectoryStamp>,
}

/// Reason why the staging area or the listener cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error(transparent)]
    Listen(#[from] ServeError),
}

/// Parallel streams of a fetch without a plan; more help only if one TCP stream does not fill the
/// path.
const STREAMS: usize = 4;
/// Most parallel streams of a fetch: each is a thread here and one at the source.
const MOST_STREAMS: usize = 64;

impl Weights {
    /// Opens the staging area under `shm`. `name` must be the agent's own on this host: a second
    /// agent of that name is refused.
    pub fn open(
        shm: &Path,
        name: &str,
        listen: Option<&Listen>,
        share: bool,
    ) -> Result<Weights, WeightsError> {
        let staging = Staging::open(shm, name)?;
        let inner = Inner {
            data_plane: DataPlane::Reserved { listener: listen.map(Listener::bind).transpose()? },
            baseline: None,
            kept: BTreeMap::new(),
            serving: None,
            verified: None,
        };
        let sharing = if share { staging.sharing() } else { None };
        Ok(Weights { staging, sharing, inner: Mutex::new(inner) })
    }

    /// Addresses where peers fetch from this agent, best first; empty if the agent serves nothing.
    pub fn addresses(&self) -> Vec<Address> {
        let abroad = self.lock().data_plane.addresses();
        let here = self.sharing.as_ref().map(|(socket, _)| Address::Shm(socket.clone()));
        here.into_iter().chain(abroad).collect()
    }

    /// Name of this host, equal for all agents that can pass memory to each other; empty if memory
    /// is not passed.
    pub fn host(&self) -> String {
        self.sharing.as_ref().map(|(_, host)| host.clone()).unwrap_or_default()
    }

    /// Opens the data plane, and checks grants of peers with `key`. The key alone says who may read: the manager gives one for
    /// each session, and jobs may follow each other within a session.
    pub fn serve(&self, key: &[u8]) {
        let mut inner = self.lock();
        if let DataPlane::Reserved { listener } = &mut inner.data_plane {
            let listener = listener.take();
            let socket = self.sharing.as_ref().map(|(socket, _)| socket.as_path());
            inner.data_plane = DataPlane::open(listener, socket, &self.staging);
        }
        let DataPlane::Open { holder, .. } = &inner.data_plane else { return };
        match key.try_into() {
            Ok(key) => holder.set_key(key),
            Err(_) if key.is_empty() => {}
            Err(_) => tracing::warn!(bytes = key.len(), "ignored a serve key that is not 32 bytes"),
        }
    }

    /// Takes the layout of a new engine process from its own files, if this host can read them.
    pub fn engine_started(&self, model_directory: Option<&Path>) {
        let table = model_directory.and_then(|directory| match Checkpoint::open(directory) {
            Ok(checkpoint) => Some(table_of(&checkpoint)),
            Err(error) => {
                tracing::warn!(%error, "the engine's start-up weights cannot be read here: the first loaded version sets names, shapes and dtypes");
                None
            }
        });
        let mut inner = self.lock();
        inner.kept.clear();
        inner.serving = None;
        if let Some(table) = &table
            && let Err(error) = self.staging.check_space(image_bytes(table))
        {
            tracing::warn!(%error, "weight updates will not fit");
        }
        inner.baseline = table.or(inner.baseline.take());
    }

    /// Brings the ordered version to this host, verified and fitting. The engine is not told
    /// anything.
    pub async fn fetch(
        &self,
        order: &FetchOrder,
        progress: Progress,
        cancel: CancellationToken,
    ) -> Result<StagedVersion, String> {
        match &order.directory {
            Some(directory) => {
                self.verify_directory(directory.clone(), order.version, progress, cancel).await
            }
            None => self.pull(order, progress, cancel).await,
        }
    }

    /// Fetches from sources into staging.
    async fn pull(
        &self,
        order: &FetchOrder,
        progress: Progress,
        cancel: CancellationToken,
    ) -> Result<StagedVersion, String> {
        let (fetcher, holder, baseline) = {
            let inner = &mut *self.lock();
            inner.verified = None;
            // Versions of earlier orders that the engine did not take are let go.
            inner.kept.retain(|directory, _| Some(directory) == inner.serving.as_ref());
            let DataPlane::Open { fetcher, holder, .. } = &inner.data_plane else {
                return Err("not attached to a manager yet".to_owned());
            };
            (fetcher.clone(), holder.clone(), inner.baseline.clone())
        };
        let version = order.version;
        let request = FetchRequest {
            version,
            sources: sources(&order.sources),
            streams: match order.streams as usize {
                0 => STREAMS,
                planned => planned.min(MOST_STREAMS),
            },
            stripe_count: order.stripe_count,
            baseline: baseline.map(|table| {
                let tensors = table.into_iter().map(|(name, (dtype, shape))| (name, dtype, shape));
                Arc::new(Baseline::from_tensors(tensors))
            }),
            progress: Some(Arc::new(move |at| progress(moved(at, &holder, version)))),
            cancel,
        };
        let staged = fetcher.fetch(request).await.map_err(|error| error.to_string())?;
        let report = &staged.report;
        let seconds = report.took.as_secs_f64().max(1e-6);
        tracing::info!(
            version = %staged.version,
            bytes = report.bytes,
            carried_bytes = report.carried_bytes,
            took_ms = report.took.as_millis() as u64,
            mib_per_s = (report.bytes as f64 / seconds / f64::from(1 << 20)) as u64,
            "fetched"
        );
        let told = StagedVersion {
            directory: staged.dir().to_owned(),
            bytes: report.bytes,
            from: report.bytes_by_holder.iter().cloned().collect(),
            holds: !self.addresses().is_empty(),
        };
        self.lock().kept.insert(told.directory.clone(), staged);
        Ok(told)
    }

    /// Verifies every byte of a shared directory; nothing is copied.
    async fn verify_directory(
        &self,
        directory: PathBuf,
        version: Version,
        progress: Progress,
        cancel: CancellationToken,
    ) -> Result<StagedVersion, String> {
        let baseline = self.lock().baseline.clone();
        let told = move |bytes| progress(Moved { bytes, ..Moved::default() });
        let options = ReadOptions { threads: 0, cancel, progress: Some(Arc::new(told)) };
        let at = directory.clone();
        let verify = move || {
            fits(&at, baseline.as_ref())?;
            verify_directory(&at, version, &options).map_err(|error| error.to_string())
        };
        let verified = tokio::task::spawn_blocking(verify).await;
        let verified = verified.map_err(|error| error.to_string())??;
        self.lock().verified = Some(verified.stamp);
        let bytes = verified.manifest.image_bytes;
        Ok(StagedVersion { directory, bytes, from: BTreeMap::new(), holds: false })
    }

    /// Checks after a load that the engine read what was verified before.
    pub fn loaded_as_verified(&self) -> Result<(), String> {
        let verified = self.lock().verified.take();
        verified.map_or(Ok(()), |stamp| stamp.check()).map_err(|error| error.to_string())
    }

    /// Keeps `directory`, which the engine serves now; memory of all other versions may be used
    /// again.
    pub fn keep(&self, version: Version, directory: &Path) {
        let mut inner = self.lock();
        let gone: Vec<Version> = inner
            .kept
            .iter()
            .filter(|(dir, _)| *dir != directory)
            .map(|(_, staged)| staged.version)
            .collect();
        inner.kept.retain(|dir, _| dir == directory);
        inner.serving = Some(directory.to_owned());
        if inner.baseline.is_none() {
            let manifest = inner.kept.get(directory).map(|staged| staged.manifest().clone());
            inner.baseline = match manifest {
                Some(manifest) => Some(table_of_manifest(&manifest)),
                None => Checkpoint::open(directory).ok().as_ref().map(table_of),
            };
        }
        tracing::debug!(%version, released = gone.len(), "staging kept for the engine");
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no code panics while it holds this lock")
    }
}

/// Progress as the core counts it.
fn moved(at: FetchProgress, holder: &Holder, version: Version) -> Moved {
    let served_bytes = holder.held(version).map_or(0, |held| held.sent_bytes());
    Moved { bytes: at.bytes, received_bytes: at.received_bytes, served_bytes }
}

/// Sources by holder, each with all its addresses.
fn sources(orders: &[pb::Source]) -> Vec<SourceRef> {
    let mut sources: Vec<SourceRef> = Vec::new();
    for order in orders {
        let addr = address(order);
        match sources.iter_mut().find(|s| s.holder == order.holder) {
            Some(known) => known.addrs.extend(addr),
            None => sources.push(SourceRef {
                holder: order.holder.clone(),
                addrs: addr.into_iter().collect(),
                grant: order.grant.to_vec(),
                stripes: order.stripes.clone(),
                fallback_for: order.fallback_for.clone(),
                origin: order.origin.clone(),
            }),
        }
    }
    sources
}

/// Address of the holder; `None`, with a warning, if this version of the agent cannot reach it.
fn address(order: &pb::Source) -> Option<Address> {
    if order.dial() == pb::source::Dial::Source {
        return Some(Address::Feed(order.holder.clone()));
    }
    let refused = |error: &AddressError| {
        tracing::warn!(holder = order.holder, %error, "a holder of weights is not dialled there");
    };
    order.addr.parse().inspect_err(refused).ok()
}
