//! Taking a version over from a process of this host: its memory is passed as a descriptor, verified where
//! it lies and named for the engine. Nothing is copied. Where that does not work, the version is fetched
//! like from anywhere else.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anabranch_proto::address::Address;
use anabranch_proto::manifest::Manifest;
use anabranch_proto::version::Root;

use super::pool::SourceStream;
use super::{FetchError, FetchProgress, FetchReport, FetchRequest, Shared, SourceRef, StreamError};
use crate::link::wire::{BlobId, Message};
use crate::receive::staging::{Adopting, StageError, StagedSlot};
use crate::send::holder::Held;

/// Read, then hashed while it is still in the cache. Mapping the memory instead would cost a page fault
/// for every 4 KiB of every version.
const STRIDE: usize = 128 << 10;
const THREADS: usize = 4;
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Why a version could not be taken over.
#[derive(Debug, thiserror::Error)]
enum NotAdopted {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("it is still receiving the version")]
    Incomplete,
    #[error("nothing came to it for {0:?}")]
    Stuck(Duration),
    #[error("it did not pass its memory with the answer")]
    NoDescriptor,
    #[error("its memory has {have} bytes, the manifest says {want}")]
    Length { have: u64, want: u64 },
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error("cannot read its memory: {0}")]
    Read(#[from] io::Error),
    #[error("chunk {0} of its memory has a wrong hash")]
    Hash(u32),
    #[error("the fetch was cancelled")]
    Cancelled,
}

/// The version where it lies in memory of this host, if a source is there. `None`: copy it. A source that is
/// still receiving it is waited for where nobody here has it all.
pub(super) fn try_adopt(
    shared: &Arc<Shared>,
    request: &FetchRequest,
    manifest: &Arc<Manifest>,
    encoded: &Arc<[u8]>,
) -> Result<Option<(StagedSlot, FetchReport)>, FetchError> {
    let version = request.version;
    let mut sources = sources_here(request);
    for patient in [false, true] {
        for source in std::mem::take(&mut sources) {
            match adopt(shared, request, &source, manifest, encoded, patient) {
                Ok(slot) => {
                    return Ok(Some((slot, report(request, &source, manifest.image_bytes))));
                }
                Err(NotAdopted::Cancelled) => return Err(FetchError::Cancelled(version)),
                Err(NotAdopted::Incomplete) if !patient => sources.push(source),
                Err(error) => {
                    let (holder, addr) = (&source.holder, &source.addrs[0]);
                    tracing::warn!(
                        %version, holder, %addr, %error,
                        "could not take over memory of this host: the version is copied"
                    );
                }
            }
        }
    }
    Ok(None)
}

/// Sources with a socket that exists here, each with that address only.
fn sources_here(request: &FetchRequest) -> Vec<SourceRef> {
    let one = |source: &SourceRef| {
        let addr = address_here(source)?;
        Some(SourceRef { addrs: vec![addr.clone()], ..source.clone() })
    };
    request.sources.iter().filter_map(one).collect()
}

/// The address at which the source passes memory of this host, if it has one that exists here.
pub(super) fn address_here(source: &SourceRef) -> Option<&Address> {
    source.addrs.iter().find(|addr| addr.socket().is_some_and(Path::exists))
}

fn report(request: &FetchRequest, from: &SourceRef, bytes: u64) -> FetchReport {
    let of = |s: &SourceRef| (s.holder.clone(), if s.holder == from.holder { bytes } else { 0 });
    let bytes_by_holder = request.sources.iter().map(of).collect();
    FetchReport { bytes, adopted_bytes: bytes, bytes_by_holder, ..FetchReport::default() }
}

fn adopt(
    shared: &Arc<Shared>,
    request: &FetchRequest,
    source: &SourceRef,
    manifest: &Arc<Manifest>,
    encoded: &Arc<[u8]>,
    patient: bool,
) -> Result<StagedSlot, NotAdopted> {
    let file = ask_file(shared, request, source, manifest, patient)?;
    let adopting = shared.staging.adopt(request.version, manifest, file)?;
    let held = Held::new(request.version, adopting.blob(Arc::clone(encoded)));
    shared.holder.prune();
    shared.holder.offer(Arc::new(held));
    let verified = verify(request, manifest, &adopting);
    let staged = verified.and_then(|()| Ok(adopting.publish(&shared.holder)?));
    match staged {
        Ok(staged) => {
            shared.staging.release_idle()?;
            Ok(staged)
        }
        Err(error) => {
            shared.holder.withdraw(request.version);
            Err(error)
        }
    }
}

