//! The trainer's API: a version is copied into shared memory, then hashed, sealed and lent in the
//! background. Never waits for a receiver. Owns the server, the arena and the sealing threads.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anabranch_proto::address::Address;
use anabranch_proto::grant::ServeKey;
use anabranch_proto::manifest::{DEFAULT_CHUNK_BYTES, DType, Manifest};
use anabranch_proto::version::Version;
use tokio::sync::oneshot;

use crate::image::checkpoint::{Checkpoint, CheckpointError, StoredTensor};
use crate::image::layout::{Layout, LayoutError, TensorSpec};
use crate::memory::home::{Home, ShmArena};
use crate::send::arena::{Arena, ArenaError, Begun, Sealer, SlotWriter};
use crate::send::export::{Export, ExportError};
use crate::send::holder::{Held, Holder};
use crate::send::listen::{LinkKind, Listen, Listener, ServeError};
use crate::send::serve::{ServeLimits, Server};

mod offer;
mod part;

use offer::Offers;
pub use part::{Part, PartError, PartInfo, PartInfoError, PieceRef, PublishingPart, Sender};

#[derive(Clone, Debug)]
pub struct PublisherConfig {
    pub job: String,
    pub epoch: u32,
    /// Where receivers connect; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Addresses that receivers should dial, if not the one listened on (host or host:port).
    pub advertise: Vec<String>,
    /// How the weights go out, best first; empty: tcp on loopback, tls anywhere else.
    pub links: Vec<LinkKind>,
    pub chunk_bytes: u32,
    /// Threads that hash a published version and code its delta.
    pub hash_threads: usize,
    /// Also offer each version as a delta to the one before, and as a chain of deltas to older ones.
    pub delta: bool,
    /// Only one version will be published: no memory is got for a second before it comes.
    pub single: bool,
    /// Give the memory names, so that receivers of this host take it over instead of copying it.
    pub shm: Option<ShmArena>,
    /// Also write each version into this directory of a shared file system: `file:` receivers read it
    /// there, while this process lives and after.
    pub export: Option<PathBuf>,
    /// The newest so many stay in it.
    pub export_keep: usize,
    pub limits: ServeLimits,
}

/// A tensor in the trainer's memory, in the engine's dtype.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    pub name: &'a str,
    pub dtype: DType,
    pub shape: &'a [u64],
    pub data: &'a [u8],
}

pub struct Publisher {
    server: Server,
    config: PublisherConfig,
    arena: Arena,
    export: Option<Arc<Export>>,
    /// One publish at a time.
    publishing: Mutex<()>,
    last: Arc<Mutex<Last>>,
    offers: Arc<Offers>,
}

/// What later versions are compared with.
#[derive(Default)]
struct Last {
    number: Option<u64>,
    sealed: Option<(Version, Arc<Manifest>)>,
}

/// A version that is in the arena; its hashes are still being made.
#[derive(Debug)]
pub struct Publishing {
    pub number: u64,
    pub bytes: u64,
    /// How long the trainer was kept: the copy.
    pub copied_in: Duration,
    /// Streams that were reading the version whose memory this one took.
    pub revoked_streams: u32,
    /// Versions whose memory was left to engines and receivers of this host that still use it.
    pub left_in_use: u32,
    sealed: oneshot::Receiver<Published>,
}

/// A version that receivers can fetch.
#[derive(Clone, Debug)]
pub struct Published {
    pub version: Version,
    pub manifest: Arc<Manifest>,
    pub bytes: u64,
    /// Size of the delta to the version before, if there is one.
    pub delta_bytes: Option<u64>,
    pub copied_in: Duration,
    /// From the start of the copy until all was hashed, the delta coded and the export written.
    pub sealed_in: Duration,
    /// Where it was exported to, or why it was not: it is served all the same.
    pub export: Option<Result<PathBuf, Arc<ExportError>>>,
    held: Arc<Held>,
}

