//! Hosts with limited links: network namespaces made by `scripts/bench/netns.sh`, which is part of this program. Owns
//! the script's process, with whose stdin the namespaces go, however the bench ends.

use std::net::SocketAddr;
use std::process::Stdio;

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

const SCRIPT: &str = include_str!("../../../scripts/bench/netns.sh");

const PORT: u16 = 7077;

/// The namespaces and their links.
pub struct Net {
    script: Child,
    prefix: String,
}

/// Bytes that passed a host's link so far.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    /// Bytes towards the host.
    pub received_bytes: u64,
    /// Bytes from the host.
    pub sent_bytes: u64,
}

// === impl Net ===

impl Net {
    /// Makes hosts 0 to `receivers` on one switch, each with a link of `rate`.
    pub async fn up(receivers: usize, rate: &str) -> anyhow::Result<Net> {
        let mut command = script(&["hold", &receivers.to_string(), rate]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut script = command.spawn().context("starting bash for network namespaces")?;
        let stdout = script.stdout.take().context("stdout was asked for")?;
        let mut prefix = String::new();
        BufReader::new(stdout).read_line(&mut prefix).await?;
        if prefix.trim().is_empty() {
            let mut why = String::new();
            if let Some(mut stderr) = script.stderr.take() {
                stderr.read_to_string(&mut why).await.ok();
            }
            bail!("no network namespaces: {}", why.trim());
        }
        Ok(Net { script, prefix: prefix.trim().to_owned() })
    }

    /// A command that starts this program on host `n`, without a process in between.
    pub fn command(&self, n: usize) -> anyhow::Result<Command> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}-{n}", self.prefix)]);
        command.arg(std::env::current_exe().context("finding this program")?);
        Ok(command)
    }

    /// Address of host `n`, the same in all its lives.
    pub fn addr(n: usize) -> SocketAddr {
        SocketAddr::from(([10, 77, 0, n as u8 + 1], PORT))
    }

    /// Turns the link of host `n` on or off. Off is a pulled cable: nothing is refused, nothing arrives.
    pub async fn set_link(&self, n: usize, up: bool) -> anyhow::Result<()> {
        let what = if up { "link-up" } else { "link-down" };
        self.change(&[what, &self.prefix, &n.to_string()]).await
    }

    /// Sets the rate of host `n`'s link, both ways.
    pub async fn set_rate(&self, n: usize, rate: &str) -> anyhow::Result<()> {
        self.change(&["rate", &self.prefix, &n.to_string(), rate]).await
    }

    async fn change(&self, args: &[&str]) -> anyhow::Result<()> {
        let output = script(args).output().await?;
        match output.status.success() {
            true => Ok(()),
            false => bail!("{args:?}: {}", String::from_utf8_lossy(&output.stderr)),
        }
    }

    /// Removes the namespaces; returns when they are gone.
    pub async fn down(mut self) -> anyhow::Result<()> {
        drop(self.script.stdin.take());
        self.script.wait().await.map(drop).context("waiting for the namespaces to go")
    }
}

impl Traffic {
    /// Traffic of the namespace of process `pid`.
    pub fn of(pid: u32) -> anyhow::Result<Traffic> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
        Traffic::parse(&text).context("no eth0 there")
    }

    fn parse(text: &str) -> Option<Traffic> {
        let line = text.lines().find_map(|l| l.trim_start().strip_prefix("eth0:"))?;
        let mut fields = line.split_ascii_whitespace().map(str::parse);
        let received_bytes = fields.next()?.ok()?;
        Some(Traffic { received_bytes, sent_bytes: fields.nth(7)?.ok()? })
    }
}

fn script(args: &[&str]) -> Command {
    let mut command = Command::new("bash");
    command.args(["-c", SCRIPT, "netns.sh"]).args(args);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_of_the_link_are_found_among_the_others() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes ...\n    lo: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0\n  \
                    eth0: 100 2 0 0 0 0 0 0 200 3 0 0 0 0 0 0\n";
        let traffic = Traffic::parse(text).unwrap();
        assert_eq!((traffic.received_bytes, traffic.sent_bytes), (100, 200));
        assert!(Traffic::parse("lo: 1 2").is_none());
    }

    #[tokio::test]
    async fn a_wrong_count_of_hosts_is_refused_with_the_reason() {
        let error = Net::up(0, "200mbit").await.err().expect("refused").to_string();
        assert!(error.contains("K is 1 to 200") || error.contains("needs root"), "{error}");
    }
}
