//! The receiver's driver: gets a version from several sources into a staging slot, every chunk
//! verified. Owns the streams and their threads; which stream asks for what is decided by `queue`,
//! where bytes lie by `staging`.
//!
//! ```text
//!   manifest (from any source, checked against the root) -> layout against the baseline -> slot
//!   -> carry over equal chunks -> N streams pull the rest -> directory for the engine
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_proto::address::Address;
use anabranch_proto::manifest::Manifest;
use anabranch_proto::version::{Root, Version};
use tokio_util::sync::CancellationToken;

use crate::image::checkpoint::Baseline;
use crate::link::wire::{BlobId, Message};
use crate::receive::queue::{QueueRules, QueueStats};
use crate::receive::staging::{Filling, StageError, StagedSlot, Staging};
use crate::send::holder::{Held, Holder};

mod adopt;
mod ask;
mod delta;
mod error;
mod next;
mod pool;
mod pull;

use ask::{Unanswered, first_answer};
use delta::Deltas;
pub(crate) use error::StreamError;
pub use error::{FetchError, Tried};
use next::Next;
use pool::{Pool, SourceStream};
use pull::{PullOrder, Sink};

/// Gets versions into one staging area and lends them to peers. Clones are the same fetcher.
#[derive(Clone)]
pub struct Fetcher {
    shared: Arc<Shared>,
}

struct Shared {
    staging: Staging,
    holder: Holder,
    pool: Pool,
    deltas: Deltas,
    rules: FetchRules,
    next: Next,
}

/// Deadlines and bounds of all fetches.
#[derive(Clone, Debug)]
pub struct FetchRules {
    /// A stream that is not up after so long is given up.
    pub connect: Duration,
    /// A stream that moves no byte for so long is given up.
    pub progress: Duration,
    /// The fetch fails when no chunk was verified for so long.
    pub give_up: Duration,
    /// Chunks asked for ahead, per stream; less for a small image, since a lost stream repeats them.
    pub window: u32,
    /// Failures in a row before a source is dropped.
    pub strikes: u32,
    /// An idle stream takes over from one that verified nothing for so long.
    pub rescue_after: Duration,
    /// A stripe that got nothing for so long from a parent that is alive goes to the next source.
    pub stuck_after: Duration,
    /// Time to wait for an engine to let go of the slot.
    pub slot_wait: Duration,
}

/// A holder of the version, and the permission to read from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceRef {
    /// Name of the holder, for logs and reports: `trainer`, or an engine's id.
    pub holder: String,
    /// Addresses of the holder, best first. Empty: none that this process can dial.
    pub addrs: Vec<Address>,
    /// The manager's permission to read there.
    pub grant: Vec<u8>,
    /// Stripes of which the source is the planned parent.
    pub stripes: Vec<u32>,
    /// Stripes for whose parent the source may stand in; for others only when no other source is left.
    pub fallback_for: Vec<u32>,
    /// Name that the senders of one version share: each source has a part of what all of them have, and they
    /// stand in for each other. Empty for a source on its own.
    pub origin: String,
}

/// An order to fetch one version.
#[derive(Clone)]
pub struct FetchRequest {
    /// The version, with its root.
    pub version: Version,
    /// Best first.
    pub sources: Vec<SourceRef>,
    /// Streams in total, at least one per source.
    pub streams: usize,
    /// Chunk i belongs to stripe i modulo this; 0: no plan, any source is as good.
    pub stripe_count: u32,
    /// The engine's tensors: anything else is refused before a byte is staged.
    pub baseline: Option<Arc<Baseline>>,
    /// Called about ten times a second from a transfer thread; must not block.
    pub progress: Option<Arc<dyn Fn(FetchProgress) + Send + Sync>>,
    /// Ends the fetch; verified chunks are kept for the next one.
    pub cancel: CancellationToken,
}

/// Progress of a fetch, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchProgress {
    /// Bytes that are verified and in place.
    pub bytes: u64,
    /// Bytes received over the links until now, of a delta too; wrong and repeated chunks included.
    pub received_bytes: u64,
    /// Length of the image.
    pub total_bytes: u64,
}

/// A version that an engine can load from `dir()`. Keep it while the engine loads or serves it.
pub struct Staged {
    slot: StagedSlot,
    /// The version that was fetched.
    pub version: Version,
    /// Account of the fetch.
    pub report: FetchReport,
}

