//! QUIC for paths that TCP does badly on: lossy, long, or through NAT. One bidirectional stream per link;
//! streams to the same peer share a connection, which ends with the last of them. quinn's tasks have a
//! small runtime of their own; transfer threads wait for them as for a socket.

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::pin::{Pin, pin};
use std::sync::{Arc, LazyLock, Mutex, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use anabranch_proto::address::{CertPin, HostPort};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{
    AsyncUdpSocket, ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig, ReadError,
    RecvStream, Runtime as _, SendStream, TokioRuntime, TransportConfig, VarInt, WriteError,
};
use tokio::runtime::{Builder, Runtime};

use super::identity::{NAME, Pinned};
use super::stream::{ByteStream, StreamLink};
use super::{Closer, Link, LinkError};

mod listen;
mod wait;

pub(crate) use listen::QuicListener;
use wait::{Gate, wait};

/// Threads for all connections of the process: encryption runs on them.
const WORKERS: usize = 2;
/// Bytes that one stream, and one connection, may have in flight: 1 Gbit/s over 100 ms.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 32 << 20;
/// A connection on which nothing arrives for so long is dead; both ends' word counts, the shorter one.
const IDLE_AT_LEAST: Duration = Duration::from_secs(10);
const IDLE_AT_MOST: Duration = Duration::from_secs(600);

struct QuicStream {
    send: SendStream,
    recv: RecvStream,
    gate: Arc<Gate>,
    patience: Duration,
    peer: SocketAddr,
    /// The shared connection, on the dialling side: it ends with its last stream.
    _shared: Option<Arc<Connection>>,
}

/// Connections of this process by the address they were dialled by. Weak: streams keep them.
#[derive(Default)]
struct Dialled {
    connections: Mutex<BTreeMap<(HostPort, CertPin), Weak<Connection>>>,
}

static RUNTIME: LazyLock<io::Result<Runtime>> = LazyLock::new(|| {
    Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name("transfer-quic")
        .enable_all()
        .build()
});

/// The socket that all dialled connections share.
static CLIENT: LazyLock<io::Result<Endpoint>> = LazyLock::new(|| {
    // Dual stack where the host has IPv6.
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    endpoint(socket, None).map(|(endpoint, _)| endpoint)
});

static DIALLED: LazyLock<Dialled> = LazyLock::new(Dialled::default);

// === dialling ===

/// A stream to the listener at `at`, if it shows the certificate that `pin` names.
pub(crate) fn connect(
    at: &HostPort,
    pin: CertPin,
    within: Duration,
) -> Result<Box<dyn Link>, LinkError> {
    let until = Instant::now() + within;
    let connection = DIALLED.connection((at, pin), within, until)?;
    let gate = Gate::default();
    let left = until.saturating_duration_since(Instant::now());
    let opened = await_on(&gate, left, connection.open_bi());
    let opened = opened.and_then(|opened| opened.map_err(lost));
    let (send, recv) = opened.map_err(|error| refused(at, within, error))?;
    let peer = connection.remote_address();
    Ok(QuicStream::link(send, recv, peer, Some(connection)))
}

fn refused(at: &HostPort, within: Duration, error: io::Error) -> LinkError {
    LinkError::Connect { addr: format!("quic://{at}"), within, error }
}

// === impl Dialled ===

impl Dialled {
    fn connection(
        &self,
        (at, pin): (&HostPort, CertPin),
        within: Duration,
        until: Instant,
    ) -> Result<Arc<Connection>, LinkError> {
        let key = (at.clone(), pin);
        if let Some(known) = self.live(&key) {
            return Ok(known);
        }
        let made = Arc::new(handshake(at, pin, within, until)?);
        // Another thread may have been as fast: its connection serves both.
        if let Some(known) = self.live(&key) {
            return Ok(known);
        }
        let mut connections = self.connections.lock().expect("held only to look and note");
        connections.retain(|_, known| known.strong_count() > 0);
        connections.insert(key, Arc::downgrade(&made));
        Ok(made)
    }

    fn live(&self, key: &(HostPort, CertPin)) -> Option<Arc<Connection>> {
        let connections = self.connections.lock().expect("held only to look and note");
        let known = connections.get(key).and_then(Weak::upgrade);
        known.filter(|connection| connection.close_reason().is_none())
    }
}

/// A connection to the first address of the name that answers, all by `until`.
fn handshake(
    at: &HostPort,
    pin: CertPin,
    within: Duration,
    until: Instant,
) -> Result<Connection, LinkError> {
    let resolve = |error| LinkError::Resolve { addr: at.to_string(), error };
    let mut last = io::Error::new(ErrorKind::AddrNotAvailable, "the name has no address");
    for candidate in at.as_str().to_socket_addrs().map_err(resolve)? {
        let verifier = Pinned::new(pin);
        match handshake_with(candidate, &verifier, within, until) {
            Ok(connection) => return Ok(connection),
            Err(error) => last = error,
        }
        if let Some(mismatch) = verifier.mismatch() {
            return Err(LinkError::Pin { addr: at.to_string(), mismatch });
        }
    }
    Err(refused(at, within, last))
}

fn handshake_with(
    candidate: SocketAddr,
    verifier: &Arc<Pinned>,
    within: Duration,
    until: Instant,
) -> io::Result<Connection> {
    let tls = verifier.client_config().map_err(io::Error::other)?;
    let tls = QuicClientConfig::try_from(tls).map_err(io::Error::other)?;
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(dialling(within)));
    let client = CLIENT.as_ref().map_err(again)?;
    // quinn takes the runtime of the thread that connects.
    let connecting = {
        let _inside = runtime()?.enter();
        client.connect_with(config, candidate, NAME).map_err(io::Error::other)?
    };
    let left = until.saturating_duration_since(Instant::now());
    await_on(&Gate::default(), left, connecting)?.map_err(lost)
}

