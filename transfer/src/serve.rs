//! The listener of a holder: one thread per stream, each bound to one version by a grant. Owns its
//! threads and ends them all when dropped; what may be read is decided by `holder`.
//!
//! ```text
//!   stream:  Greeting ── Hi admitted ──► Bound{lease, base} ── Hi (next version) ──► Bound
//!            any ── refusal, broken protocol, silence ──► closed (a Fail says why)
//! ```

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anabranch_proto::version::{Root, Version};

use crate::chunks::ChunkSet;
use crate::holder::{Blob, Holder, Lease};
use crate::link::tcp::TcpLink;
use crate::link::{Closer, Link, LinkError};
use crate::wire::{BlobId, FailCode, MAX_WANTED, Message, PROTO};

#[derive(Clone, Debug)]
pub struct ServeLimits {
    /// Streams at once: one thread each.
    pub streams: usize,
    /// A stream without a request for so long is closed.
    pub idle: Duration,
    /// A receiver that takes no byte for so long is dropped.
    pub progress: Duration,
    /// A wanted chunk that does not arrive here in this time is answered with `NotHeld`.
    pub chunk_wait: Duration,
    /// A version that is granted and does not begin to arrive here in this time is answered with
    /// `NotYet`. Less than what receivers wait for an answer.
    pub version_wait: Duration,
}

/// A listening holder.
pub struct Server {
    addr: SocketAddr,
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(
        "cannot listen on {addr} for weight transfers: {error}; choose another address or port"
    )]
    Listen { addr: SocketAddr, error: std::io::Error },
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

struct Shared {
    holder: Holder,
    limits: ServeLimits,
    closing: AtomicBool,
    streams: Mutex<Streams>,
}

#[derive(Default)]
struct Streams {
    next: u64,
    open: BTreeMap<u64, Closer>,
    threads: Vec<JoinHandle<()>>,
}

/// Why a stream ended that did not simply close.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("{code:?}: {text}")]
    Refused { code: FailCode, text: String },
}

// === impl Server ===

impl Server {
    pub fn start(
        listen: SocketAddr,
        holder: Holder,
        limits: ServeLimits,
    ) -> Result<Server, ServeError> {
        let failed = |error| ServeError::Listen { addr: listen, error };
        let listener = TcpListener::bind(listen).map_err(failed)?;
        let addr = listener.local_addr().map_err(failed)?;
        let streams = Mutex::default();
        let shared = Arc::new(Shared { holder, limits, closing: AtomicBool::new(false), streams });
        let accepting = Arc::clone(&shared);
        let accept = std::thread::Builder::new()
            .name("transfer-accept".into())
            .spawn(move || accept_loop(&accepting, &listener))
            .map_err(ServeError::Thread)?;
        Ok(Server { addr, shared, accept: Some(accept) })
    }

    /// Where it listens: with port 0, the port that was chosen.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn holder(&self) -> &Holder {
        &self.shared.holder
    }

    pub fn open_streams(&self) -> usize {
        self.shared.lock().open.len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        // A connection of our own wakes `accept`; should it fail, the thread ends with the process.
        let mut own = self.addr;
        if own.ip().is_unspecified() {
            own.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
        }
        let woken = TcpStream::connect_timeout(&own, Duration::from_secs(1)).is_ok();
        if let Some(accept) = self.accept.take().filter(|_| woken) {
            accept.join().ok();
        }
        let (open, threads) = {
            let mut streams = self.shared.lock();
            (std::mem::take(&mut streams.open), std::mem::take(&mut streams.threads))
        };
        for close in open.values() {
            close();
        }
        for thread in threads {
            thread.join().ok();
        }
    }
}

impl Default for ServeLimits {
    fn default() -> ServeLimits {
        ServeLimits {
            streams: 1024,
            idle: Duration::from_secs(600),
            progress: Duration::from_secs(30),
            chunk_wait: Duration::from_secs(10),
            version_wait: Duration::from_secs(3),
        }
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().expect("no holder of the streams' lock panics")
    }

    fn closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }
}

