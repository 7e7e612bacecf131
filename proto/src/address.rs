//! Addresses of the data plane: where a holder of weights is reached, and by which link. One parser and one
//! way to write them, for trainers, agents, relays and the manager that passes them on. Dialling is
//! `transfer`'s.
//!
//! ```text
//!   host:port                   tcp, in the clear
//!   tls://host:port#<sha256>    tcp in TLS 1.3, with the digest of the listener's certificate
//!   quic://host:port#<sha256>   QUIC on the UDP port of that number, with the digest
//!   rdma://host:port            tcp for messages, reads through libfabric for the bulk
//!   shm:/path/to/socket         a socket of this host, at which memory itself is passed
//!   file:/dir                   versions that were exported to a shared file system
//!   feed:<source>               nothing to dial: the source of that name dials its receiver
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// An address of the data plane. Text of an address is parsed with `str::parse` and written with `Display`;
/// each comes back as it was.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// A TCP listener, in the clear.
    Tcp(HostPort),
    /// A TCP listener that speaks TLS with one certificate.
    Tls(HostPort, CertPin),
    /// A QUIC listener with one certificate.
    Quic(HostPort, CertPin),
    /// A TCP listener that lends its memory over a fabric.
    Rdma(HostPort),
    /// A unix socket of the same host. The path is absolute.
    Shm(PathBuf),
    /// A directory of exported versions. The path is absolute.
    File(PathBuf),
    /// The name of a source that dials its receiver.
    Feed(String),
}

/// Host and TCP or UDP port, as a receiver resolves them. An IPv6 host stands in brackets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort(String);

/// SHA-256 of a listener's certificate, in DER. Written as 64 lower-case hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CertPin(pub [u8; 32]);

/// A text that is no address, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no address of the data plane: {why}")]
pub struct AddressError {
    /// The whole text.
    pub text: String,
    /// The fault, or what to write instead.
    pub why: &'static str,
}

const LACKS_PIN: &str =
    "it lacks #<sha256 of the certificate>; copy the whole address as it was published";
const BAD_PIN: &str = "what follows # is not a SHA-256 in hex (64 digits)";
const BAD_AUTHORITY: &str = "write host:port between the scheme and #";
const BAD_HOST_PORT: &str = "write host:port, with an IPv6 host in brackets";
const BAD_SOCKET: &str = "write shm:/PATH, with the socket's absolute path";
const BAD_DIR: &str = "write file:/DIR, with the directory's absolute path";
const BAD_SOURCE: &str = "write feed: and the name of the source";
const UNKNOWN: &str =
    "its link is unknown here; known: tls, quic, rdma, shm, file, feed, and host:port";

// === impl Address ===

impl Address {
    /// True for a socket of this host.
    pub fn is_within_host(&self) -> bool {
        matches!(self, Address::Shm(_))
    }

    /// The socket at which memory of this host is passed, if it is one.
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Address::Shm(path) => Some(path),
            _ => None,
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        let bad = |why| AddressError { text: text.to_owned(), why };
        let absolute = |path: &str| path.starts_with('/').then(|| PathBuf::from(path));
        match text.split_once(':') {
            Some(("shm", path)) => absolute(path).map(Address::Shm).ok_or(bad(BAD_SOCKET)),
            Some(("file", dir)) => absolute(dir).map(Address::File).ok_or(bad(BAD_DIR)),
            Some(("feed", "")) => Err(bad(BAD_SOURCE)),
            Some(("feed", source)) => Ok(Address::Feed(source.to_owned())),
            Some(("rdma", at)) => {
                HostPort::parse(authority(at)).map(Address::Rdma).ok_or(bad(BAD_HOST_PORT))
            }
            Some(("tls", rest)) => pinned(rest).map(|(at, pin)| Address::Tls(at, pin)).map_err(bad),
            Some(("quic", rest)) => {
                pinned(rest).map(|(at, pin)| Address::Quic(at, pin)).map_err(bad)
            }
            Some((_, rest)) if rest.starts_with("//") => Err(bad(UNKNOWN)),
            _ => HostPort::parse(text).map(Address::Tcp).ok_or(bad(BAD_HOST_PORT)),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(at) => at.fmt(f),
            Address::Tls(at, pin) => write!(f, "tls://{at}#{pin}"),
            Address::Quic(at, pin) => write!(f, "quic://{at}#{pin}"),
            Address::Rdma(at) => write!(f, "rdma://{at}"),
            Address::Shm(path) => write!(f, "shm:{}", path.display()),
            Address::File(dir) => write!(f, "file:{}", dir.display()),
            Address::Feed(source) => write!(f, "feed:{source}"),
        }
    }
}

/// Rest of the address after the scheme, without the two slashes.
fn authority(rest: &str) -> &str {
    rest.strip_prefix("//").unwrap_or(rest)
}

fn pinned(rest: &str) -> Result<(HostPort, CertPin), &'static str> {
    let (at, pin) = authority(rest).split_once('#').ok_or(LACKS_PIN)?;
    let mut digest = [0; 32];
    hex::decode_to_slice(pin, &mut digest).map_err(|_| BAD_PIN)?;
    Ok((HostPort::parse(at).ok_or(BAD_AUTHORITY)?, CertPin(digest)))
}

// === impl HostPort ===

