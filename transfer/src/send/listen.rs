//! Listening for receivers: a holder's sockets, its identity to those who dial, the links that it offers. Decides
//! by a connection's first byte what is spoken on it; what is read over it is decided by `serve`.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_proto::address::{Address, CertPin, HostPort};
use rustls::ServerConfig;

use crate::link::external::{self, Accept, RDMA_FIRST_BYTE};
use crate::link::identity::Identity;
use crate::link::tcp;
use crate::link::wire::{FailCode, Message};
use crate::link::{Link, LinkError, tls};

/// A way to move bytes that a listener can offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkKind {
    /// TCP in the clear: for loopback and for networks that nobody else is on.
    Tcp,
    /// TLS 1.3 over TCP; receivers pin the listener's certificate.
    Tls,
    /// QUIC on the UDP port of the same number, pinned as well: for lossy or long paths and NAT.
    Quic,
    /// Reads out of this process's memory through libfabric, in the clear: for a network that nobody else is
    /// on. Only in builds with the feature `rdma`.
    Rdma,
}

/// A text that names no link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown link {0:?}; known: tcp, tls, quic, rdma")]
pub struct UnknownLink(pub String);

/// An order to listen: the place, the links and the hosts to advertise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// The address to bind; with port 0 the system chooses.
    pub at: SocketAddr,
    /// Links to offer, best first, as receivers try them. Empty: tcp on loopback, tls anywhere else.
    pub links: Vec<LinkKind>,
    /// Hosts that receivers shall dial, as HOST or HOST:PORT. Empty: the address that is bound.
    pub advertise: Vec<String>,
}

/// Bound sockets that nobody serves yet; its addresses are good for as long as it, or its server, lives.
pub struct Listener {
    pub(crate) tcp: Option<TcpListener>,
    pub(crate) udp: Option<UdpSocket>,
    pub(crate) identity: Option<Identity>,
    at: SocketAddr,
    addresses: Vec<Address>,
    door: Door,
}

/// The links that a TCP connection may speak here.
#[derive(Clone)]
pub(crate) struct Door {
    plain: bool,
    tls: Option<Arc<ServerConfig>>,
    rdma: Option<Arc<dyn Accept>>,
}

/// Why versions cannot be served.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket cannot be bound.
    #[error(
        "cannot listen on {addr} for weight transfers: {error}; choose another address or port"
    )]
    Listen { addr: SocketAddr, error: io::Error },
    /// A host to advertise is no HOST or HOST:PORT.
    #[error(
        "`{host}` cannot be advertised: write HOST or HOST:PORT, with an IPv6 host in brackets"
    )]
    Advertise { host: String },
    /// The socket for this host cannot be bound.
    #[error("cannot listen at {path} for weight transfers within this host: {error}")]
    Local { path: PathBuf, error: io::Error },
    /// No certificate can be made.
    #[error("cannot make a certificate for the data plane: {0}")]
    Certificate(String),
    /// The fabric cannot be used.
    #[error("cannot offer rdma: {0}")]
    Rdma(LinkError),
    /// No thread can be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

// === impl LinkKind ===

impl FromStr for LinkKind {
    type Err = UnknownLink;

    fn from_str(text: &str) -> Result<LinkKind, UnknownLink> {
        match text {
            "tcp" => Ok(LinkKind::Tcp),
            "tls" => Ok(LinkKind::Tls),
            "quic" => Ok(LinkKind::Quic),
            "rdma" => Ok(LinkKind::Rdma),
            other => Err(UnknownLink(other.to_owned())),
        }
    }
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LinkKind::Tcp => "tcp",
            LinkKind::Tls => "tls",
            LinkKind::Quic => "quic",
            LinkKind::Rdma => "rdma",
        })
    }
}

// === impl Listen ===

impl Listen {
    /// An order to listen at `at` with the links that are safe there.
    pub fn at(at: SocketAddr) -> Listen {
        Listen { at, links: Vec::new(), advertise: Vec::new() }
    }

    /// True if receivers elsewhere are told an address that they can dial.
    pub fn is_dialable(&self) -> bool {
        !self.at.ip().is_unspecified() || !self.advertise.is_empty()
    }

    fn links(&self) -> Vec<LinkKind> {
        let mut links: Vec<LinkKind> = Vec::new();
        for link in &self.links {
            if !links.contains(link) {
                links.push(*link);
            }
        }
        let safe = if self.at.ip().is_loopback() { LinkKind::Tcp } else { LinkKind::Tls };
        if links.is_empty() { vec![safe] } else { links }
    }
}

// === impl Listener ===

