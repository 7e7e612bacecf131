//! The manager's settings: [`RawConfig`] is the file, [`ManagerConfig`] is what cannot be wrong.
//! What the deciding core is tuned by stands in `core/config.rs`.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use anabranch_runtime::Exit;
use serde::Deserialize;

use crate::core::config::CoreConfig;

/// Address at which clients look unless told otherwise.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:5000";

/// As written in a TOML file; flags of the command line overwrite fields of it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawConfig {
    /// HOST:PORT; port 0 takes a free one.
    pub listen: Option<String>,
    /// Holds the certificate authority and the hashes of tokens. Used only with TLS.
    pub state_dir: Option<PathBuf>,
    /// File that tells others on a shared disk where the manager is.
    pub announce: Option<PathBuf>,
    /// Listen off loopback without TLS and tokens.
    pub insecure: bool,
    /// Unset: on wherever the listener is not loopback.
    pub tls: Option<bool>,
    /// Names and addresses for the certificate, beside the obvious ones.
    pub tls_names: Vec<String>,
    /// `ipc:///PATH` or `tcp://127.0.0.1:PORT`: events on a ZeroMQ PUB socket.
    pub zmq: Option<String>,
    /// Locks of the token ledger. Unset: twice the cores.
    pub ledger_shards: Option<usize>,
    /// How often agents send what was made. Default 20.
    pub tick_ms: Option<u32>,
    pub core: CoreConfig,
}

#[derive(Clone, Debug)]
pub struct ManagerConfig {
    pub listen: SocketAddr,
    pub state_dir: PathBuf,
    pub announce: Option<PathBuf>,
    pub insecure: bool,
    pub tls: bool,
    pub tls_names: Vec<String>,
    pub zmq: Option<FeedAt>,
    pub ledger_shards: usize,
    pub tick: Duration,
    pub core: CoreConfig,
}

/// An address of the event feed that only this host can reach: ZeroMQ PUB has no authentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedAt(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSettings {
    #[error("listen = {text:?} is not HOST:PORT of this host: {why}")]
    Listen { text: String, why: String },
    #[error(
        "zmq = {text:?} is refused: the ZeroMQ feed has no authentication, so it takes ipc:///PATH or \
         tcp://127.0.0.1:PORT only. From other hosts read GET /events"
    )]
    Feed { text: String },
    #[error("{key} = {value} is out of range: {allowed}")]
    Range { key: &'static str, value: u64, allowed: &'static str },
}

impl InvalidSettings {
    pub fn exit_code(&self) -> u8 {
        Exit::Usage.code()
    }
}

// === impl ManagerConfig ===

impl Default for ManagerConfig {
    fn default() -> Self {
        Self::try_from(RawConfig::default()).expect("the defaults are valid")
    }
}

impl TryFrom<RawConfig> for ManagerConfig {
    type Error = InvalidSettings;

    fn try_from(raw: RawConfig) -> Result<Self, InvalidSettings> {
        let listen = address(raw.listen.as_deref().unwrap_or(DEFAULT_LISTEN))?;
        let loopback = listen.ip().to_canonical().is_loopback();
        check_times(&raw.core)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            listen,
            state_dir: raw.state_dir.unwrap_or_else(default_state_dir),
            announce: raw.announce,
            insecure: raw.insecure,
            tls: raw.tls.unwrap_or(!loopback && !raw.insecure),
            tls_names: raw.tls_names,
            zmq: raw.zmq.as_deref().map(FeedAt::parse).transpose()?,
            ledger_shards: ranged(
                "ledger_shards",
                raw.ledger_shards,
                2 * cores,
                4096,
                "1 to 4096",
            )?,
            tick: tick(raw.tick_ms)?,
            core: raw.core,
        })
    }
}

fn address(text: &str) -> Result<SocketAddr, InvalidSettings> {
    let wrong = |why: String| InvalidSettings::Listen { text: text.to_owned(), why };
    let mut found = text.to_socket_addrs().map_err(|error| wrong(error.to_string()))?;
    found.next().ok_or_else(|| wrong("the name has no address".to_owned()))
}