impl HostPort {
    /// Reads `host:port`. `None` if the host is empty or holds what no host has, an IPv6 host has no
    /// brackets, or the port is none.
    pub fn parse(text: &str) -> Option<HostPort> {
        let (host, port) = text.rsplit_once(':')?;
        port.parse::<u16>().ok()?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let fits = match bracketed {
            // A zone may follow the address: fe80::1%eth0.
            Some(ip) => ip.split('%').next().is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok()),
            None => !host.is_empty() && !host.contains([':', '/', '#', '@', '[', ']', ' ']),
        };
        fits.then(|| HostPort(text.to_owned()))
    }

    /// `host`, or `host:port` where it names a port of its own, with `port` otherwise. `None` as for
    /// [`HostPort::parse`].
    pub fn with_port(host: &str, port: u16) -> Option<HostPort> {
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Some(HostPort::from(SocketAddr::new(ip, port)));
        }
        HostPort::parse(host).or_else(|| HostPort::parse(&format!("{host}:{port}")))
    }

    /// `host:port`, as the standard library resolves it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<SocketAddr> for HostPort {
    fn from(at: SocketAddr) -> HostPort {
        HostPort(at.to_string())
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for CertPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host() -> impl Strategy<Value = String> + Clone {
        prop_oneof![
            "[a-z0-9][a-z0-9.-]{0,20}",
            any::<std::net::Ipv4Addr>().prop_map(|ip| ip.to_string()),
            any::<Ipv6Addr>().prop_map(|ip| format!("[{ip}]")),
        ]
    }

    fn address() -> impl Strategy<Value = Address> {
        let at = (host(), any::<u16>())
            .prop_map(|(host, port)| HostPort::parse(&format!("{host}:{port}")).expect("valid"));
        let pin = any::<[u8; 32]>().prop_map(CertPin);
        let path = "/[a-zA-Z0-9._/#:-]{0,40}".prop_map(PathBuf::from);
        prop_oneof![
            at.clone().prop_map(Address::Tcp),
            (at.clone(), pin.clone()).prop_map(|(at, pin)| Address::Tls(at, pin)),
            (at.clone(), pin).prop_map(|(at, pin)| Address::Quic(at, pin)),
            at.prop_map(Address::Rdma),
            path.clone().prop_map(Address::Shm),
            path.prop_map(Address::File),
            "[ -~]{1,40}".prop_map(Address::Feed),
        ]
    }

    proptest! {
        #[test]
        fn an_address_comes_back_as_it_was_written(address in address()) {
            let text = address.to_string();
            prop_assert_eq!(text.parse::<Address>(), Ok(address));
        }

        #[test]
        fn a_text_that_parses_is_written_as_an_address_that_parses(text in "[ -~]{0,40}") {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse::<Address>(), Ok(address));
            }
        }
    }

    #[test]
    fn each_link_has_its_form_and_ipv6_hosts_stand_in_brackets() {
        let pin = "ab".repeat(32);
        for text in [
            "10.0.0.1:7000".to_owned(),
            "gpu-1.example:70".to_owned(),
            "[fd00::1]:7000".to_owned(),
            "[fe80::1%eth0]:7000".to_owned(),
            format!("tls://[fd00::1]:7000#{pin}"),
            format!("quic://gpu-1:7000#{pin}"),
            "rdma://[fd00::1]:7000".to_owned(),
            "shm:/dev/shm/anabranch-a.arena/socket".to_owned(),
            "file:/shared/weights".to_owned(),
            "feed:trainer".to_owned(),
        ] {
            assert_eq!(text.parse::<Address>().map(|a| a.to_string()), Ok(text));
        }
    }

    #[test]
    fn a_host_without_a_port_gets_one() {
        let with = |host| HostPort::with_port(host, 7).map(|at| at.to_string());
        assert_eq!(with("gpu-1").as_deref(), Some("gpu-1:7"));
        assert_eq!(with("gpu-1:70").as_deref(), Some("gpu-1:70"));
        assert_eq!(with("10.0.0.1").as_deref(), Some("10.0.0.1:7"));
        assert_eq!(with("fd00::1").as_deref(), Some("[fd00::1]:7"));
        assert_eq!(with("[fd00::1]").as_deref(), Some("[fd00::1]:7"));
        assert_eq!(with("[fd00::1]:70").as_deref(), Some("[fd00::1]:70"));
        assert_eq!(with("a/b"), None);
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_text_and_a_reason() {
        let pin = "ab".repeat(32);
        for (text, want) in [
            ("tls://h:1".to_owned(), "lacks #"),
            (format!("tls://h:1#{}", &pin[1..]), "64 digits"),
            (format!("quic://h#{pin}"), "host:port between"),
            (format!("quic://:1#{pin}"), "host:port between"),
            (format!("tls://h:70000#{pin}"), "host:port between"),
            ("rdma://h".to_owned(), "host:port"),
            ("fd00::1:7000".to_owned(), "brackets"),
            ("h".to_owned(), "host:port"),
            (String::new(), "host:port"),
            ("nixl://h:1".to_owned(), "known: tls, quic"),
            ("http://h:1".to_owned(), "known: tls, quic"),
            ("file:weights".to_owned(), "file:/DIR"),
            ("shm:socket".to_owned(), "shm:/PATH"),
            ("feed:".to_owned(), "name of the source"),
        ] {
            let error = text.parse::<Address>().expect_err("no address").to_string();
            assert!(error.contains(want) && error.contains(&text), "{want}: {error}");
        }
    }
}
