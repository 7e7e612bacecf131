//! Settings of an agent, parsed once into types that cannot be wrong.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anabranch_proto::LogprobsMode;
use anabranch_transfer::Listen;

/// Settings of one agent.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Address of the manager: `http(s)://host:port`, `host:port`, or `file:PATH` of what `manager
    /// --announce` wrote.
    pub manager: String,
    /// Join token; `None` on loopback.
    pub token: Option<String>,
    /// The engine.
    pub engine: EngineSpec,
    /// Id of the engine, stable over restarts; `None`: host name and engine port.
    pub id: Option<String>,
    /// Labels for placement.
    pub labels: BTreeMap<String, String>,
    /// Number of GPUs of the engine.
    pub gpus: u32,
    /// Listener where peers fetch weights from this agent; `None`: only agents of this host can.
    pub listen: Option<Listen>,
    /// Directory where weights are staged for the engine to read; default /dev/shm.
    pub staging: PathBuf,
    /// True if versions are taken over from other agents of this host, and passed to them, instead
    /// of copied.
    pub share: bool,
    /// Time that running samples have after SIGTERM; default 30 s.
    pub drain_deadline: Duration,
    /// The log-probabilities that the engine gives (`logprobs_mode` in vLLM); `None`: what the
    /// engine says, else tempered.
    pub logprobs_mode: Option<LogprobsMode>,
    /// True if the trainer loads this engine itself (NCCL, CUDA IPC) and attests the versions.
    pub weights_by_trainer: bool,
    /// API key, for engines started with `--api-key`.
    pub engine_api_key: Option<String>,
    /// Limit of unacknowledged tokens kept for re-attach, in bytes, default 64 MiB; above it the
    /// newest attempts are given back.
    pub buffer_bytes: usize,
    /// Time for a new engine process to answer; default 30 min.
    pub engine_start_timeout: Duration,
}

/// The engine: one that runs, or a command that starts one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineSpec {
    /// A server of the SGLang dialect that runs.
    Sglang(EngineUrl),
    /// A command that starts an engine, which the agent watches, restarts and stops.
    Command(Vec<String>),
    /// No engine: versions are fetched only to be served to others.
    Relay,
}

/// Address of an engine's HTTP API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineUrl {
    host: String,
    port: u16,
}

/// A setting that cannot be used; the message says what to write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadConfig {
    /// `--engine` without a kind.
    #[error("--engine {0:?}: write KIND=URL, as in sglang=http://127.0.0.1:30000")]
    NoKind(String),
    /// A vLLM engine, which this release does not speak to.
    #[error(
        "--engine vllm=...: this version speaks the SGLang dialect only; vLLM comes with a later release \
         (engine/vllm.rs). Use an SGLang server or `anabranch engine`"
    )]
    Vllm,
    /// `--engine` of an unknown kind.
    #[error("--engine {0}=...: unknown kind of engine; known: sglang")]
    UnknownKind(String),
    /// An engine address that cannot be read.
    #[error(
        "engine address {0:?}: write http://HOST:PORT (https is not spoken to engines: keep them on loopback)"
    )]
    Url(String),
    /// No words after `--`.
    #[error("the command after -- is empty")]
    EmptyCommand,
    /// A command without a port.
    #[error(
        "cannot tell which port `{0}` will listen on: add --port PORT (or --listen ADDR for `anabranch engine`)"
    )]
    NoPort(String),
    /// `--listen` on an address that no peer can dial.
    #[error(
        "--listen {0} is no address that receivers can dial: name one with --advertise HOST or HOST:PORT"
    )]
    NoAddress(SocketAddr),
    /// An engine id that is too long or not printable.
    #[error("engine id {0:?}: use 1 to {max} printable characters without spaces", max = anabranch_proto::limits::MAX_ID_BYTES)]
    Id(String),
}

// === impl AgentConfig ===

impl AgentConfig {
    /// Settings with defaults for everything else.
    pub fn new(manager: impl Into<String>, engine: EngineSpec) -> AgentConfig {
        AgentConfig {
            manager: manager.into(),
            token: None,
            engine,
            id: None,
            labels: BTreeMap::new(),
            gpus: 0,
            listen: None,
            staging: PathBuf::from("/dev/shm"),
            share: true,
            drain_deadline: Duration::from_secs(30),
            logprobs_mode: None,
            weights_by_trainer: false,
            engine_api_key: None,
            buffer_bytes: 64 << 20,
            engine_start_timeout: Duration::from_secs(1800),
        }
    }
}

// === impl EngineSpec ===

impl EngineSpec {
    /// Reads `--engine KIND=URL`.
    pub fn parse(text: &str) -> Result<EngineSpec, BadConfig> {
        let (kind, url) = text.split_once('=').ok_or_else(|| BadConfig::NoKind(text.to_owned()))?;
        match kind {
            "sglang" => Ok(EngineSpec::Sglang(url.parse()?)),
            "vllm" => Err(BadConfig::Vllm),
            other => Err(BadConfig::UnknownKind(other.to_owned())),
        }
    }

    /// Takes the words after `--`, a command that starts an engine.
    pub fn command(words: Vec<String>) -> Result<EngineSpec, BadConfig> {
        match words.is_empty() {
            true => Err(BadConfig::EmptyCommand),
            false => Ok(EngineSpec::Command(words)),
        }
    }
}

// === impl EngineUrl ===

impl EngineUrl {
    /// The address `host`:`port`.
    pub fn new(host: impl Into<String>, port: u16) -> EngineUrl {
        EngineUrl { host: host.into(), port }
    }

    /// The address as `host:port`.
    pub fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address to dial a server that listens here: the unspecified address is this host.
    pub fn reachable(self) -> EngineUrl {
        match self.host.as_str() {
            "0.0.0.0" | "::" => EngineUrl { host: "127.0.0.1".to_owned(), ..self },
            _ => self,
        }
    }
}

impl FromStr for EngineUrl {
    type Err = BadConfig;

    fn from_str(text: &str) -> Result<EngineUrl, BadConfig> {
        let bad = || BadConfig::Url(text.to_owned());
        let rest = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let (host, port) = rest.rsplit_once(':').ok_or_else(bad)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
        if host.is_empty() || !host.chars().all(allowed) {
            return Err(bad());
        }
        Ok(EngineUrl::new(host, port.parse().map_err(|_| bad())?))
    }
}

impl fmt::Display for EngineUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.authority())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_urls_are_read_with_and_without_a_scheme_and_refused_with_a_reason() {
        let url = |text: &str| text.parse::<EngineUrl>().map(|url| url.to_string());
        assert_eq!(url("http://10.0.0.1:30000/"), Ok("http://10.0.0.1:30000".into()));
        assert_eq!(url("localhost:1"), Ok("http://localhost:1".into()));
        assert_eq!(url("http://[::1]:80"), Ok("http://[::1]:80".into()));
        for bad in ["https://h:1", "h", "h:x", ":1", "h:70000", "a b:1", "http://u@h:1"] {
            assert_eq!(url(bad), Err(BadConfig::Url(bad.into())), "{bad}");
        }
    }

    #[test]
    fn vllm_is_refused_by_name() {
        let error = EngineSpec::parse("vllm=http://h:1").expect_err("not yet");
        assert!(error.to_string().contains("engine/vllm.rs"));
        assert_eq!(EngineSpec::parse("h:1"), Err(BadConfig::NoKind("h:1".into())));
        assert_eq!(EngineSpec::parse("tgi=h:1"), Err(BadConfig::UnknownKind("tgi".into())));
    }
}