/// Asks `source` for its memory file. Waits for a source that is still receiving only if `patient`.
fn ask_file(
    shared: &Shared,
    request: &FetchRequest,
    source: &SourceRef,
    manifest: &Manifest,
    patient: bool,
) -> Result<File, NotAdopted> {
    let mut session = begun(shared, request, source, patient)?;
    if !session.complete && !patient {
        session.keep(shared);
        return Err(NotAdopted::Incomplete);
    }
    let blob = BlobId::Image;
    session.link.send(&Message::WantFile { blob }).map_err(StreamError::from)?;
    let (mut moved, mut had) = (Instant::now(), 0);
    let (len, file) = loop {
        if request.cancel.is_cancelled() {
            return Err(NotAdopted::Cancelled);
        }
        let (answer, file) = session.link.receive_file().map_err(StreamError::from)?;
        match answer {
            Message::File { blob: BlobId::Image, len } => break (len, file),
            // It tells that it lives, and what came to it.
            Message::Have { ranges } if ranges.is_empty() => {
                let silent = moved.elapsed();
                if silent > shared.rules.stuck_after {
                    return Err(NotAdopted::Stuck(silent));
                }
            }
            Message::Have { ranges } => {
                moved = Instant::now();
                had += ranges.iter().map(|r| u64::from(r.end - r.start)).sum::<u64>();
                tell(request, manifest, had * u64::from(manifest.chunk_bytes));
            }
            other => return Err(StreamError::from_reply(other).into()),
        }
    };
    session.keep(shared);
    let file = file.ok_or(NotAdopted::NoDescriptor)?;
    let (have, want) = (file.metadata()?.len().min(len), manifest.image_bytes);
    if have != want {
        return Err(NotAdopted::Length { have, want });
    }
    Ok(file)
}

/// A session with a source that has begun with the version. Those that have the same order as we may wait
/// for a slot before they do.
fn begun(
    shared: &Shared,
    request: &FetchRequest,
    source: &SourceRef,
    patient: bool,
) -> Result<SourceStream, NotAdopted> {
    let until = Instant::now() + shared.rules.slot_wait;
    loop {
        match SourceStream::open(shared, source, Root::default()) {
            Err(error) if !error.is_early() => return Err(error.into()),
            Err(_) if !patient => return Err(NotAdopted::Incomplete),
            Err(error) if Instant::now() > until => return Err(error.into()),
            Err(_) if request.cancel.is_cancelled() => return Err(NotAdopted::Cancelled),
            // It was asked for as long as it waits for the version itself.
            Err(_) => {}
            Ok(session) => return Ok(session),
        }
    }
}

fn tell(request: &FetchRequest, manifest: &Manifest, bytes: u64) {
    if let Some(progress) = &request.progress {
        let total_bytes = manifest.image_bytes;
        let bytes = bytes.min(total_bytes);
        progress(FetchProgress { bytes, received_bytes: 0, total_bytes });
    }
}

/// State that the verifying threads share.
struct Check<'a> {
    request: &'a FetchRequest,
    manifest: &'a Manifest,
    adopting: &'a Adopting,
    next: AtomicU32,
    verified_bytes: AtomicU64,
    failed: AtomicBool,
}

/// Every chunk against its hash, on several threads.
fn verify(
    request: &FetchRequest,
    manifest: &Manifest,
    adopting: &Adopting,
) -> Result<(), NotAdopted> {
    let (next, verified_bytes, failed) =
        (AtomicU32::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let check = Check { request, manifest, adopting, next, verified_bytes, failed };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let others: Vec<_> =
            (1..cores.min(THREADS)).map(|_| scope.spawn(|| check.share(false))).collect();
        let mut outcome = check.share(true);
        for other in others {
            outcome = outcome.and(other.join().expect("hashing does not panic"));
        }
        outcome
    })
}

// === impl Check ===

impl Check<'_> {
    /// Takes chunks until there are no more. One thread tells the progress.
    fn share(&self, tells: bool) -> Result<(), NotAdopted> {
        let mut buffer = vec![0; STRIDE];
        let mut told = Instant::now();
        let outcome = loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.manifest.chunk_count() || self.failed.load(Ordering::Relaxed) {
                break Ok(());
            }
            if self.request.cancel.is_cancelled() {
                break Err(NotAdopted::Cancelled);
            }
            if let Err(error) = self.chunk(index, &mut buffer) {
                break Err(error);
            }
            if tells && told.elapsed() >= PROGRESS_EVERY {
                told = Instant::now();
                self.tell();
            }
        };
        if outcome.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        } else if tells {
            self.tell();
        }
        outcome
    }

    fn chunk(&self, index: u32, buffer: &mut [u8]) -> Result<(), NotAdopted> {
        let range = self.manifest.chunk_range(index);
        let (mut at, mut hasher) = (range.start, blake3::Hasher::new());
        while at < range.end {
            let stride = &mut buffer[..(range.end - at).min(STRIDE as u64) as usize];
            self.adopting.file().read_exact_at(stride, at)?;
            hasher.update(stride);
            at += stride.len() as u64;
        }
        if *hasher.finalize().as_bytes() != self.manifest.chunk_hashes[index as usize] {
            return Err(NotAdopted::Hash(index));
        }
        self.adopting.ledger.insert(index);
        self.verified_bytes.fetch_add(range.end - range.start, Ordering::Relaxed);
        Ok(())
    }

    fn tell(&self) {
        tell(self.request, self.manifest, self.verified_bytes.load(Ordering::Relaxed));
    }
}