/// Account of a fetch that succeeded.
#[derive(Clone, Debug, Default)]
pub struct FetchReport {
    /// Length of the image.
    pub bytes: u64,
    /// Bytes taken over where they lay, in memory of another process of this host.
    pub adopted_bytes: u64,
    /// Bytes not received as chunks: they were here already, or came out of a delta.
    pub carried_bytes: u64,
    /// Bytes received of a delta, if one was used.
    pub delta_bytes: u64,
    /// Bytes received, wrong and repeated chunks included.
    pub received_bytes: u64,
    /// Verified bytes by holder.
    pub bytes_by_holder: Vec<(String, u64)>,
    /// Streams and chunks that failed on the way.
    pub queue: QueueStats,
    /// Duration of the whole fetch.
    pub took: Duration,
}

// === impl Fetcher ===

impl Fetcher {
    /// `holder` lends what is fetched, from its first verified chunk on.
    pub fn new(staging: Staging, holder: Holder, rules: FetchRules) -> Fetcher {
        let (pool, deltas, next) = Default::default();
        Fetcher { shared: Arc::new(Shared { staging, holder, pool, deltas, rules, next }) }
    }

    /// The staging area.
    pub fn staging(&self) -> &Staging {
        &self.shared.staging
    }

    /// Dropping the future cancels the fetch. Verified chunks are kept for the next one.
    pub async fn fetch(&self, mut request: FetchRequest) -> Result<Staged, FetchError> {
        let version = request.version;
        request.cancel = request.cancel.child_token();
        let guard = request.cancel.clone().drop_guard();
        let fetcher = self.clone();
        let blocking = tokio::task::spawn_blocking(move || fetcher.fetch_blocking(&request));
        let outcome = blocking.await.map_err(|_| FetchError::Thread(version))?;
        drop(guard);
        outcome
    }

    /// Like [`Fetcher::fetch`], on this thread.
    pub fn fetch_blocking(&self, request: &FetchRequest) -> Result<Staged, FetchError> {
        let started = Instant::now();
        let version = request.version;
        if version.root == Root::default() {
            return Err(FetchError::Unsealed(version));
        }
        let (manifest, encoded) = self.manifest(request)?;
        if let Some(baseline) = &request.baseline {
            baseline.compare(&manifest).map_err(|diff| FetchError::Layout { version, diff })?;
        }
        let adopted = adopt::try_adopt(&self.shared, request, &manifest, &encoded)?;
        if let Some((slot, mut report)) = adopted {
            report.took = started.elapsed();
            return Ok(Staged { slot, version, report });
        }
        let stage = |error| FetchError::Stage { version, error };
        let filling = self.slot(request, &manifest)?;
        let held = Arc::new(Held::new(version, filling.blob(encoded)));
        self.shared.holder.prune();
        self.shared.holder.offer(Arc::clone(&held));
        let mut report = FetchReport { bytes: manifest.image_bytes, ..FetchReport::default() };
        let pulled = self.fill(request, &filling, &held, &manifest, &mut report);
        if let Err(error) = pulled {
            self.shared.holder.withdraw(version);
            return Err(error);
        }
        let slot = filling.publish(version).map_err(stage)?;
        if may_come_again(request) {
            let Shared { next, staging, deltas, .. } = &*self.shared;
            next.prepare(staging, deltas.memory(), manifest.image_bytes);
        }
        report.took = started.elapsed();
        Ok(Staged { slot, version, report })
    }

    /// Every chunk: those that are here already, those that a delta gives, and the rest in full.
    fn fill(
        &self,
        request: &FetchRequest,
        filling: &Filling,
        held: &Held,
        manifest: &Arc<Manifest>,
        report: &mut FetchReport,
    ) -> Result<(), FetchError> {
        let stage = |error| FetchError::Stage { version: request.version, error };
        report.carried_bytes = carried(filling, manifest).map_err(stage)?;
        let filler = filling.filler();
        if !filler.ledger.is_full() {
            delta::try_delta(&self.shared, request, filling, held, report)?;
            report.carried_bytes = manifest.image_bytes - filler.missing_bytes();
        }
        let job = PullOrder {
            blob: BlobId::Image,
            base: Root::default(),
            manifest: Arc::clone(manifest),
            sink: Sink::Slot(filler.clone()),
        };
        let (before, started) = (report.received_bytes, Instant::now());
        let pulled = pull::pull(&self.shared, request, job, report);
        self.shared.deltas.note_link(report.received_bytes - before, started.elapsed());
        pulled
    }

