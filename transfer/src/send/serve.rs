//! The listener of a holder: one thread per stream. Owns its threads and ends them all when dropped; what
//! may be read is decided by `holder`, what is said on a stream stands in `session`.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use anabranch_proto::address::Address;

use crate::link::quic::QuicListener;
use crate::link::wire::Message;
use crate::link::{Closer, Link, LinkError};
use crate::send::holder::Holder;
use crate::send::listen::{Door, Listen, Listener, ServeError};

mod arrive;
mod feed;
mod local;
mod session;

use arrive::Arrived;
pub use feed::FeedOrder;
use local::LocalDoor;
use session::{Ended, StreamEnd};

/// Bounds of a server.
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
    addresses: Vec<Address>,
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
    local: Option<LocalDoor>,
    quic: Option<QuicListener>,
}

struct Shared {
    holder: Holder,
    limits: ServeLimits,
    door: Door,
    closing: AtomicBool,
    streams: Mutex<Streams>,
}

#[derive(Default)]
struct Streams {
    next: u64,
    open: BTreeMap<u64, Closer>,
    threads: Vec<JoinHandle<()>>,
    /// Threads that feed each receiver, by its first address.
    feeding: BTreeMap<Option<Address>, usize>,
}

// === impl Server ===

impl Server {
    /// Serves what `holder` lends, with the links that are safe at `listen`.
    pub fn start(
        listen: SocketAddr,
        holder: Holder,
        limits: ServeLimits,
    ) -> Result<Server, ServeError> {
        Server::serve(Listener::bind(&Listen::at(listen))?, holder, limits)
    }

    /// Serves what `holder` lends at the sockets of `listener`.
    pub fn serve(
        mut listener: Listener,
        holder: Holder,
        limits: ServeLimits,
    ) -> Result<Server, ServeError> {
        let (addr, addresses) = (listener.addr(), listener.addresses());
        let (closing, streams) = (AtomicBool::new(false), Mutex::default());
        let door = listener.door();
        let shared = Arc::new(Shared { holder, limits, door, closing, streams });
        let accept = listener.tcp.take().map(|tcp| {
            let accepting = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name("transfer-accept".into());
            builder.spawn(move || accept_loop(&accepting, &tcp)).map_err(ServeError::Thread)
        });
        let mut server = Server { addr, addresses, shared, accept: None, local: None, quic: None };
        server.accept = accept.transpose()?;
        server.quic = start_quic(listener, &server.shared)
            .map_err(|error| ServeError::Listen { addr, error })?;
        Ok(server)
    }

    /// A server without sockets, for processes that it is shared with (see [`Server::share`]).
    pub fn within_host(holder: Holder, limits: ServeLimits) -> Result<Server, ServeError> {
        Server::serve(Listener::nowhere(), holder, limits)
    }

    /// Also passes memory to processes of this host, at a socket of a [`crate::Staging`].
    pub fn share(&mut self, socket: &Path) -> Result<(), ServeError> {
        self.listen_locally(socket)?;
        self.shared.holder.pass_memory(true);
        Ok(())
    }

    /// The address listened on, with the port that the system chose for port 0.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Addresses that receivers dial, best first.
    pub fn addresses(&self) -> Vec<Address> {
        self.addresses.clone()
    }

    /// The versions that are served.
    pub fn holder(&self) -> &Holder {
        &self.shared.holder
    }

    /// Streams that are open now.
    pub fn open_streams(&self) -> usize {
        self.shared.lock().open.len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        if let Some(accept) = self.accept.take() {
            // A connection of our own wakes `accept`; should it fail, the thread ends with the process.
            let mut own = self.addr;
            if own.ip().is_unspecified() {
                own.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
            }
            if TcpStream::connect_timeout(&own, Duration::from_secs(1)).is_ok() {
                accept.join().ok();
            }
        }
        self.local = None;
        self.quic = None;
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

fn start_quic(listener: Listener, shared: &Arc<Shared>) -> io::Result<Option<QuicListener>> {
    let (Some(socket), Some(identity)) = (listener.udp, listener.identity) else {
        return Ok(None);
    };
    let serving = Arc::clone(shared);
    let accepted = Arc::new(move |link| serve_stream(&serving, Arrived::Link(link)));
    let limits = &shared.limits;
    QuicListener::start(socket, &identity, limits.streams, limits.progress, accepted).map(Some)
}

fn accept_loop(shared: &Arc<Shared>, listener: &TcpListener) {
    for stream in listener.incoming() {
        if shared.closing() {
            return;
        }
        match stream {
            Ok(socket) => serve_stream(shared, Arrived::Socket(socket)),
            // Out of descriptors, or gone again before it was accepted: others must still be served.
            Err(error) => tracing::warn!(%error, "could not accept a data stream"),
        }
    }
}

/// Serves a stream that was accepted, on a thread of its own.
fn serve_stream(shared: &Arc<Shared>, arrived: Arrived) {
    let mut streams = shared.lock();
    if shared.closing() {
        return;
    }
    streams.threads.retain(|t| !t.is_finished());
    let open = streams.open.len();
    let Some(handle) = arrived.closer().filter(|_| open < shared.limits.streams) else {
        drop(streams);
        return arrived.refuse(&shared.door, open);
    };
    let id = streams.next;
    streams.next += 1;
    streams.open.insert(id, handle);
    let serving = Arc::clone(shared);
    let spawned = std::thread::Builder::new()
        .name(format!("transfer-send-{id}"))
        .spawn(move || stream_task(&serving, id, arrived));
    match spawned {
        Ok(thread) => streams.threads.push(thread),
        Err(error) => {
            streams.open.remove(&id);
            tracing::warn!(%error, "no thread for a data stream");
        }
    }
}

fn stream_task(shared: &Shared, id: u64, arrived: Arrived) {
    let kept = arrived.open(shared).and_then(|link| serve_link(shared, link));
    shared.lock().open.remove(&id);
    if let Some((source, link)) = kept {
        shared.holder.inbound().put(&source, link);
    }
}

/// Serves a stream until it ends. Returns it with the source's name if its dialler offers it as a source.
fn serve_link(shared: &Shared, mut link: Box<dyn Link>) -> Option<(String, Box<dyn Link>)> {
    let peer = link.peer();
    match session::converse(shared, &mut *link, false) {
        Ok(Ended::Offered { source }) => return Some((source, link)),
        Ok(Ended::Closed) | Err(StreamEnd::Link(LinkError::Closed)) => {}
        Err(StreamEnd::Refused { code, text }) => {
            tracing::warn!(%peer, ?code, text, "refused a data stream");
            link.send(&Message::Fail { code, text }).ok();
        }
        Err(StreamEnd::Link(error)) => tracing::info!(%peer, %error, "data stream ended"),
    }
    None
}