impl Listener {
    /// Binds the sockets, and makes a certificate if a link needs one.
    pub fn bind(listen: &Listen) -> Result<Listener, ServeError> {
        let links = listen.links();
        let has = |link| links.contains(&link);
        let over_tcp = links.iter().any(|link| *link != LinkKind::Quic);
        let (tcp, udp, at) = bind(listen.at, over_tcp, has(LinkKind::Quic))
            .map_err(|error| ServeError::Listen { addr: listen.at, error })?;
        let pinned = has(LinkKind::Tls) || has(LinkKind::Quic);
        let certificate = |error: &dyn fmt::Display| ServeError::Certificate(error.to_string());
        let identity = pinned.then(Identity::generate).transpose();
        let identity = identity.map_err(|error| certificate(&error))?;
        let tls = identity.as_ref().filter(|_| has(LinkKind::Tls)).map(Identity::server_config);
        let tls = tls.transpose().map_err(|error| certificate(&error))?;
        let interface = Some(at.ip()).filter(|ip| !ip.is_unspecified());
        let rdma = has(LinkKind::Rdma).then(|| external::rdma()?.listen(interface)).transpose();
        let rdma = rdma.map_err(ServeError::Rdma)?.map(Arc::from);
        let door = Door { plain: has(LinkKind::Tcp), tls, rdma };
        if (door.plain || door.rdma.is_some()) && !at.ip().is_loopback() {
            tracing::warn!(
                %at, "weights are served in the clear here, as was asked for: whoever is on the path can read them"
            );
        }
        let addresses = addresses(&links, listen, at, identity.as_ref())?;
        Ok(Listener { tcp, udp, identity, at, addresses, door })
    }

    /// A listener without sockets, for a server that is found within its host only.
    pub(crate) fn nowhere() -> Listener {
        let (tcp, udp, identity, addresses) = (None, None, None, Vec::new());
        let (at, door) =
            ((Ipv4Addr::LOCALHOST, 0).into(), Door { plain: false, tls: None, rdma: None });
        Listener { tcp, udp, identity, at, addresses, door }
    }

    /// The address listened on, with the port that the system chose for port 0.
    pub fn addr(&self) -> SocketAddr {
        self.at
    }

    /// Addresses for receivers, best first: one for each link and advertised host.
    pub fn addresses(&self) -> Vec<Address> {
        self.addresses.clone()
    }

    pub(crate) fn door(&self) -> Door {
        self.door.clone()
    }
}

type Sockets = (Option<TcpListener>, Option<UdpSocket>, SocketAddr);