#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("version {number}: {error}")]
    Layout { number: u64, error: LayoutError },
    #[error(transparent)]
    Arena(#[from] ArenaError),
    #[error(
        "version {number} after {last}: numbers grow within epoch {epoch}; a restarted trainer opens a new epoch"
    )]
    Regression { number: u64, last: u64, epoch: u32 },
    #[error("tensor `{name}`: {have} bytes given, its shape and dtype need {want}")]
    Data { name: String, have: u64, want: u64 },
    #[error(
        "{len} bytes at {offset} of tensor `{name}`, which has {of} bytes in the version's layout"
    )]
    Piece { name: String, offset: u64, len: u64, of: u64 },
    #[error("the same bytes of tensor `{name}` are given twice")]
    Twice { name: String },
    #[error(
        "version {number}: a part of a version cannot be exported; switch the export off, or let a sender that \
         has all of it write it"
    )]
    PartExport { number: u64 },
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error("version {number}: {error}")]
    Checkpoint { number: u64, error: CheckpointError },
    #[error("version {number} was given up before it was sealed")]
    Abandoned { number: u64 },
    #[error("cannot start the sealing thread: {0}")]
    Thread(std::io::Error),
}

// === impl PublisherConfig ===

impl PublisherConfig {
    /// Loopback, any port, one hashing thread.
    pub fn loopback(job: &str, epoch: u32) -> PublisherConfig {
        PublisherConfig {
            job: job.to_owned(),
            epoch,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: Vec::new(),
            links: Vec::new(),
            chunk_bytes: DEFAULT_CHUNK_BYTES,
            hash_threads: 1,
            delta: true,
            single: false,
            shm: None,
            export: None,
            export_keep: 2,
            limits: ServeLimits::default(),
        }
    }
}

// === impl Publisher ===

impl Publisher {
    pub fn start(config: PublisherConfig) -> Result<Publisher, PublishError> {
        let holder = Holder::new(&config.job);
        let home = config.shm.as_ref().map(|at| Home::open(at, &config.job)).transpose();
        let home = home.map_err(ArenaError::Home)?.flatten();
        let socket = home.as_ref().map(Home::socket);
        let arena = Arena::new(holder.clone(), config.chunk_bytes, home)?;
        let export = config.export.as_deref();
        let export = export.map(|dir| Export::open(dir, config.export_keep, &config.job));
        let export = export.transpose()?.map(Arc::new);
        let (links, advertise) = (config.links.clone(), config.advertise.clone());
        let listener = Listener::bind(&Listen { at: config.listen, links, advertise })?;
        let mut server = Server::serve(listener, holder, config.limits.clone())?;
        socket.map_or(Ok(()), |socket| server.listen_locally(&socket))?;
        let (publishing, last, offers) = (Mutex::default(), Arc::default(), Arc::default());
        Ok(Publisher { server, config, arena, export, publishing, last, offers })
    }

    /// The key that the manager gave: without one, nobody can read.
    pub fn set_serve_key(&self, key: ServeKey) {
        self.server.holder().set_key(key);
    }

