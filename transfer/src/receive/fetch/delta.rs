//! Getting a version as a delta to the one that is staged, or as a chain of them. What this leaves undone,
//! for whatever reason, is fetched in full: every chunk of the result is verified like any other.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anabranch_proto::manifest::{Kind, Manifest};
use anabranch_proto::version::Root;

use super::ask::first_answer;
use super::pool::SourceStream;
use super::pull::{self, PullOrder, Sink};
use super::{FetchError, FetchReport, FetchRequest, Shared, SourceRef, StreamError};
use crate::delta::choice::{Rates, Way, choose};
use crate::delta::memory::{DeltaMemory, blobs, room, trim};
use crate::image::blob::{Backing, Blob, Stamp};
use crate::image::chunks::{ChunkSet, Ledger};
use crate::link::wire::{BlobId, Message};
use crate::memory::map::SharedMap;
use crate::receive::staging::{Base, Filling};
use crate::send::holder::Held;

mod apply;

use apply::{Applied, Arriving, apply};

/// Rates of less than this are of the beginning of a transfer, not of the link.
const TELLING_BYTES: u64 = 64 << 20;

/// Memory and rates that a fetcher keeps for its deltas.
#[derive(Default)]
pub(super) struct Deltas {
    memory: Arc<DeltaMemory>,
    rates: Mutex<Rates>,
}

/// A delta's manifest as it came; `None` where it is malformed.
struct Offered {
    manifest: Manifest,
    encoded: Arc<[u8]>,
}

/// Fills what it can of the slot; tells in the report how many bytes that took.
pub(super) fn try_delta(
    shared: &Arc<Shared>,
    request: &FetchRequest,
    filling: &Filling,
    held: &Held,
    report: &mut FetchReport,
) -> Result<(), FetchError> {
    let Some(base) = filling.base() else { return Ok(()) };
    let missing = filling.filler().missing_bytes();
    let Some((manifest, encoded)) = find(shared, request, base.root, missing) else {
        return Ok(());
    };
    let memory = shared.deltas.take(filling.filler().manifest(), manifest.image_bytes);
    let (map, stamp) = match memory {
        Ok(memory) => memory,
        Err(error) => {
            tracing::warn!(%error, "no memory for a delta; fetching the version in full");
            return Ok(());
        }
    };
    let ledger = Arc::new(Ledger::new(ChunkSet::empty(manifest.chunk_count())));
    let file = Backing::Own(Arc::clone(map.backing()));
    let (lent, chunks) = (Arc::clone(&manifest), Arc::clone(&ledger));
    // Peers with the same base may have it from here while it comes in.
    let blob = Blob { file, manifest: lent, encoded, ledger: chunks, stamp: stamp.clone() };
    held.set_deltas(vec![(base.root, blob)]);
    let arriving = Arriving { map, manifest, ledger, ended: AtomicBool::new(false) };
    let applied = pull_and_apply(shared, request, filling, &base, &arriving, report)?;
    let version = request.version;
    match applied {
        Some(applied) if filling.filler().ledger.is_full() => {
            // It was right, so its parts are: peers with any of its bases may have theirs.
            let chunk_bytes = arriving.manifest.chunk_bytes;
            let parts = blobs(&arriving.map, &stamp, &applied.bases, chunk_bytes, version.root);
            held.set_deltas(parts);
        }
        Some(_) => {
            held.set_deltas(Vec::new());
            tracing::warn!(%version, "a delta did not give the version; fetching the rest in full");
        }
        None => held.set_deltas(Vec::new()),
    }
    Ok(())
}

