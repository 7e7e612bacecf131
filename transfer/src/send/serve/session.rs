//! The conversation on one stream, from the source's end: bound to one version by a grant, then requests.
//!
//! ```text
//!   stream:  Greeting ── Hi admitted ──► Bound{lease, base} ── Hi (next version) ──► Bound
//!            Greeting ── Offer admitted ──► handed to the fetcher: the peer dialled to be asked
//!            any ── refusal, broken protocol, silence ──► closed (a Fail says why)
//! ```

use std::fs::File;
use std::time::{Duration, Instant};

use anabranch_proto::version::{Root, Version};

use super::Shared;
use crate::image::blob::Blob;
use crate::image::chunks::ChunkSet;
use crate::link::wire::{BlobId, FailCode, MAX_WANTED, Message, PROTO};
use crate::link::{Link, LinkError};
use crate::memory::map::descriptor_path;
use crate::send::holder::Lease;

/// Way in which a stream ended that was not refused.
pub(super) enum Ended {
    Closed,
    /// The peer is a source and this is its stream: ask it.
    Offered {
        source: String,
    },
}

/// Why a stream ended that did not simply close.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamEnd {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("{code:?}: {text}")]
    Refused { code: FailCode, text: String },
}

/// A stream bound to a version.
struct Bound {
    lease: Lease,
    base: Root,
}

/// Answers requests until the peer is silent for too long: sooner when it showed no grant, unless we dialled it.
pub(super) fn converse(
    shared: &Shared,
    link: &mut dyn Link,
    dialled: bool,
) -> Result<Ended, StreamEnd> {
    let mut bound: Option<Bound> = None;
    link.set_patience(shared.limits.progress)?;
    loop {
        // Only a stream that showed a grant may idle.
        if dialled || bound.is_some() {
            link.set_patience(shared.limits.idle)?;
        }
        let message = match link.receive() {
            Err(LinkError::Stalled(_)) => return Ok(Ended::Closed),
            other => other?,
        };
        link.set_patience(shared.limits.progress)?;
        match (message, &bound) {
            (Message::Hi { proto, base, grant }, _) => {
                bound = Some(greet(shared, link, proto, base, &grant)?);
            }
            (Message::Offer { proto, grant }, None) if !dialled => {
                return offered(shared, proto, &grant);
            }
            (Message::WantManifest { blob }, Some(bound)) => {
                let bytes = bound.blob(blob)?.encoded.to_vec();
                link.send(&Message::Manifest { blob, bytes })?;
            }
            (Message::Want { blob, first, count }, Some(bound)) => {
                send_chunks(shared, link, bound, blob, first, count)?;
            }
            (Message::WatchHave { blob }, Some(bound)) => send_haves(shared, link, bound, blob)?,
            (Message::WantFile { blob }, Some(bound)) => send_file(shared, link, bound, blob)?,
            (message, _) => {
                let text = format!("{message:?} is not a request, or no Hi came before it");
                return Err(StreamEnd::Refused { code: FailCode::Protocol, text: clip(text) });
            }
        }
    }
}

/// A source that could not be reached from here has dialled.
fn offered(shared: &Shared, proto: u16, grant: &[u8]) -> Result<Ended, StreamEnd> {
    check_proto(proto)?;
    match shared.holder.admit_offer(grant, Instant::now()) {
        Ok(source) => Ok(Ended::Offered { source }),
        Err(refusal) => Err(StreamEnd::Refused { code: refusal.code(), text: refusal.to_string() }),
    }
}

fn check_proto(proto: u16) -> Result<(), StreamEnd> {
    if proto == PROTO {
        return Ok(());
    }
    let text = format!("the peer speaks data protocol {proto}, this side {PROTO}");
    Err(StreamEnd::Refused { code: FailCode::Protocol, text })
}

fn greet(
    shared: &Shared,
    link: &mut dyn Link,
    proto: u16,
    base: Root,
    grant: &[u8],
) -> Result<Bound, StreamEnd> {
    check_proto(proto)?;
    let admitted = shared.holder.admit_in_time(grant, shared.limits.version_wait);
    let lease = admitted.map_err(|refusal| {
        let (code, text) = (refusal.code(), refusal.to_string());
        StreamEnd::Refused { code, text }
    })?;
    let bound = Bound { lease, base };
    let complete = bound.blob(BlobId::Image)?.ledger.is_full();
    let delta = bound.lease.held().blob(BlobId::Delta, base);
    let delta_complete = delta.as_ref().is_some_and(|d| d.ledger.is_full());
    let delta_bytes = delta.map_or(0, |d| d.manifest.image_bytes);
    link.send(&Message::Welcome { complete, delta_complete, delta_bytes })?;
    Ok(bound)
}