/// Binds the sockets, both on the same port.
fn bind(at: SocketAddr, tcp: bool, udp: bool) -> io::Result<Sockets> {
    let mut last = None;
    // The port that the system chose for one protocol may be taken in the other.
    for _ in 0..if at.port() == 0 { 16 } else { 1 } {
        let listener = if tcp { Some(TcpListener::bind(at)?) } else { None };
        let bound = listener.as_ref().map_or(Ok(at), TcpListener::local_addr)?;
        if !udp {
            return Ok((listener, None, bound));
        }
        match UdpSocket::bind(bound) {
            Ok(socket) => {
                let bound = socket.local_addr()?;
                return Ok((listener, Some(socket), bound));
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
}

fn addresses(
    links: &[LinkKind],
    listen: &Listen,
    at: SocketAddr,
    identity: Option<&Identity>,
) -> Result<Vec<Address>, ServeError> {
    let host = |host: &String| {
        let bad = || ServeError::Advertise { host: host.clone() };
        HostPort::with_port(host, at.port()).ok_or_else(bad)
    };
    let hosts: Vec<HostPort> = match listen.advertise.is_empty() {
        true => vec![at.into()],
        false => listen.advertise.iter().map(host).collect::<Result<_, _>>()?,
    };
    let pin = identity.map_or(CertPin([0; 32]), Identity::pin);
    let address = |link: &LinkKind, host: &HostPort| match link {
        LinkKind::Tcp => Address::Tcp(host.clone()),
        LinkKind::Tls => Address::Tls(host.clone(), pin),
        LinkKind::Quic => Address::Quic(host.clone(), pin),
        LinkKind::Rdma => Address::Rdma(host.clone()),
    };
    Ok(links.iter().flat_map(|link| hosts.iter().map(move |host| address(link, host))).collect())
}

// === impl Door ===

impl Door {
    /// A link over an accepted connection. Blocks until its peer has shown what it speaks.
    pub(crate) fn open(&self, socket: TcpStream, within: Duration) -> io::Result<Box<dyn Link>> {
        let until = Instant::now() + within;
        match (tls::first_byte(&socket, until)?, &self.tls, &self.rdma) {
            (tls::HANDSHAKE, Some(config), _) => tls::accept(socket, Arc::clone(config), until),
            (tls::HANDSHAKE, None, _) => Err(refuse(socket, NO_TLS)),
            (RDMA_FIRST_BYTE, _, Some(lender)) => lender.accept(socket),
            (RDMA_FIRST_BYTE, _, None) => Err(refuse(socket, NO_RDMA)),
            _ if self.plain => tcp::link(socket),
            (_, Some(_), _) => Err(refuse(socket, TLS_ONLY)),
            (_, None, _) => Err(refuse(socket, RDMA_ONLY)),
        }
    }

    pub(crate) fn is_plain(&self) -> bool {
        self.plain
    }
}

const TLS_ONLY: &str = "this listener takes TLS only: dial the address that it published \
    (tls://host:port#pin), or let it offer the link `tcp` as well";
const RDMA_ONLY: &str = "this listener takes rdma only: dial the address that it published \
    (rdma://host:port), or let it offer the link `tcp` as well";
const NO_TLS: &str = "this listener takes no TLS: dial the address that it published (host:port), \
    or let it offer the link `tls` as well";
const NO_RDMA: &str = "this listener takes no rdma: dial the address that it published, or let it offer \
    the link `rdma` as well";

/// A `Fail` in the clear, which either kind of peer shows to its user.
fn refuse(mut socket: TcpStream, text: &str) -> io::Error {
    let message = Message::Fail { code: FailCode::Protocol, text: text.to_owned() };
    let told = socket.set_write_timeout(Some(LINGER)).and_then(|()| {
        socket.write_all(&message.to_bytes())?;
        socket.shutdown(Shutdown::Write)
    });
    // Closed with bytes unread, it would be reset, and the peer would not see the answer.
    if told.is_ok() && socket.set_read_timeout(Some(LINGER)).is_ok() {
        io::copy(&mut socket.take(LINGER_BYTES), &mut io::sink()).ok();
    }
    io::Error::new(io::ErrorKind::Unsupported, text)
}

const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(at: &str, links: &[LinkKind], advertise: &[&str]) -> Listen {
        let advertise = advertise.iter().map(|s| (*s).to_owned()).collect();
        Listen { at: at.parse().expect("address"), links: links.to_vec(), advertise }
    }

    #[test]
    fn loopback_is_plain_and_any_other_place_is_encrypted_unless_it_was_said() {
        let links = |at: &str, links: &[LinkKind]| listen(at, links, &[]).links();
        assert_eq!(links("127.0.0.1:0", &[]), [LinkKind::Tcp]);
        assert_eq!(links("[::1]:0", &[]), [LinkKind::Tcp]);
        assert_eq!(links("0.0.0.0:0", &[]), [LinkKind::Tls]);
        assert_eq!(links("10.0.0.1:7", &[]), [LinkKind::Tls]);
        assert_eq!(links("0.0.0.0:0", &[LinkKind::Tcp]), [LinkKind::Tcp]);
        let twice = [LinkKind::Quic, LinkKind::Tls, LinkKind::Quic];
        assert_eq!(links("0.0.0.0:0", &twice), [LinkKind::Quic, LinkKind::Tls]);
    }

    #[test]
    fn addresses_name_the_link_the_advertised_host_and_the_certificate() {
        let links = [LinkKind::Tls, LinkKind::Quic, LinkKind::Tcp];
        let asked = listen("127.0.0.1:0", &links, &["gpu-1", "gpu-1.example:70", "fd00::1"]);
        let listener = Listener::bind(&asked).expect("bound");
        let port = listener.addr().port();
        let pin = listener.identity.as_ref().expect("pinned").pin();
        let got: Vec<String> = listener.addresses().iter().map(Address::to_string).collect();
        assert_eq!(got.len(), 9);
        assert_eq!(got[0], format!("tls://gpu-1:{port}#{pin}"));
        assert_eq!(got[4], format!("quic://gpu-1.example:70#{pin}"));
        assert_eq!(got[8], format!("[fd00::1]:{port}"));
    }

    #[test]
    fn an_unknown_link_is_named_with_those_that_are_known() {
        for kind in [LinkKind::Tcp, LinkKind::Tls, LinkKind::Quic, LinkKind::Rdma] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "udp".parse::<LinkKind>().expect_err("unknown").to_string();
        assert!(error.contains("\"udp\"") && error.contains("tcp, tls, quic"), "{error}");
    }
}
