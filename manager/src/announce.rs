//! Tells people and machines where the manager is: the lines it prints, and the file for those that share
//! a disk.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};

use anabranch_runtime::{Announce, FileError, JoinToken};

use crate::error::ManagerError;

/// What was printed, as data.
#[derive(Clone, Debug)]
pub struct Ready {
    pub url: String,
    pub tokens: Option<Tokens>,
}

/// One token a role. Only `Display` of each shows its secret.
#[derive(Clone, Debug)]
pub struct Tokens {
    pub agent: JoinToken,
    pub trainer: JoinToken,
    pub admin: JoinToken,
}

/// The announce file; gone when the manager is.
pub(crate) struct AnnounceFile {
    path: PathBuf,
}

impl Ready {
    pub(crate) fn new(listening: SocketAddr, tls: bool, tokens: Option<Tokens>) -> Self {
        let scheme = if tls { "https" } else { "http" };
        Self { url: format!("{scheme}://{}", reachable(listening)), tokens }
    }

    /// The address, and one line to copy for each kind of engine.
    pub fn text(&self) -> String {
        let Self { url, tokens } = self;
        let with = |token: fn(&Tokens) -> &JoinToken| {
            tokens.as_ref().map(|all| format!(" --token {}", token(all))).unwrap_or_default()
        };
        let (agent, trainer, admin) =
            (with(|all| &all.agent), with(|all| &all.trainer), with(|all| &all.admin));
        let mut out = format!(
            "Anabranch manager is ready at {url}\n\nAttach engines, each with one command:\n"
        );
        for (what, tail) in [
            ("an SGLang server that runs", "--engine sglang=http://127.0.0.1:30000"),
            (
                "an SGLang server started for it",
                "-- python -m sglang.launch_server --model-path MODEL",
            ),
            ("the embedded engine, on CPU", "-- anabranch engine --model hf:DIR"),
            ("the embedded synthetic engine", "-- anabranch engine --model synthetic"),
        ] {
            writeln!(out, "  # {what}\n  anabranch agent --manager {url}{agent} {tail}")
                .expect("a String");
        }
        writeln!(out, "\nThen:").expect("a String");
        writeln!(out, "  anabranch submit --manager {url}{trainer} PROMPTS.jsonl")
            .expect("a String");
        writeln!(out, "  anabranch watch --manager {url}{admin}").expect("a String");
        out
    }
}

impl AnnounceFile {
    /// With tokens, it carries the agents' one: it is they who share a disk with us.
    pub fn write(path: &Path, ready: &Ready) -> Result<Self, FileError> {
        let token = ready.tokens.as_ref().map(|tokens| tokens.agent.to_string());
        Announce { url: ready.url.clone(), token }.write(path)?;
        Ok(Self { path: path.to_owned() })
    }

    pub fn remove(self) -> Result<(), ManagerError> {
        match std::fs::remove_file(&self.path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(ManagerError::Unannounce { path: self.path, source }),
        }
    }
}

/// Address that others dial; an unspecified one is none.
pub(crate) fn reachable(listening: SocketAddr) -> SocketAddr {
    if listening.ip().is_unspecified() {
        SocketAddr::new(own_address().unwrap_or(Ipv4Addr::LOCALHOST.into()), listening.port())
    } else {
        listening
    }
}

/// The address that this host speaks to others from. Connecting a datagram socket sends nothing.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // 192.0.2.0/24 is for documentation: routed like any other, reached by nobody.
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_runtime::{CertDigest, Role};

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn loopback_lines_can_be_copied_as_they_are() {
        let text = Ready::new(at("127.0.0.1:5000"), false, None).text();
        assert!(text.contains("anabranch agent --manager http://127.0.0.1:5000 --engine sglang="));
        assert!(!text.contains("--token"));
    }

    #[test]
    fn with_tokens_each_line_has_the_one_of_its_role() {
        let mint = |role| JoinToken::mint(CertDigest::of(b"ca"), role, "default").expect("minted");
        let tokens = Tokens {
            agent: mint(Role::Agent),
            trainer: mint(Role::Trainer),
            admin: mint(Role::Admin),
        };
        let text = Ready::new(at("10.0.0.4:5000"), true, Some(tokens.clone())).text();
        assert!(
            text.contains(&format!(
                "agent --manager https://10.0.0.4:5000 --token {}",
                tokens.agent
            ))
        );
        assert!(text.contains(&format!("--token {} PROMPTS", tokens.trainer)));
        assert!(text.contains(&format!("--token {}\n", tokens.admin)));
    }

    #[test]
    fn an_unspecified_address_is_not_announced() {
        let url = Ready::new(at("0.0.0.0:5000"), true, None).url;
        assert!(!url.contains("0.0.0.0:"), "{url}");
    }
}