fn send_chunks(
    shared: &Shared,
    link: &mut dyn Link,
    bound: &Bound,
    id: BlobId,
    first: u32,
    count: u32,
) -> Result<(), StreamEnd> {
    let blob = bound.blob(id)?;
    if count > MAX_WANTED || first + count > blob.manifest.chunk_count() {
        let text = format!("chunks {first}+{count} of {}", blob.manifest.chunk_count());
        return Err(StreamEnd::Refused { code: FailCode::Protocol, text });
    }
    for index in first..first + count {
        await_chunk(shared, bound, &blob, index)?;
        let range = blob.manifest.chunk_range(index);
        let len = range.end - range.start;
        let header = Message::Chunk { blob: id, index, len: len as u32 };
        link.send_blob(&header, &blob, range)?;
        // Checked after as well: the pages may have changed under the send. The receiver's hash then
        // fails, and this tells it why.
        bound.check(&blob)?;
        bound.lease.held().count_sent(len);
    }
    Ok(())
}

/// Passes the memory itself to a process of this host, to read only. What is still on its way here is told
/// as it comes; the memory follows.
fn send_file(
    shared: &Shared,
    link: &mut dyn Link,
    bound: &Bound,
    id: BlobId,
) -> Result<(), StreamEnd> {
    if !shared.holder.passes_memory() {
        let text = "no memory is passed on: older versions are still used on this host".to_owned();
        return Err(StreamEnd::Refused { code: FailCode::NotHeld, text });
    }
    let blob = bound.blob(id)?;
    if !blob.ledger.is_full() {
        send_haves(shared, link, bound, id)?;
    }
    if !blob.ledger.is_full() {
        let text = format!("{} has not come here as a whole yet", bound.version());
        return Err(StreamEnd::Refused { code: FailCode::NotHeld, text });
    }
    let own = blob.file.get().ok_or_else(|| bound.revoked())?;
    let opened = File::open(descriptor_path(&own)).map_err(LinkError::Broken)?;
    // In this order: memory that is still this version's once it is open stays it, since nobody writes
    // to what others have open.
    bound.check(&blob)?;
    let len = blob.manifest.image_bytes;
    Ok(link.send_file(&Message::File { blob: id, len }, &opened)?)
}

/// Returns once the chunk may be sent.
fn await_chunk(shared: &Shared, bound: &Bound, blob: &Blob, index: u32) -> Result<(), StreamEnd> {
    let started = Instant::now();
    loop {
        bound.check(blob)?;
        if blob.ledger.contains(index) {
            return Ok(());
        }
        let left = shared.limits.chunk_wait.saturating_sub(started.elapsed());
        if left.is_zero() || shared.closing() {
            let text = format!("chunk {index} of {} has not come here yet", bound.version());
            return Err(StreamEnd::Refused { code: FailCode::NotHeld, text });
        }
        let known = blob.ledger.snapshot().count();
        blob.ledger.wait_beyond(known, left.min(HAVE_BEAT));
    }
}

/// Tells what arrives here until all is here; an empty `Have` per second shows that we live.
fn send_haves(
    shared: &Shared,
    link: &mut dyn Link,
    bound: &Bound,
    id: BlobId,
) -> Result<(), StreamEnd> {
    let blob = bound.blob(id)?;
    let mut told = ChunkSet::empty(blob.manifest.chunk_count());
    while !shared.closing() {
        bound.check(&blob)?;
        let now = blob.ledger.wait_beyond(told.count(), HAVE_BEAT);
        let mut news = now.clone();
        for index in told.iter() {
            news.remove(index);
        }
        for message in Message::have(&news.ranges()) {
            link.send(&message)?;
        }
        if news.is_empty() {
            link.send(&Message::Have { ranges: Vec::new() })?;
        }
        if now.is_full() {
            return Ok(());
        }
        told = now;
    }
    Ok(())
}

const HAVE_BEAT: Duration = Duration::from_secs(1);

fn clip(mut text: String) -> String {
    let end = (0..=text.len().min(200)).rev().find(|at| text.is_char_boundary(*at));
    text.truncate(end.unwrap_or(0));
    text
}

// === impl Bound ===

impl Bound {
    fn version(&self) -> Version {
        self.lease.held().version()
    }

    fn blob(&self, id: BlobId) -> Result<Blob, StreamEnd> {
        let found = self.lease.held().blob(id, self.base);
        found.ok_or_else(|| StreamEnd::Refused {
            code: FailCode::UnknownVersion,
            text: format!("no delta to {} from base {}", self.version(), self.base),
        })
    }

    fn check(&self, blob: &Blob) -> Result<(), StreamEnd> {
        if blob.stamp.is_valid() {
            return Ok(());
        }
        Err(self.revoked())
    }

    fn revoked(&self) -> StreamEnd {
        let text = format!("the memory of {} was given to a newer version", self.version());
        StreamEnd::Refused { code: FailCode::Revoked, text }
    }
}
