//! What an agent is told at its start, parsed once into types that cannot be wrong.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anabranch_proto::pb;
use anabranch_transfer::Listen;

#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// `http(s)://host:port`, `host:port`, or `file:PATH` of what `manager --announce` wrote.
    pub manager: String,
    /// Join token; none is needed on loopback.
    pub token: Option<String>,
    pub engine: EngineSpec,
    /// The engine's name, stable over restarts; `None`: host name and engine port.
    pub id: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub gpus: u32,
    /// Where and how peers fetch weights from this agent; `None`: it serves none.
    pub listen: Option<Listen>,
    /// Where weights are staged for the engine to read.
    pub staging: PathBuf,
    /// Versions are taken over from other agents of this host, and passed to them, instead of
    /// copied.
    pub share: bool,
    /// How long running samples may go on after SIGTERM.
    pub drain_deadline: Duration,
    /// `None`: what the engine says, else tempered.
    pub logprob_convention: Option<Convention>,
    /// The trainer loads this engine itself (NCCL, CUDA IPC) and attests the versions.
    pub weights_by_trainer: bool,
    /// For engines started with `--api-key`.
    pub engine_api_key: Option<String>,
    /// Unacknowledged tokens kept for re-attach, in bytes; above it the newest samples are given
    /// back.
    pub buffer_bytes: usize,
    /// How long a new engine process may take until it answers.
    pub engine_start_timeout: Duration,
}

/// Which engine: one that runs, or a command that starts one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineSpec {
    Sglang(EngineUrl),
    /// Started, watched, restarted and stopped by the agent.
    Command(Vec<String>),
    /// None: versions are fetched only to be served to others.
    Relay,
}

/// Where an engine's HTTP API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineUrl {
    host: String,
    port: u16,
}

/// What a log-probability is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    Raw,
    Tempered,
    Processed,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadConfig {
    #[error("--engine {0:?}: write KIND=URL, as in sglang=http://127.0.0.1:30000")]
    NoKind(String),
    #[error(
        "--engine vllm=...: this version speaks the SGLang dialect only; vLLM comes with a later release \
         (engine/vllm.rs). Use an SGLang server or `anabranch engine`"
    )]
    Vllm,
    #[error("--engine {0}=...: unknown kind of engine; known: sglang")]
    UnknownKind(String),
    #[error(
        "engine address {0:?}: write http://HOST:PORT (https is not spoken to engines: keep them on loopback)"
    )]
    Url(String),
    #[error("the command after -- is empty")]
    EmptyCommand,
    #[error(
        "cannot tell which port `{0}` will listen on: add --port PORT (or --listen ADDR for `anabranch engine`)"
    )]
    NoPort(String),
    #[error(
        "--listen {0} is no address that receivers can dial: name one with --advertise HOST or HOST:PORT"
    )]
    NoAddress(SocketAddr),
    #[error("engine id {0:?}: use 1 to {max} printable characters without spaces", max = anabranch_proto::limits::MAX_ID_BYTES)]
    Id(String),
    #[error("log-probability convention {0:?}: write raw, tempered or processed")]
    Convention(String),
}

// === impl AgentConfig ===

impl AgentConfig {
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
            logprob_convention: None,
            weights_by_trainer: false,
            engine_api_key: None,
            buffer_bytes: 64 << 20,
            engine_start_timeout: Duration::from_secs(1800),
        }
    }
}

// === impl EngineSpec ===

impl EngineSpec {
    /// Of `--engine KIND=URL`.
    pub fn parse(text: &str) -> Result<EngineSpec, BadConfig> {
        let (kind, url) = text.split_once('=').ok_or_else(|| BadConfig::NoKind(text.to_owned()))?;
        match kind {
            "sglang" => Ok(EngineSpec::Sglang(url.parse()?)),
            "vllm" => Err(BadConfig::Vllm),
            other => Err(BadConfig::UnknownKind(other.to_owned())),
        }
    }

    /// Of what follows `--`.
    pub fn command(words: Vec<String>) -> Result<EngineSpec, BadConfig> {
        match words.is_empty() {
            true => Err(BadConfig::EmptyCommand),
            false => Ok(EngineSpec::Command(words)),
        }
    }
}

// === impl EngineUrl ===

impl EngineUrl {
    pub fn new(host: impl Into<String>, port: u16) -> EngineUrl {
        EngineUrl { host: host.into(), port }
    }

    /// `host:port`
    pub fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where to dial a server that listens here: the unspecified address is this host.
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

// === impl Convention ===

impl From<Convention> for pb::Convention {
    fn from(convention: Convention) -> Self {
        match convention {
            Convention::Raw => pb::Convention::Raw,
            Convention::Tempered => pb::Convention::Tempered,
            Convention::Processed => pb::Convention::Processed,
        }
    }
}

impl FromStr for Convention {
    type Err = BadConfig;

    fn from_str(text: &str) -> Result<Convention, BadConfig> {
        match text {
            "raw" => Ok(Convention::Raw),
            "tempered" => Ok(Convention::Tempered),
            "processed" => Ok(Convention::Processed),
            other => Err(BadConfig::Convention(other.to_owned())),
        }
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
