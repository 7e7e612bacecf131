//! Dialling a manager: plain or TLS by pin, with the keepalive that finds a stopped peer within 5
//! s. The channel dials again by itself after a loss; the caller decides when to give up.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::Channel;

use crate::endpoint::{Authority, Endpoint, EndpointError};
use crate::exit::Exit;
use crate::limits::{
    H2_CONNECTION_WINDOW_BYTES, H2_STREAM_WINDOW_BYTES, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT,
};
use crate::tls::{PinMismatch, pinned_client_config};
use crate::token::JoinToken;

/// Time for one dial, from the first packet to the end of the TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Reason why no manager was reached. Sources are shared, because gRPC clones its errors.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address or the announce file cannot be used.
    #[error(transparent)]
    Endpoint(Arc<EndpointError>),
    /// A TLS address without a join token: no certificate could be checked.
    #[error(
        "{to} uses TLS and needs a join token, which says whom to trust; \
         pass the one that the manager printed, or `anabranch manager token`"
    )]
    NeedsToken {
        /// Address as the user wrote it.
        to: String,
    },
    /// The host name has no address.
    #[error("cannot find the host of {to}: {source}. Check its spelling and this host's DNS")]
    Dns {
        /// Address as the user wrote it.
        to: String,
        /// Error of the resolver.
        source: Arc<io::Error>,
    },
    /// The host answers, but no process listens at the port.
    #[error("nothing listens at {to}: connection refused. Is the manager running, on this port?")]
    Refused {
        /// Address as the user wrote it.
        to: String,
    },
    /// The dial took too long.
    #[error(
        "no answer from {to} within {CONNECT_TIMEOUT:?}. Check the address and the firewalls in \
         between"
    )]
    Timeout {
        /// Address as the user wrote it.
        to: String,
    },
    /// The listener is another one than the join token names.
    #[error(
        "{to} is not the manager that this join token was made for: {source}. Use a token of this \
         manager; if its state directory was replaced, its old tokens are void"
    )]
    WrongPin {
        /// Address as the user wrote it.
        to: String,
        /// The certificates expected and sent.
        source: PinMismatch,
    },
    /// The TLS handshake failed for another reason than the certificate.
    #[error(
        "{to} does not complete a TLS handshake: {source}. If the manager listens without TLS, \
         dial http:// instead"
    )]
    Tls {
        /// Address as the user wrote it.
        to: String,
        /// Error of the handshake.
        source: Arc<io::Error>,
    },
    /// Any other failure of the network.
    #[error("cannot reach {to}: {source}")]
    Io {
        /// Address as the user wrote it.
        to: String,
        /// Error of the operating system.
        source: Arc<io::Error>,
    },
    /// The connection stands, but HTTP/2 does not start.
    #[error(
        "{to} accepted the connection but does not speak HTTP/2: {source}. With TLS? Then dial https://"
    )]
    Http {
        /// Address as the user wrote it.
        to: String,
        /// Error of the HTTP/2 client.
        source: Arc<tonic::transport::Error>,
    },
}

impl ConnectError {
    /// Exit status for a process that cannot go on without the manager.
    pub fn exit_code(&self) -> u8 {
        match self {
            ConnectError::Endpoint(_) | ConnectError::NeedsToken { .. } => Exit::Usage.code(),
            ConnectError::WrongPin { .. } => Exit::NoPermission.code(),
            ConnectError::Tls { .. } | ConnectError::Http { .. } => Exit::Protocol.code(),
            ConnectError::Dns { .. }
            | ConnectError::Refused { .. }
            | ConnectError::Timeout { .. }
            | ConnectError::Io { .. } => Exit::Unavailable.code(),
        }
    }

    /// False if only a person can help: a missing or wrong token, an address that cannot be read.
    pub fn may_retry(&self) -> bool {
        match self {
            ConnectError::Endpoint(error) => {
                matches!(**error, EndpointError::NoFile { .. } | EndpointError::BadFile { .. })
            }
            ConnectError::NeedsToken { .. } | ConnectError::WrongPin { .. } => false,
            _ => true,
        }
    }
}

/// Dials `uri` (`http://`, `https://` or `file:`, see [`Endpoint`]). `token` is preferred to the
/// announce file's.
pub async fn connect(uri: &str, token: Option<&JoinToken>) -> Result<Channel, ConnectError> {
    let endpoint = Endpoint::parse(uri).map_err(from_endpoint)?;
    connect_to(&endpoint, token).await
}

