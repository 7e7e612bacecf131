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

/// Settings of a publisher.
#[derive(Clone, Debug)]
pub struct PublisherConfig {
    /// Name of the job: grants for others are refused.
    pub job: String,
    /// Epoch of the trainer: version numbers grow within it.
    pub epoch: u32,
    /// Socket address to listen on; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Addresses that receivers should dial, if not the one listened on (host or host:port).
    pub advertise: Vec<String>,
    /// Links by which the weights go out, best first. Empty: tcp on loopback, tls anywhere else.
    pub links: Vec<LinkKind>,
    /// Length of a chunk in bytes.
    pub chunk_bytes: u32,
    /// Threads that hash a published version and code its delta.
    pub hash_threads: usize,
    /// True to offer each version also as a delta to the one before, and as a chain of deltas to older ones.
    pub delta: bool,
    /// True if only one version will be published: no memory is got for a second before it comes.
    pub single: bool,
    /// Directory that gives the memory names, so that receivers of this host take it over instead of copying it.
    pub shm: Option<ShmArena>,
    /// Directory of a shared file system into which each version is written as well: `file:` receivers read it
    /// there, while this process lives and after.
    pub export: Option<PathBuf>,
    /// Number of exported versions that stay, the newest ones.
    pub export_keep: usize,
    /// Bounds of the server.
    pub limits: ServeLimits,
}

/// A tensor in the trainer's memory, in the engine's dtype.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    /// Name, unique within the version.
    pub name: &'a str,
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: &'a [u64],
    /// Elements, in row-major order.
    pub data: &'a [u8],
}

/// Publishes versions of one trainer and serves them.
pub struct Publisher {
    server: Server,
    config: PublisherConfig,
    arena: Arena,
    export: Option<Arc<Export>>,
    /// Held while a version is published: one at a time.
    publishing: Mutex<()>,
    last: Arc<Mutex<Last>>,
    offers: Arc<Offers>,
}

/// The last version, with which later ones are compared.
#[derive(Default)]
struct Last {
    number: Option<u64>,
    sealed: Option<(Version, Arc<Manifest>)>,
}

/// A version that is in the arena; its hashes are still being made.
#[derive(Debug)]
pub struct Publishing {
    /// Number of the version.
    pub number: u64,
    /// Length of the image.
    pub bytes: u64,
    /// Time for which the trainer was kept: the copy.
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
    /// The version, with its root.
    pub version: Version,
    /// Layout and hashes of the image.
    pub manifest: Arc<Manifest>,
    /// Length of the image.
    pub bytes: u64,
    /// Size of the delta to the version before, if there is one.
    pub delta_bytes: Option<u64>,
    /// Time for which the trainer was kept: the copy.
    pub copied_in: Duration,
    /// Time from the start of the copy until all was hashed, the delta coded and the export written.
    pub sealed_in: Duration,
    /// Directory of the export, or why there is none: the version is served all the same. `None` without an export.
    pub export: Option<Result<PathBuf, Arc<ExportError>>>,
    held: Arc<Held>,
}

/// Why a version was not published.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The server cannot be started.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The tensors make no image.
    #[error("version {number}: {error}")]
    Layout { number: u64, error: LayoutError },
    /// There is no memory for the version.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The number does not grow.
    #[error(
        "version {number} after {last}: numbers grow within epoch {epoch}; a restarted trainer opens a new epoch"
    )]
    Regression { number: u64, last: u64, epoch: u32 },
    /// A tensor has another length than its shape and dtype say.
    #[error("tensor `{name}`: {have} bytes given, its shape and dtype need {want}")]
    Data { name: String, have: u64, want: u64 },
    /// A piece lies outside its tensor.
    #[error(
        "{len} bytes at {offset} of tensor `{name}`, which has {of} bytes in the version's layout"
    )]
    Piece { name: String, offset: u64, len: u64, of: u64 },
    /// Two pieces overlap.
    #[error("the same bytes of tensor `{name}` are given twice")]
    Twice { name: String },
    /// A part cannot be exported.
    #[error(
        "version {number}: a part of a version cannot be exported; switch the export off, or let a sender that \
         has all of it write it"
    )]
    PartExport { number: u64 },
    /// The export directory cannot be used.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The directory is no checkpoint.
    #[error("version {number}: {error}")]
    Checkpoint { number: u64, error: CheckpointError },
    /// The version was given up before its seal.
    #[error("version {number} was given up before it was sealed")]
    Abandoned { number: u64 },
    /// No thread can be started.
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
    /// Starts the server. Nobody can read before [`Publisher::set_serve_key`].
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

    /// Addresses at which receivers find the versions, best first.
    pub fn addresses(&self) -> Vec<Address> {
        let exported = self.export.iter().map(|export| export.address());
        let local = self.server.local_address().into_iter();
        local.chain(self.server.addresses()).chain(exported).collect()
    }

    /// The server, for its streams and for dialling receivers.
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

/// Gets all memory that the versions after the first need, so that none is got while one of them is published.
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

    /// Like [`Publishing::sealed`], for a trainer without a runtime.
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