/// `None` where not all of it came or it is none; an error only where the fetch was cancelled.
fn pull_and_apply(
    shared: &Arc<Shared>,
    request: &FetchRequest,
    filling: &Filling,
    base: &Base,
    arriving: &Arriving,
    report: &mut FetchReport,
) -> Result<Option<Applied>, FetchError> {
    let cancel = request.cancel.child_token();
    let cancellable = FetchRequest { cancel: cancel.clone(), ..request.clone() };
    let sink =
        Sink::Memory { map: Arc::clone(&arriving.map), ledger: Arc::clone(&arriving.ledger) };
    let manifest = Arc::clone(&arriving.manifest);
    let job = PullOrder { blob: BlobId::Delta, base: base.root, manifest, sink };
    let (before, started) = (report.received_bytes, Instant::now());
    let (pulled, applied) = std::thread::scope(|scope| {
        let applier = scope.spawn(|| {
            let applied = apply(arriving, base, filling.filler());
            if applied.is_err() {
                // The rest of it is of no use.
                cancel.cancel();
            }
            applied
        });
        let pulled = pull::pull(shared, &cancellable, job, report);
        arriving.ended.store(true, Ordering::Release);
        (pulled, applier.join().expect("applying does not panic"))
    });
    report.delta_bytes = report.received_bytes - before;
    shared.deltas.note_link(report.delta_bytes, started.elapsed());
    if request.cancel.is_cancelled() {
        return Err(FetchError::Cancelled(request.version));
    }
    match (pulled, applied) {
        (Ok(()), Ok(applied)) => {
            shared.deltas.note_applied(&applied);
            return Ok(Some(applied));
        }
        (Ok(()) | Err(FetchError::Cancelled(_)), Err(error)) => {
            tracing::warn!(%error, "a delta that cannot be applied");
        }
        (Err(error), _) => tracing::warn!(%error, "no delta; fetching the version in full"),
    }
    Ok(None)
}

/// The manifest of a delta from `base` that is worth it, from the first source that has one.
fn find(
    shared: &Arc<Shared>,
    request: &FetchRequest,
    base: Root,
    missing: u64,
) -> Option<(Arc<Manifest>, Arc<[u8]>)> {
    let (rates, result) = (shared.deltas.rates(), request.version.root);
    let asked = first_answer(shared, request, move |shared, source| {
        let offered = ask(shared, source, base, missing, rates);
        let offered = offered.map_err(|error| {
            tracing::info!(holder = source.holder, %error, "no delta from here");
            error.to_string()
        })?;
        let Offered { manifest, encoded } = offered.ok_or("it has none that is worth it")?;
        if manifest.kind == (Kind::Delta { base, result }) {
            return Ok((Arc::new(manifest), encoded));
        }
        tracing::warn!(holder = source.holder, "offered a delta for another version");
        Err("it offered another one".to_owned())
    });
    asked.ok().map(|(_, delta)| delta)
}

fn ask(
    shared: &Shared,
    source: &SourceRef,
    base: Root,
    missing: u64,
    rates: Rates,
) -> Result<Option<Offered>, StreamError> {
    let mut session = SourceStream::open(shared, source, base)?;
    if choose(session.delta_bytes, missing, rates) == Way::Full {
        session.keep(shared);
        return Ok(None);
    }
    session.link.send(&Message::WantManifest { blob: BlobId::Delta })?;
    match session.link.receive()? {
        // Its root is not known beforehand: what it leads to is verified by the full manifest.
        Message::Manifest { bytes, .. } => {
            session.keep(shared);
            let manifest = Manifest::decode(&bytes).ok();
            Ok(manifest.map(|manifest| Offered { manifest, encoded: Arc::from(bytes) }))
        }
        other => Err(StreamError::from_reply(other)),
    }
}

// === impl Deltas ===

impl Deltas {
    /// Takes a buffer for a delta of `bytes`, with a little more memory: the next one may be larger.
    fn take(&self, version: &Manifest, bytes: u64) -> io::Result<(Arc<SharedMap>, Stamp)> {
        let room = room(version.image_bytes);
        if bytes > room {
            return Err(io::Error::other("it is larger than the version itself"));
        }
        let (map, stamp) = self.memory.take(room)?;
        trim(&map, bytes);
        map.back(room.min(bytes + bytes / 8))?;
        Ok((map, stamp))
    }

    pub(super) fn memory(&self) -> &Arc<DeltaMemory> {
        &self.memory
    }

    /// Records the rate at which `bytes` came over the link.
    pub(super) fn note_link(&self, bytes: u64, took: Duration) {
        if bytes >= TELLING_BYTES && !took.is_zero() {
            self.lock().link_bytes_per_s = Some(bytes as f64 / took.as_secs_f64());
        }
    }

    fn note_applied(&self, applied: &Applied) {
        if applied.bytes >= TELLING_BYTES && !applied.busy.is_zero() {
            let one = applied.bytes as f64 / applied.busy.as_secs_f64();
            self.lock().apply_bytes_per_s = Some(one * f64::from(applied.speedup));
        }
    }

    fn rates(&self) -> Rates {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().expect("held only to note")
    }
}
