//! The trainer's API: a version is copied into shared memory, then hashed, sealed and lent in the
//! background. Never waits for a receiver. Owns the server, the arena and the sealing threads.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anabranch_proto::grant::ServeKey;
use anabranch_proto::manifest::{DEFAULT_CHUNK_BYTES, DType, Manifest};
use anabranch_proto::version::Version;
use tokio::sync::oneshot;

use crate::arena::{Arena, ArenaError, Sealer, SlotWriter};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::holder::{Held, Holder};
use crate::layout::{Layout, LayoutError, TensorSpec};
use crate::serve::{ServeError, ServeLimits, Server};

#[derive(Clone, Debug)]
pub struct PublisherConfig {
    pub job: String,
    pub epoch: u32,
    /// Where receivers connect; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Addresses that receivers should dial, if not the one listened on (host or host:port).
    pub advertise: Vec<String>,
    pub chunk_bytes: u32,
    /// Threads that hash a published version.
    pub hash_threads: usize,
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
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    number: Option<u64>,
    sealing: Option<JoinHandle<()>>,
    held: Option<Arc<Held>>,
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
    sealed: oneshot::Receiver<Published>,
}

/// A version that receivers can fetch.
#[derive(Clone, Debug)]
pub struct Published {
    pub version: Version,
    pub manifest: Arc<Manifest>,
    pub bytes: u64,
    pub copied_in: Duration,
    /// From the start of the copy until all was hashed.
    pub sealed_in: Duration,
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
            chunk_bytes: DEFAULT_CHUNK_BYTES,
            hash_threads: 1,
            limits: ServeLimits::default(),
        }
    }
}

// === impl Publisher ===

impl Publisher {
    pub fn start(config: PublisherConfig) -> Result<Publisher, PublishError> {
        let holder = Holder::new(&config.job);
        let arena = Arena::new(holder.clone(), config.chunk_bytes);
        let server = Server::start(config.listen, holder, config.limits.clone())?;
        Ok(Publisher { server, config, arena, last: Mutex::default() })
    }

    /// The key that the manager gave: without one, nobody can read.
    pub fn set_serve_key(&self, key: ServeKey) {
        self.server.holder().set_key(key);
    }

    /// `host:port`s for receivers.
    pub fn addresses(&self) -> Vec<String> {
        let addr = self.server.addr();
        let with_port = |host: &String| match host.rsplit_once(':') {
            Some((_, port)) if port.parse::<u16>().is_ok() => host.clone(),
            _ => format!("{host}:{}", addr.port()),
        };
        if self.config.advertise.is_empty() {
            vec![addr.to_string()]
        } else {
            self.config.advertise.iter().map(with_port).collect()
        }
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
        let mut stored: Vec<_> = checkpoint.tensors().iter().collect();
        stored.sort_by_key(|t| std::cmp::Reverse(t.dtype.bytes()));
        let specs = stored.iter().map(|t| TensorSpec {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
        });
        let layout = self.layout(number, specs.collect())?;
        self.write(number, layout, |at, out| checkpoint.read_into(stored[at], out).map_err(failed))
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
        let mut last = self.lock();
        if let Some(before) = last.number.filter(|n| number <= *n) {
            let epoch = self.config.epoch;
            return Err(PublishError::Regression { number, last: before, epoch });
        }
        if let Some(sealing) = last.sealing.take() {
            sealing.join().ok();
        }
        let started = Instant::now();
        let (writer, sealer) = self.arena.begin(number, &layout)?;
        let revoked_streams = writer.revoked();
        let bytes = layout.image_bytes();
        let layout = Arc::new(layout);
        let (done, sealed) = oneshot::channel();
        let thread = self.start_sealing(sealer, number, &layout, started, done)?;
        last.sealing = Some(thread);
        copy_all(&writer, &layout, &mut copy)?;
        writer.finish();
        last.number = Some(number);
        let copied_in = started.elapsed();
        Ok(Publishing { number, bytes, copied_in, revoked_streams, sealed })
    }

    fn start_sealing(
        &self,
        sealer: Sealer,
        number: u64,
        layout: &Arc<Layout>,
        started: Instant,
        done: oneshot::Sender<Published>,
    ) -> Result<JoinHandle<()>, PublishError> {
        let (epoch, threads, layout) =
            (self.config.epoch, self.config.hash_threads, Arc::clone(layout));
        let seal = move || {
            let Some((held, manifest)) = sealer.run(epoch, number, &layout, threads) else {
                return;
            };
            let (sealed_in, bytes) = (started.elapsed(), manifest.image_bytes);
            let version = held.version();
            tracing::info!(%version, root = %version.root, bytes, ?sealed_in, "version sealed");
            // Nobody may be waiting for the seal: the version is lent all the same.
            let copied_in = Duration::ZERO;
            done.send(Published { version, manifest, bytes, copied_in, sealed_in, held }).ok();
        };
        std::thread::Builder::new()
            .name("transfer-seal".into())
            .spawn(seal)
            .map_err(PublishError::Thread)
    }

    fn lock(&self) -> MutexGuard<'_, Last> {
        self.last.lock().expect("no publisher panics under its lock")
    }
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
