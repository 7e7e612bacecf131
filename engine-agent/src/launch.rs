//! Commands that start an engine: the flags and the environment that the agent adds, and the
//! address where the engine will listen. [`crate::watch`] runs them.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;

use crate::config::{BadConfig, EngineUrl};

/// A complete command that starts an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    words: Vec<String>,
    env: Vec<(&'static str, &'static str)>,
    /// Address where the engine will listen.
    pub url: EngineUrl,
    /// Flags and environment that were added, for the log.
    pub added: Vec<String>,
}

/// Kind of engine that a command starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Sglang,
    Embedded,
    Unknown,
}

impl Launch {
    /// Completes `words`. Fails if the port cannot be told, or the engine is of an unknown dialect.
    pub fn new(words: &[String]) -> Result<Launch, BadConfig> {
        let program = words.first().ok_or(BadConfig::EmptyCommand)?;
        if words.iter().take(4).any(|word| file_name(word) == "vllm" || word.starts_with("vllm.")) {
            return Err(BadConfig::Vllm);
        }
        let kind = kind(words);
        let mut launch = Launch {
            words: words.to_vec(),
            env: Vec::new(),
            url: EngineUrl::new("127.0.0.1", 0),
            added: Vec::new(),
        };
        launch.url = match kind {
            Kind::Embedded => launch.embedded_url()?,
            Kind::Sglang => launch.sglang_url()?,
            Kind::Unknown => {
                let port = launch.port()?.ok_or_else(|| BadConfig::NoPort(program.clone()))?;
                EngineUrl::new(launch.host(), port)
            }
        };
        if kind == Kind::Sglang {
            launch.complete_sglang();
        }
        Ok(launch)
    }

    /// The command, ready to start.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).envs(self.env.iter().copied());
        command
    }

    /// Name of the program in logs.
    pub fn name(&self) -> String {
        file_name(&self.words[0]).to_owned()
    }

    fn complete_sglang(&mut self) {
        self.add_flag("--incremental-streaming-output", None);
        self.add_flag("--stream-interval", Some("8"));
        self.add_flag("--enable-metrics", None);
        // With the variable set, /health generates a token and fails while the engine is paused.
        self.env.push(("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "false"));
        self.added.extend(self.env.iter().map(|(key, value)| format!("{key}={value}")));
    }

    fn embedded_url(&mut self) -> Result<EngineUrl, BadConfig> {
        let given = self.value("--listen");
        let url: Option<EngineUrl> = given.map(|text| text.parse()).transpose()?;
        match url {
            Some(url) if url.port() != 0 => Ok(url.reachable()),
            Some(_) => Err(BadConfig::NoPort(self.words.join(" "))),
            None => {
                let url = EngineUrl::new("127.0.0.1", free_port());
                self.add_flag("--listen", Some(&url.authority()));
                Ok(url)
            }
        }
    }

    fn sglang_url(&mut self) -> Result<EngineUrl, BadConfig> {
        let port = match self.port()? {
            Some(port) => port,
            None => {
                let port = free_port();
                self.add_flag("--port", Some(&port.to_string()));
                port
            }
        };
        Ok(EngineUrl::new(self.host(), port).reachable())
    }

    fn port(&self) -> Result<Option<u16>, BadConfig> {
        let Some(text) = self.value("--port") else { return Ok(None) };
        let bad = || BadConfig::NoPort(self.words.join(" "));
        text.parse().ok().filter(|port| *port != 0).map(Some).ok_or_else(bad)
    }

    fn host(&self) -> String {
        self.value("--host").unwrap_or_else(|| "127.0.0.1".to_owned())
    }

    /// Value of `--flag value` or `--flag=value`; the last one counts.
    fn value(&self, flag: &str) -> Option<String> {
        let at = |(index, word): (usize, &String)| match word.strip_prefix(flag)? {
            "" => self.words.get(index + 1).cloned(),
            rest => rest.strip_prefix('=').map(str::to_owned),
        };
        self.words.iter().enumerate().rev().find_map(at)
    }

    fn has(&self, flag: &str) -> bool {
        self.words.iter().any(|word| {
            word.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        })
    }

    fn add_flag(&mut self, flag: &str, value: Option<&str>) {
        if self.has(flag) {
            return;
        }
        self.words.push(flag.to_owned());
        self.words.extend(value.map(str::to_owned));
        let text = value.map_or_else(|| flag.to_owned(), |value| format!("{flag} {value}"));
        self.added.push(text);
    }
}

fn kind(words: &[String]) -> Kind {
    let is = |word: &String, name: &str| file_name(word) == name;
    let engine = is(&words[0], "anabranch") && words.get(1).is_some_and(|word| word == "engine");
    if engine {
        return Kind::Embedded;
    }
    let sglang = words.iter().take(4).any(|word| is(word, "sglang") || word.starts_with("sglang."));
    if sglang { Kind::Sglang } else { Kind::Unknown }
}

fn file_name(word: &str) -> &str {
    word.rsplit('/').next().unwrap_or(word)
}

/// A port that is free now; the engine takes it within its start-up.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map_or(30_000, |addr| addr.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(text: &str) -> Result<Launch, BadConfig> {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        Launch::new(&words)
    }

    #[test]
    fn sglang_gets_the_flags_it_needs_and_keeps_those_it_has() {
        let launch = launch(
            "python -m sglang.launch_server --model-path m --port 801 --host 0.0.0.0 --stream-interval=4",
        )
        .expect("understood");
        assert_eq!(launch.url.authority(), "127.0.0.1:801");
        let added = "--incremental-streaming-output|--enable-metrics|SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false";
        assert_eq!(launch.added.join("|"), added);
        assert_eq!(launch.words.last().map(String::as_str), Some("--enable-metrics"));
    }

    #[test]
    fn the_embedded_engine_gets_only_an_address() {
        let launch = launch("/bin/anabranch engine --model synthetic").expect("understood");
        assert_eq!(launch.added, [format!("--listen {}", launch.url.authority())]);
        assert!(launch.env.is_empty());
        let at = self::launch("anabranch engine --listen 127.0.0.1:7").expect("understood");
        assert_eq!((at.url.port(), at.added.len()), (7, 0));
    }

    #[test]
    fn what_cannot_be_started_is_refused_with_a_reason() {
        assert_eq!(launch("vllm serve m"), Err(BadConfig::Vllm));
        assert_eq!(launch("python -m vllm.entrypoints.api_server"), Err(BadConfig::Vllm));
        assert_eq!(launch(""), Err(BadConfig::EmptyCommand));
        assert!(matches!(launch("./server"), Err(BadConfig::NoPort(_))));
        assert!(matches!(launch("sglang serve --port x"), Err(BadConfig::NoPort(_))));
        assert!(matches!(
            launch("anabranch engine --listen 127.0.0.1:0"),
            Err(BadConfig::NoPort(_))
        ));
    }
}