fn accept_loop(shared: &Arc<Shared>, listener: &TcpListener) {
    for stream in listener.incoming() {
        if shared.closing() {
            return;
        }
        match stream.and_then(TcpLink::over) {
            Ok(link) => serve_link(shared, Box::new(link)),
            // Out of descriptors, or gone again before it was accepted: others must still be served.
            Err(error) => tracing::warn!(%error, "could not accept a data stream"),
        }
    }
}

/// Serves a stream that was accepted, on a thread of its own.
fn serve_link(shared: &Arc<Shared>, mut link: Box<dyn Link>) {
    let mut streams = shared.lock();
    streams.threads.retain(|t| !t.is_finished());
    let open = streams.open.len();
    let Some(handle) = link.closer().ok().filter(|_| open < shared.limits.streams) else {
        drop(streams);
        let text = format!("{open} streams are open here already");
        link.set_patience(Duration::from_secs(1)).ok();
        link.send(&Message::Fail { code: FailCode::Busy, text }).ok();
        return;
    };
    let id = streams.next;
    streams.next += 1;
    streams.open.insert(id, handle);
    let serving = Arc::clone(shared);
    let spawned = std::thread::Builder::new()
        .name(format!("transfer-send-{id}"))
        .spawn(move || stream_task(&serving, id, link));
    match spawned {
        Ok(thread) => streams.threads.push(thread),
        Err(error) => {
            streams.open.remove(&id);
            tracing::warn!(%error, "no thread for a data stream");
        }
    }
}

fn stream_task(shared: &Shared, id: u64, mut link: Box<dyn Link>) {
    let peer = link.peer();
    match serve_stream(shared, &mut *link) {
        Ok(()) | Err(StreamEnd::Link(LinkError::Closed)) => {}
        Err(StreamEnd::Refused { code, text }) => {
            tracing::warn!(%peer, ?code, text, "refused a data stream");
            link.send(&Message::Fail { code, text }).ok();
        }
        Err(StreamEnd::Link(error)) => tracing::info!(%peer, %error, "data stream ended"),
    }
    shared.lock().open.remove(&id);
}

/// A stream bound to a version.
struct Bound {
    lease: Lease,
    base: Root,
}

fn serve_stream(shared: &Shared, link: &mut dyn Link) -> Result<(), StreamEnd> {
    let mut bound: Option<Bound> = None;
    link.set_patience(shared.limits.progress)?;
    loop {
        // Only a stream that showed a grant may idle.
        if bound.is_some() {
            link.set_patience(shared.limits.idle)?;
        }
        let message = match link.receive() {
            Err(LinkError::Stalled(_)) => return Ok(()),
            other => other?,
        };
        link.set_patience(shared.limits.progress)?;
        match (message, &bound) {
            (Message::Hi { proto, base, grant }, _) => {
                bound = Some(greet(shared, link, proto, base, &grant)?);
            }
            (Message::WantManifest { blob }, Some(bound)) => {
                let bytes = bound.blob(blob)?.encoded.to_vec();
                link.send(&Message::Manifest { blob, bytes })?;
            }
            (Message::Want { blob, first, count }, Some(bound)) => {
                send_chunks(shared, link, bound, blob, first, count)?;
            }
            (Message::WatchHave { blob }, Some(bound)) => send_haves(shared, link, bound, blob)?,
            (message, _) => {
                let text = format!("{message:?} is not a request, or no Hi came before it");
                return Err(StreamEnd::Refused { code: FailCode::Protocol, text: clip(text) });
            }
        }
    }
}

fn greet(
    shared: &Shared,
    link: &mut dyn Link,
    proto: u16,
    base: Root,
    grant: &[u8],
) -> Result<Bound, StreamEnd> {
    if proto != PROTO {
        let text = format!("the receiver speaks data protocol {proto}, this source {PROTO}");
        return Err(StreamEnd::Refused { code: FailCode::Protocol, text });
    }
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
        link.send_chunk(&header, &blob.file, range)?;
        // Checked after as well: the pages may have changed under the send. The receiver's hash then
        // fails, and this tells it why.
        bound.check(&blob)?;
        bound.lease.held().count_sent(len);
    }
    Ok(())
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
        let text = format!("the memory of {} was given to a newer version", self.version());
        Err(StreamEnd::Refused { code: FailCode::Revoked, text })
    }
}