/// Dials `endpoint`, as [`connect`] does.
pub async fn connect_to(
    endpoint: &Endpoint,
    token: Option<&JoinToken>,
) -> Result<Channel, ConnectError> {
    let (to, announced) = endpoint.resolve().map_err(from_endpoint)?;
    let dialler = Dialler::new(to, token.or(announced.as_ref()))?;
    // The scheme here is only a label: the dialler brings its own TLS.
    let address = format!("http://{}", dialler.at);
    let target = dialler.to.clone();
    let transport = tonic::transport::Endpoint::from_shared(address)
        .map_err(|source| ConnectError::Http { to: target.clone(), source: Arc::new(source) })?
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES);
    let connector = tower::service_fn(move |_: Uri| {
        let dialler = dialler.clone();
        async move { dialler.dial().await.map(TokioIo::new) }
    });
    transport.connect_with_connector(connector).await.map_err(|error| {
        dial_error(&error)
            .unwrap_or_else(|| ConnectError::Http { to: target, source: Arc::new(error) })
    })
}

/// Address and trust of one manager, for the first connection and every later one.
#[derive(Clone)]
struct Dialler {
    /// Address as the user wrote it.
    to: String,
    at: Authority,
    tls: Option<Arc<ClientConfig>>,
}

/// A plain TCP stream, or TLS over TCP.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Dialler {
    fn new(endpoint: Endpoint, token: Option<&JoinToken>) -> Result<Dialler, ConnectError> {
        let to = endpoint.to_string();
        match endpoint {
            Endpoint::Plain(at) => Ok(Dialler { to, at, tls: None }),
            Endpoint::Tls(at) => {
                let token = token.ok_or_else(|| ConnectError::NeedsToken { to: to.clone() })?;
                Ok(Dialler { to, at, tls: Some(Arc::new(pinned_client_config(token.ca()))) })
            }
            Endpoint::File(path) => Err(from_endpoint(EndpointError::Loop { path })),
        }
    }

    async fn dial(&self) -> Result<Box<dyn Stream>, ConnectError> {
        match tokio::time::timeout(CONNECT_TIMEOUT, self.open()).await {
            Ok(result) => result,
            Err(_) => Err(ConnectError::Timeout { to: self.to.clone() }),
        }
    }

    async fn open(&self) -> Result<Box<dyn Stream>, ConnectError> {
        let to = || self.to.clone();
        let at = (self.at.host.as_str(), self.at.port);
        let found = tokio::net::lookup_host(at).await;
        let addrs: Vec<_> = found
            .map_err(|source| ConnectError::Dns { to: to(), source: Arc::new(source) })?
            .collect();
        let tcp = TcpStream::connect(&addrs[..]).await.map_err(|source| self.tcp_error(source))?;
        tcp.set_nodelay(true).map_err(|source| self.tcp_error(source))?;
        let Some(config) = &self.tls else { return Ok(Box::new(tcp)) };
        let name = ServerName::try_from(self.at.host.clone())
            .map_err(|e| ConnectError::Dns { to: to(), source: Arc::new(io::Error::other(e)) })?;
        match TlsConnector::from(config.clone()).connect(name, tcp).await {
            Ok(tls) => Ok(Box::new(tls)),
            Err(error) => Err(self.tls_error(error)),
        }
    }

    fn tcp_error(&self, source: io::Error) -> ConnectError {
        let to = self.to.clone();
        match source.kind() {
            io::ErrorKind::ConnectionRefused => ConnectError::Refused { to },
            _ => ConnectError::Io { to, source: Arc::new(source) },
        }
    }

    fn tls_error(&self, source: io::Error) -> ConnectError {
        let to = self.to.clone();
        match pin_mismatch(&source) {
            Some(mismatch) => ConnectError::WrongPin { to, source: mismatch },
            None => ConnectError::Tls { to, source: Arc::new(source) },
        }
    }
}

fn pin_mismatch(error: &io::Error) -> Option<PinMismatch> {
    let inner = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) = inner else {
        return None;
    };
    other.0.downcast_ref::<PinMismatch>().cloned()
}

/// The [`ConnectError`] inside the wrappers that gRPC put around it.
fn dial_error(error: &tonic::transport::Error) -> Option<ConnectError> {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(ours) = error.downcast_ref::<ConnectError>() {
            return Some(ours.clone());
        }
        cause = error.source();
    }
    None
}

fn from_endpoint(error: EndpointError) -> ConnectError {
    ConnectError::Endpoint(Arc::new(error))
}