fn tick(ms: Option<u32>) -> Result<Duration, InvalidSettings> {
    let ms = ranged("tick_ms", ms.map(|ms| ms as usize), 20, 1000, "1 to 1000")?;
    Ok(Duration::from_millis(ms as u64))
}

fn ranged(
    key: &'static str,
    value: Option<usize>,
    default: usize,
    most: usize,
    allowed: &'static str,
) -> Result<usize, InvalidSettings> {
    match value.unwrap_or(default) {
        value if (1..=most).contains(&value) => Ok(value),
        value => Err(InvalidSettings::Range { key, value: value as u64, allowed }),
    }
}

/// A lease below the beat of agents (and of our own heartbeat) would expire at rest.
fn check_times(core: &CoreConfig) -> Result<(), InvalidSettings> {
    let least = |key, value, least, allowed| {
        let low = value < least;
        if low { Err(InvalidSettings::Range { key, value, allowed }) } else { Ok(()) }
    };
    least("core.lease_ms", core.lease_ms, 500, "at least 500")?;
    least("core.progress_ms", core.progress_ms, 100, "at least 100")?;
    least("core.first_token_ms", core.first_token_ms, 100, "at least 100")?;
    least("core.admission_tokens", core.admission_tokens, 1, "at least 1")
}

/// `$XDG_STATE_HOME/anabranch`, `~/.local/state/anabranch`, or `./.anabranch` where there is no home.
fn default_state_dir() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_STATE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".local/state")))
        .map_or_else(|| PathBuf::from(".anabranch"), |base| base.join("anabranch"))
}

// === impl FeedAt ===

impl FeedAt {
    pub fn parse(text: &str) -> Result<Self, InvalidSettings> {
        let refused = || InvalidSettings::Feed { text: text.to_owned() };
        if text.strip_prefix("ipc://").is_some_and(|path| path.starts_with('/') && path.len() > 1) {
            return Ok(Self(text.to_owned()));
        }
        let at = text.strip_prefix("tcp://").ok_or_else(refused)?;
        let at: SocketAddr = at.parse().map_err(|_| refused())?;
        if !at.ip().to_canonical().is_loopback() {
            return Err(refused());
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ManagerConfig, String> {
        let raw: RawConfig =
            anabranch_runtime::config::parse(text, "m.toml").map_err(|error| error.to_string())?;
        ManagerConfig::try_from(raw).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_loopback_without_tls() {
        let config = read("").expect("valid");
        assert_eq!(config.listen.to_string(), DEFAULT_LISTEN);
        assert!(!config.tls);
        assert_eq!(config.tick, Duration::from_millis(20));
    }

    #[test]
    fn another_address_gets_tls_unless_told_otherwise() {
        assert!(read("listen = '0.0.0.0:5000'").expect("valid").tls);
        assert!(!read("listen = '0.0.0.0:5000'\ninsecure = true").expect("valid").tls);
        assert!(read("tls = true").expect("valid").tls);
    }

    #[test]
    fn each_mistake_is_named() {
        for (text, says) in [
            ("lisen = 'x'", "unknown field `lisen`"),
            ("listen = 'nowhere'", "not HOST:PORT"),
            ("zmq = 'tcp://0.0.0.0:5556'", "no authentication"),
            ("zmq = 'tcp://10.0.0.1:5556'", "GET /events"),
            ("zmq = 'ipc://'", "ipc:///PATH"),
            ("tick_ms = 0", "tick_ms = 0 is out of range: 1 to 1000"),
            ("ledger_shards = 0", "1 to 4096"),
            ("[core]\nlease_ms = 10", "core.lease_ms = 10 is out of range: at least 500"),
            ("[core]\nleese_ms = 10", "unknown field `leese_ms`"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn the_feed_takes_ipc_and_loopback() {
        for text in ["ipc:///run/ab.sock", "tcp://127.0.0.1:5556", "tcp://[::1]:5556"] {
            assert_eq!(FeedAt::parse(text).expect("valid").as_str(), text);
        }
    }
}