fn await_on<T>(gate: &Gate, patience: Duration, future: impl Future<Output = T>) -> io::Result<T> {
    let mut future = pin!(future);
    wait(gate, patience, |cx| future.as_mut().poll(cx).map(Ok))
}

// === what both ends share ===

fn runtime() -> io::Result<&'static Runtime> {
    RUNTIME.as_ref().map_err(again)
}

/// An error that is kept, for each who meets it.
fn again(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

fn endpoint(
    socket: UdpSocket,
    server: Option<quinn::ServerConfig>,
) -> io::Result<(Endpoint, Weak<dyn AsyncUdpSocket>)> {
    let _inside = runtime()?.enter();
    let socket = TokioRuntime.wrap_udp_socket(socket)?;
    let seen = Arc::downgrade(&socket);
    let (config, tasks) = (EndpointConfig::default(), Arc::new(TokioRuntime));
    Ok((Endpoint::new_with_abstract_socket(config, server, socket, tasks)?, seen))
}

/// The size of datagrams is left to quinn: larger first guesses made no progress at all.
fn transport(progress: Duration) -> TransportConfig {
    let idle = progress.clamp(IDLE_AT_LEAST, IDLE_AT_MOST);
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(idle.try_into().expect("minutes at most")))
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(u64::from(CONNECTION_WINDOW))
        .datagram_receive_buffer_size(None);
    transport
}

/// Settings of the dialling side, which keeps a connection alive while it has streams.
fn dialling(progress: Duration) -> TransportConfig {
    let mut transport = transport(progress);
    transport.keep_alive_interval(Some(IDLE_AT_LEAST / 3));
    transport
}

fn lost(error: ConnectionError) -> io::Error {
    let kind = match &error {
        ConnectionError::TimedOut => ErrorKind::TimedOut,
        ConnectionError::ConnectionClosed(_)
        | ConnectionError::ApplicationClosed(_)
        | ConnectionError::Reset
        | ConnectionError::LocallyClosed => ErrorKind::ConnectionReset,
        _ => ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

// === impl QuicStream ===

impl QuicStream {
    fn link(
        send: SendStream,
        recv: RecvStream,
        peer: SocketAddr,
        shared: Option<Arc<Connection>>,
    ) -> Box<dyn Link> {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let (gate, patience) = (Arc::default(), Duration::MAX);
        Box::new(StreamLink::over(QuicStream { send, recv, gate, patience, peer, _shared: shared }))
    }
}

impl Read for QuicStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let recv = &mut self.recv;
        wait(&self.gate, self.patience, |cx| {
            recv.poll_read(cx, out).map_err(|error| match error {
                ReadError::ConnectionLost(error) => lost(error),
                ReadError::Reset(_) => ErrorKind::ConnectionReset.into(),
                other => io::Error::other(other),
            })
        })
    }
}

impl Write for QuicStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let send = &mut self.send;
        wait(&self.gate, self.patience, |cx| {
            Pin::new(&mut *send).poll_write(cx, bytes).map_err(|error| match error {
                WriteError::ConnectionLost(error) => lost(error),
                WriteError::Stopped(_) => ErrorKind::BrokenPipe.into(),
                other => io::Error::other(other),
            })
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ByteStream for QuicStream {
    fn peer(&self) -> String {
        format!("quic://{}", self.peer)
    }

    fn closer(&self) -> io::Result<Closer> {
        let gate = Arc::clone(&self.gate);
        Ok(Box::new(move || gate.shut()))
    }

    fn set_patience(&mut self, patience: Duration) -> io::Result<()> {
        self.patience = patience;
        Ok(())
    }

    fn is_idle(&mut self) -> bool {
        let recv = &mut self.recv;
        let read = wait(&self.gate, Duration::ZERO, |cx| {
            Poll::Ready(Ok(recv.poll_read(cx, &mut [0]).is_pending()))
        });
        read.is_ok_and(|pending| pending)
    }
}