    /// Where receivers find the versions, best first.
    pub fn addresses(&self) -> Vec<Address> {
        let exported = self.export.iter().map(|export| export.address());
        let local = self.server.local_address().into_iter();
        local.chain(self.server.addresses()).chain(exported).collect()
    }

    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Copies the tensors and returns; hashing goes on behind. Blocks for the copy only (and for the
    /// hashes of the version before, if those are not done yet).
    pub fn publish(
        &self,
        number: u64,
        tensors: &[TensorRef<'_>],
    ) -> Result<Publishing, PublishError> {
        let spec = |t: &TensorRef<'_>| TensorSpec {
            name: t.name.to_owned(),
            dtype: t.dtype,
            shape: t.shape.to_vec(),
        };
        let layout = self.layout(number, tensors.iter().map(spec).collect())?;
        let mut by_place: Vec<&TensorRef<'_>> = tensors.iter().collect();
        for (ix, t) in tensors.iter().enumerate() {
            let (have, want) = (t.data.len() as u64, layout.tensor(ix).len);
            if have != want {
                return Err(PublishError::Data { name: t.name.to_owned(), have, want });
            }
        }
        by_place.sort_by_key(|t| std::cmp::Reverse(t.dtype.bytes()));
        self.write(number, layout, |at, out| {
            out.copy_from_slice(by_place[at].data);
            Ok(())
        })
    }

    /// Publishes a safetensors directory, sharded or not.
    pub fn publish_directory(&self, number: u64, dir: &Path) -> Result<Publishing, PublishError> {
        let failed = |error| PublishError::Checkpoint { number, error };
        let checkpoint = Checkpoint::open(dir).map_err(failed)?;
        let (stored, layout) = self.stored(number, &checkpoint)?;
        self.write(number, layout, |at, out| checkpoint.read_into(stored[at], out).map_err(failed))
    }

    /// A checkpoint's tensors in the order of their places.
    fn stored<'a>(
        &self,
        number: u64,
        checkpoint: &'a Checkpoint,
    ) -> Result<(Vec<&'a StoredTensor>, Layout), PublishError> {
        let mut stored: Vec<_> = checkpoint.tensors().iter().collect();
        stored.sort_by_key(|t| std::cmp::Reverse(t.dtype.bytes()));
        let specs = stored.iter().map(|t| TensorSpec {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
        });
        let layout = self.layout(number, specs.collect())?;
        Ok((stored, layout))
    }

    fn check_newer(&self, number: u64) -> Result<(), PublishError> {
        match lock(&self.last).number.filter(|last| number <= *last) {
            Some(last) => Err(PublishError::Regression { number, last, epoch: self.config.epoch }),
            None => Ok(()),
        }
    }

    fn layout(&self, number: u64, specs: Vec<TensorSpec>) -> Result<Layout, PublishError> {
        let layout = Layout::new(&specs).map_err(|error| PublishError::Layout { number, error })?;
        Ok(layout)
    }

    /// `copy` fills the tensor at each place, in order.
    fn write(
        &self,
        number: u64,
        layout: Layout,
        mut copy: impl FnMut(usize, &mut [u8]) -> Result<(), PublishError>,
    ) -> Result<Publishing, PublishError> {
        let _one = self.publishing.lock().expect("no publisher panics under its lock");
        self.check_newer(number)?;
        let started = Instant::now();
        let Begun { writer, sealer, revoked: revoked_streams, left: left_in_use } =
            self.arena.begin(&layout, std::slice::from_ref(&(0..layout.image_bytes())))?;
        let bytes = layout.image_bytes();
        let layout = Arc::new(layout);
        let (done, sealed) = oneshot::channel();
        self.start_sealing(sealer, number, &layout, started, done)?;
        copy_all(&writer, &layout, &mut copy)?;
        writer.finish();
        lock(&self.last).number = Some(number);
        let copied_in = started.elapsed();
        Ok(Publishing { number, bytes, copied_in, revoked_streams, left_in_use, sealed })
    }