    /// Waits a while for those who still use the older version's memory; what other agents of this host
    /// use then is left to them.
    fn slot(
        &self,
        request: &FetchRequest,
        manifest: &Arc<Manifest>,
    ) -> Result<Filling, FetchError> {
        let (version, staging) = (request.version, &self.shared.staging);
        let until = Instant::now() + self.shared.rules.slot_wait;
        loop {
            let patient = Instant::now() < until && !request.cancel.is_cancelled();
            match staging.begin(manifest, !patient && staging.is_shared()) {
                Ok(filling) => return Ok(filling),
                Err(StageError::Busy { .. }) if patient => std::thread::park_timeout(SLOT_POLL),
                Err(error) => return Err(FetchError::Stage { version, error }),
            }
        }
    }

    /// The manifest from the first source that gives one: it must have the root, so any source is as good.
    fn manifest(&self, request: &FetchRequest) -> Result<(Arc<Manifest>, Arc<[u8]>), FetchError> {
        let version = request.version;
        let asked = first_answer(&self.shared, request, move |shared, source| {
            let bytes = ask_manifest(shared, source).map_err(|error| error.to_string())?;
            let got = Root::of(&bytes);
            if got == version.root {
                Ok(bytes)
            } else {
                Err(format!("it sent a manifest with another root ({got})"))
            }
        });
        let (SourceRef { holder, .. }, bytes) = asked.map_err(|none| match none {
            Unanswered::Cancelled => FetchError::Cancelled(version),
            Unanswered::Failed(tried) => FetchError::NoSource { version, tried },
        })?;
        match Manifest::decode(&bytes) {
            Ok(manifest) => Ok((Arc::new(manifest), bytes.into())),
            Err(error) => Err(FetchError::Manifest { version, holder, error }),
        }
    }
}

fn ask_manifest(shared: &Shared, source: &SourceRef) -> Result<Vec<u8>, StreamError> {
    let mut session = SourceStream::open(shared, source, Root::default())?;
    let blob = BlobId::Image;
    session.link.send(&Message::WantManifest { blob })?;
    let bytes = match session.link.receive()? {
        Message::Manifest { bytes, .. } => bytes,
        other => return Err(StreamError::from_reply(other)),
    };
    session.keep(shared);
    Ok(bytes)
}

const SLOT_POLL: Duration = Duration::from_millis(50);

/// A trainer that is there will publish another version. One that only left files may have ended.
fn may_come_again(request: &FetchRequest) -> bool {
    let mut addrs = request.sources.iter().flat_map(|source| &source.addrs);
    addrs.any(|addr| !matches!(addr, Address::File(_)))
}

/// Chunks that the slot still had from an earlier version or try, and those of the staged version.
fn carried(filling: &Filling, manifest: &Manifest) -> Result<u64, StageError> {
    let kept = filling.filler().ledger.snapshot();
    let len = |ix| {
        let range = manifest.chunk_range(ix);
        range.end - range.start
    };
    Ok(kept.iter().map(len).sum::<u64>() + filling.carry_over()?)
}

// === impl FetchRules ===

impl Default for FetchRules {
    fn default() -> FetchRules {
        FetchRules {
            connect: Duration::from_secs(5),
            progress: Duration::from_secs(5),
            give_up: Duration::from_secs(60),
            window: 8,
            strikes: 3,
            rescue_after: Duration::from_secs(1),
            stuck_after: Duration::from_secs(20),
            slot_wait: Duration::from_secs(10),
        }
    }
}

impl FetchRules {
    /// The rules for the queue of one fetch.
    pub fn queue(&self) -> QueueRules {
        let rest = Duration::from_millis(100);
        QueueRules {
            strikes: self.strikes,
            rest,
            rescue_after: self.rescue_after,
            stuck_after: self.stuck_after,
        }
    }
}

// === impl SourceRef ===

impl SourceRef {
    /// The source's addresses as one text, for errors and reports.
    fn shown(&self) -> String {
        let addrs: Vec<String> = self.addrs.iter().map(Address::to_string).collect();
        addrs.join(", ")
    }
}

// === impl Staged ===

impl Staged {
    /// The directory to tell the engine.
    pub fn dir(&self) -> &std::path::Path {
        self.slot.dir()
    }

    /// Layout and hashes of the image.
    pub fn manifest(&self) -> &Arc<Manifest> {
        self.slot.manifest()
    }

    /// The tensors, as the baseline of later versions.
    pub fn baseline(&self) -> Baseline {
        Baseline::of_manifest(self.slot.manifest())
    }

    /// A tensor's bytes, from the staged image.
    pub fn tensor(&self, name: &str) -> Option<Vec<u8>> {
        let t = self.slot.manifest().tensors.iter().find(|t| t.name == name)?;
        self.slot.read(t.offset..t.offset + t.len).ok()
    }
}
