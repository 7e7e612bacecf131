//! One port for gRPC and HTTP/1.1, plain or TLS. The accept loop is our own, because neither axum's
//! nor tonic's offers keepalive, both protocols over TLS, and a shutdown that ends. The caller
//! brings the router.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::drain::Drain;
use crate::exit::Exit;
use crate::limits::{
    H2_CONNECTION_WINDOW_BYTES, H2_MAX_STREAMS, H2_STREAM_WINDOW_BYTES, KEEPALIVE_INTERVAL,
    KEEPALIVE_TIMEOUT,
};

/// Pause after a failed accept: a full file table empties only as connections end.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// Longest time that sent bytes may stay unacknowledged: finds HTTP/1.1 clients that are gone or
/// stopped.
const TCP_USER_TIMEOUT_MS: u32 = 30_000;

/// Bounds of [`serve`].
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// Time that open connections have after the drain was told to close; default 5 s.
    pub shutdown_deadline: Duration,
    /// Time from accept to the end of the TLS handshake; default 5 s.
    pub tls_timeout: Duration,
    /// Most connections at once, default 65,536; further clients wait in the kernel's backlog.
    pub max_connections: usize,
}

impl Default for ServeOptions {
    fn default() -> Self {
        ServeOptions {
            shutdown_deadline: Duration::from_secs(5),
            tls_timeout: Duration::from_secs(5),
            max_connections: 65_536,
        }
    }
}

/// Reason why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens at the port.
    #[error(
        "cannot listen on {addr}: the port is taken. `ss -ltnp 'sport = :{port}'` shows by whom; \
         stop that process or choose another port with --listen",
        port = port(.addr)
    )]
    InUse {
        /// Address as given.
        addr: String,
    },
    /// The process may not listen at the port.
    #[error(
        "cannot listen on {addr}: permission denied. Ports below 1024 need privileges; choose \
         another port with --listen"
    )]
    Denied {
        /// Address as given.
        addr: String,
    },
    /// Any other failure, such as an address that is not of this host.
    #[error("cannot listen on {addr}: {source}. --listen takes HOST:PORT of this host")]
    Other {
        /// Address as given.
        addr: String,
        /// Error of the operating system.
        source: io::Error,
    },
}

impl ListenError {
    /// Exit status 73: the listener cannot be created.
    pub fn exit_code(&self) -> u8 {
        Exit::CannotCreate.code()
    }
}

/// Listens on `addr`, `HOST:PORT`; port 0 takes a free one.
pub async fn bind(addr: &str) -> Result<TcpListener, ListenError> {
    TcpListener::bind(addr).await.map_err(|source| {
        let addr = addr.to_owned();
        match source.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse { addr },
            io::ErrorKind::PermissionDenied => ListenError::Denied { addr },
            _ => ListenError::Other { addr, source },
        }
    })
}

/// Serves `router` until `drain` is told to close, then open connections for at most
/// `shutdown_deadline` more. Handlers find the client's address as `ConnectInfo<SocketAddr>`. An
/// endless stream should watch the drain itself; a stream that does not is cut.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    tls: Option<Arc<ServerConfig>>,
    drain: Drain,
    options: ServeOptions,
) {
    let server = Arc::new(Server {
        http: http_builder(),
        router,
        tls: tls.map(TlsAcceptor::from),
        drain,
        options,
    });
    let permits = Arc::new(Semaphore::new(options.max_connections));
    let connections = TaskTracker::new();
    while let Some((tcp, peer, permit)) = server.next(&listener, &permits).await {
        let connection = server.clone().run(tcp, peer, permit);
        server.drain.spawn("connection", connections.track_future(connection));
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

struct Server {
    http: auto::Builder<TokioExecutor>,
    router: Router,
    tls: Option<TlsAcceptor>,
    drain: Drain,
    options: ServeOptions,
}

impl Server {
    /// The next client; `None` once the drain closes.
    async fn next(
        &self,
        listener: &TcpListener,
        permits: &Arc<Semaphore>,
    ) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        let accept = async {
            let permit = permits.clone().acquire_owned().await.expect("never closed");
            let (tcp, peer) = accept(listener).await;
            (tcp, peer, permit)
        };
        tokio::select! {
            biased;
            () = self.drain.cancelled() => None,
            client = accept => Some(client),
        }
    }

    /// Serves one connection from the first byte to the last; `_permit` counts the connection.
    async fn run(self: Arc<Self>, tcp: TcpStream, peer: SocketAddr, _permit: OwnedSemaphorePermit) {
        if let Err(error) = prepare(&tcp) {
            tracing::debug!(%peer, %error, "connection was lost before its first byte");
            return;
        }
        let Some(tls) = &self.tls else { return self.speak(tcp, peer).await };
        let handshake = tokio::time::timeout(self.options.tls_timeout, tls.accept(tcp));
        let handshake = tokio::select! {
            () = self.drain.cancelled() => return,
            handshake = handshake => handshake,
        };
        match handshake {
            Ok(Ok(stream)) => self.speak(stream, peer).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
        }
    }

    async fn speak<S>(&self, stream: S, peer: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let router = self.router.clone();
        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            router.clone().oneshot(request)
        });
        let io = TokioIo::new(stream);
        let mut connection = pin!(self.http.serve_connection_with_upgrades(io, service));
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.drain.cancelled() => {
                connection.as_mut().graceful_shutdown();
                match tokio::time::timeout(self.options.shutdown_deadline, connection).await {
                    Ok(ended) => ended,
                    Err(_) => return tracing::info!(%peer, "connection cut: shutdown deadline"),
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%peer, %error, "connection ended early");
        }
    }
}

/// HTTP settings. Both protocols get a timer: without one hyper ignores keepalive and header
/// timeouts.
fn http_builder() -> auto::Builder<TokioExecutor> {
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new());
    http.http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(H2_MAX_STREAMS);
    http
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(client) => return client,
            Err(error) if of_the_client(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections; trying again");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// True if the client gave up in the backlog: the next client may be fine.
fn of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | ConnectionRefused)
}

fn prepare(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    rustix::net::sockopt::set_tcp_user_timeout(tcp, TCP_USER_TIMEOUT_MS)?;
    Ok(())
}

fn port(addr: &str) -> &str {
    addr.rsplit(':').next().unwrap_or(addr)
}

#[cfg(test)]
mod tests;
