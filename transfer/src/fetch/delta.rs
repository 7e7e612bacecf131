//! Getting a version as a delta to the one that is staged. What this leaves undone, for whatever
//! reason, is fetched in full: every chunk of the result is verified like any other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anabranch_proto::manifest::{Kind, Manifest};
use anabranch_proto::version::Root;

use super::pool::Session;
use super::pull::{self, Job, Sink};
use super::{FetchError, FetchReport, FetchRequest, Shared, StreamError};
use crate::chunks::{ChunkSet, Ledger};
use crate::delta::{Delta, Workspace};
use crate::holder::{Backing, Blob, Held, Stamp};
use crate::shm::SharedMap;
use crate::staging::{Base, Filler, Filling};
use crate::wire::{BlobId, Message};

/// A delta is taken if it costs less than this share of the bytes that are missing.
const WORTH: f64 = 0.8;
const APPLY_THREADS: usize = 4;

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
    let memory = match SharedMap::anonymous("anabranch-delta", manifest.image_bytes) {
        Ok(memory) => Arc::new(memory),
        Err(error) => {
            tracing::warn!(%error, "no memory for a delta; fetching the version in full");
            return Ok(());
        }
    };
    let ledger = Arc::new(Ledger::new(ChunkSet::empty(manifest.chunk_count())));
    let sink = Sink::Memory { map: Arc::clone(&memory), ledger: Arc::clone(&ledger) };
    let job = Job { blob: BlobId::Delta, base: base.root, manifest: Arc::clone(&manifest), sink };
    let before = report.received_bytes;
    match pull::pull(shared, request, job, report) {
        Ok(()) => {}
        Err(FetchError::Cancelled(version)) => return Err(FetchError::Cancelled(version)),
        Err(error) => {
            tracing::warn!(%error, "no delta; fetching the version in full");
            return Ok(());
        }
    }
    report.delta_bytes = report.received_bytes - before;
    let file = Backing::Own(Arc::clone(memory.backing()));
    let blob =
        Blob { file, manifest: Arc::clone(&manifest), encoded, ledger, stamp: Stamp::forever() };
    if apply(&memory, &manifest, &base, filling.filler()) {
        held.set_delta(base.root, blob);
    } else {
        tracing::warn!(version = %request.version, "a delta did not give the version; fetching the rest in full");
    }
    Ok(())
}

/// The manifest of a delta from `base` that is worth its bytes, from the first source that has one.
fn find(
    shared: &Shared,
    request: &FetchRequest,
    base: Root,
    missing: u64,
) -> Option<(Arc<Manifest>, Arc<[u8]>)> {
    for source in &request.sources {
        if request.cancel.is_cancelled() {
            return None;
        }
        let asked = Session::open(shared, source, base).and_then(|mut session| {
            let worth =
                session.delta_bytes > 0 && (session.delta_bytes as f64) < WORTH * missing as f64;
            let manifest = if worth { ask(&mut session)? } else { None };
            session.keep(shared);
            Ok(manifest)
        });
        match asked {
            Ok(Some(Offered { manifest, encoded })) => {
                let result = request.version.root;
                if manifest.kind == (Kind::Delta { base, result }) {
                    return Some((Arc::new(manifest), encoded));
                }
                tracing::warn!(holder = source.holder, "offered a delta for another version");
            }
            Ok(None) => {}
            Err(error) => tracing::info!(holder = source.holder, %error, "no delta from here"),
        }
    }
    None
}

/// A delta's manifest as it came; `None` where it is malformed.
struct Offered {
    manifest: Manifest,
    encoded: Arc<[u8]>,
}

fn ask(session: &mut Session) -> Result<Option<Offered>, StreamError> {
    session.link.send(&Message::WantManifest { blob: BlobId::Delta })?;
    match session.link.receive()? {
        // Its root is not known beforehand: what it leads to is verified by the full manifest.
        Message::Manifest { bytes, .. } => {
            let manifest = Manifest::decode(&bytes).ok();
            Ok(manifest.map(|manifest| Offered { manifest, encoded: Arc::from(bytes) }))
        }
        other => Err(StreamError::from_reply(other)),
    }
}

/// New = f(base, delta) into the chunks that are not verified yet; true if all are, after.
fn apply(blob: &SharedMap, manifest: &Manifest, base: &Base, filler: &Filler) -> bool {
    let kept = filler.ledger.snapshot();
    let applied = blob.read(0..manifest.image_bytes, |bytes| {
        let delta = Delta::parse(filler.manifest(), bytes);
        delta.map(|delta| apply_blocks(&delta, base, filler, &kept))
    });
    match applied {
        Ok(true) => {}
        Ok(false) => return false,
        Err(error) => {
            tracing::warn!(%error, "malformed delta");
            return false;
        }
    }
    let next = AtomicUsize::new(0);
    let count = filler.manifest().chunk_count() as usize;
    on_threads(|| {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            if !kept.contains(index as u32) {
                filler.verify(index as u32);
            }
        }
    });
    filler.ledger.is_full()
}

fn apply_blocks(delta: &Delta<'_>, base: &Base, filler: &Filler, kept: &ChunkSet) -> bool {
    let (next, good) = (AtomicUsize::new(0), AtomicBool::new(true));
    on_threads(|| {
        let (mut workspace, mut new) = (Workspace::default(), Vec::new());
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= delta.block_count() || !good.load(Ordering::Relaxed) {
                return;
            }
            let range = delta.range(at);
            new.resize((range.end - range.start) as usize, 0);
            let applied = base.map().read(range.clone(), |old| {
                delta.apply_block(at, Some(old), &mut new, &mut workspace)
            });
            match applied {
                Ok(()) => filler.write_unverified(range.start, &new, kept),
                Err(_) => good.store(false, Ordering::Relaxed),
            }
        }
    });
    good.into_inner()
}

fn on_threads(work: impl Fn() + Sync) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 1..cores.min(APPLY_THREADS) {
            scope.spawn(&work);
        }
        work();
    });
}