    /// The thread ends by itself: with the seal and the delta, or when the writer gave up.
    fn start_sealing(
        &self,
        sealer: Sealer,
        number: u64,
        layout: &Arc<Layout>,
        started: Instant,
        done: oneshot::Sender<Published>,
    ) -> Result<(), PublishError> {
        let (config, layout, last) =
            (self.config.clone(), Arc::clone(layout), Arc::clone(&self.last));
        let (arena, export) = (self.arena.clone(), self.export.clone());
        let offers = Arc::clone(&self.offers);
        let seal = move || {
            let threads = config.hash_threads;
            let Some((held, manifest)) = sealer.run(config.epoch, number, &layout, threads) else {
                return;
            };
            let (version, bytes) = (held.version(), manifest.image_bytes);
            let before = lock(&last).sealed.replace((version, Arc::clone(&manifest)));
            let prepares = before.is_none() && !config.single;
            let mut delta_bytes = None;
            if let Some((base, base_manifest)) = before.filter(|_| config.delta)
                && base_manifest.tensors == manifest.tensors
            {
                delta_bytes = offers.offer(&arena, &config, base, &held, &manifest);
            }
            let export = export.and_then(|export| exported(&export, &arena, &held));
            let sealed_in = started.elapsed();
            tracing::info!(
                %version, root = %version.root, bytes, ?delta_bytes, ?sealed_in, "version sealed"
            );
            let copied_in = Duration::ZERO;
            let published = Published {
                version,
                manifest: Arc::clone(&manifest),
                bytes,
                delta_bytes,
                copied_in,
                sealed_in,
                export,
                held,
            };
            // Nobody may be waiting for the seal: the version is lent all the same.
            done.send(published).ok();
            if prepares {
                prepare_next(&arena, &offers, &config, &manifest);
            }
        };
        let builder = std::thread::Builder::new().name("transfer-seal".into());
        builder.spawn(seal).map(drop).map_err(PublishError::Thread)
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // A sealing thread may hold the arena for a while yet; its names must be free for the next trainer.
        self.arena.close();
    }
}

/// All that the versions after the first need, so that none of it is got while one of them is published.
fn prepare_next(arena: &Arena, offers: &Offers, config: &PublisherConfig, manifest: &Manifest) {
    arena.prepare(manifest.image_bytes, std::slice::from_ref(&(0..manifest.image_bytes)));
    if config.delta {
        offers.prepare(config, manifest);
    }
}

/// Writes the version to the export directory. `None` if its memory is another's already.
fn exported(
    export: &Export,
    arena: &Arena,
    held: &Held,
) -> Option<Result<PathBuf, Arc<ExportError>>> {
    let version = held.version();
    let (image, _) = arena.sealed(version.root)?;
    let written = export.write(held, &image);
    if let Err(error) = &written {
        tracing::error!(%version, %error, "not exported; it is served from here all the same");
    }
    Some(written.map_err(Arc::new))
}

fn lock(last: &Mutex<Last>) -> MutexGuard<'_, Last> {
    last.lock().expect("no publisher panics under its lock")
}

fn copy_all(
    writer: &SlotWriter,
    layout: &Layout,
    copy: &mut impl FnMut(usize, &mut [u8]) -> Result<(), PublishError>,
) -> Result<(), PublishError> {
    let header = layout.header();
    writer.fill(0..header.len() as u64, |out| out.copy_from_slice(header));
    for (at, tensor) in layout.tensors().iter().enumerate() {
        let range = tensor.offset..tensor.offset + tensor.len;
        writer.fill(range, |out| copy(at, out))?;
    }
    Ok(())
}

// === impl Publishing ===

impl Publishing {
    /// Resolves when receivers can fetch the version.
    pub async fn sealed(self) -> Result<Published, PublishError> {
        let number = self.number;
        let published = self.sealed.await.map_err(|_| PublishError::Abandoned { number })?;
        Ok(Published { copied_in: self.copied_in, ..published })
    }

    /// As [`Publishing::sealed`], for a trainer without a runtime.
    pub fn wait(self) -> Result<Published, PublishError> {
        let number = self.number;
        let published =
            self.sealed.blocking_recv().map_err(|_| PublishError::Abandoned { number })?;
        Ok(Published { copied_in: self.copied_in, ..published })
    }
}

// === impl Published ===

impl Published {
    /// Bytes sent to receivers so far.
    pub fn sent_bytes(&self) -> u64 {
        self.held.sent_bytes()
    }

    /// Streams that read it now.
    pub fn leases(&self) -> u32 {
        self.held.leases()
    }
}
