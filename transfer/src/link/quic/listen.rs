//! The listening end: accepts connections and hands each of their streams over as a link.

use std::io;
use std::net::UdpSocket;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{AsyncUdpSocket, Connection, Endpoint, Incoming, ServerConfig, VarInt};
use tokio::task::JoinSet;

use super::{QuicStream, await_on, endpoint, runtime, transport};
use crate::link::Link;
use crate::link::identity::Identity;
use crate::link::quic::wait::Gate;

/// Must not block for long.
pub(crate) type Accepted = Arc<dyn Fn(Box<dyn Link>) + Send + Sync>;

/// Accepts until it is dropped.
pub(crate) struct QuicListener {
    open: Option<Open>,
    /// Gone when the port is free.
    socket: Weak<dyn AsyncUdpSocket>,
}

struct Open {
    endpoint: Endpoint,
    /// One task, which owns those of the connections.
    _accepting: JoinSet<()>,
}

/// Time for the last packets of closed connections.
const CLOSING: Duration = Duration::from_secs(1);

// === impl QuicListener ===

impl QuicListener {
    /// `streams` bounds the connections, and the streams of each. `progress`: how long a peer may be
    /// silent.
    pub(crate) fn start(
        socket: UdpSocket,
        identity: &Identity,
        streams: usize,
        progress: Duration,
        accepted: Accepted,
    ) -> io::Result<QuicListener> {
        let tls = identity.server_config().map_err(io::Error::other)?;
        let tls = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
        let mut config = ServerConfig::with_crypto(Arc::new(tls));
        let each = VarInt::from_u32(u32::try_from(streams).unwrap_or(u32::MAX));
        let mut transport = transport(progress);
        transport.max_concurrent_bidi_streams(each);
        config.transport_config(Arc::new(transport)).max_incoming(streams);
        let (endpoint, socket) = endpoint(socket, Some(config))?;
        let mut accepting = JoinSet::new();
        accepting.spawn_on(accept_task(endpoint.clone(), streams, accepted), runtime()?.handle());
        Ok(QuicListener { open: Some(Open { endpoint, _accepting: accepting }), socket })
    }
}

impl Drop for QuicListener {
    /// Peers learn of it at once. Returns when the port is free, if that is soon.
    fn drop(&mut self) {
        let until = Instant::now() + CLOSING;
        if let Some(Open { endpoint, .. }) = self.open.take() {
            endpoint.close(VarInt::from_u32(0), b"the holder closes");
            await_on(&Gate::default(), CLOSING, endpoint.wait_idle()).ok();
        }
        // quinn's own task lets go of it a moment after the last handle.
        while self.socket.strong_count() > 0 && Instant::now() < until {
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

async fn accept_task(endpoint: Endpoint, limit: usize, accepted: Accepted) {
    let mut connections = JoinSet::new();
    while let Some(incoming) = endpoint.accept().await {
        while connections.try_join_next().is_some() {}
        if connections.len() >= limit {
            tracing::warn!(open = connections.len(), "refused a QUIC connection: too many");
            incoming.refuse();
            continue;
        }
        connections.spawn(connection_task(incoming, Arc::clone(&accepted)));
    }
}

async fn connection_task(incoming: Incoming, accepted: Accepted) {
    let peer = incoming.remote_address();
    let connection = match incoming.await {
        Ok(connection) => connection,
        Err(error) => return tracing::info!(%peer, %error, "a QUIC handshake failed"),
    };
    let error = streams(&connection, &accepted).await;
    tracing::debug!(%peer, %error, "a QUIC connection ended");
}

async fn streams(connection: &Connection, accepted: &Accepted) -> quinn::ConnectionError {
    loop {
        match connection.accept_bi().await {
            Ok((send, recv)) => {
                accepted(QuicStream::link(send, recv, connection.remote_address(), None));
            }
            Err(error) => return error,
        }
    }
}
