//! Processes of the binary under test, and checkpoints for them.
#![allow(dead_code)]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(60);

pub fn anabranch() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command
        .env_remove("ANABRANCH_MANAGER")
        .env_remove("ANABRANCH_TOKEN")
        .env_remove("ANABRANCH_LOG");
    command.stdin(Stdio::null());
    command
}

/// Killed when dropped.
pub struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn start(command: &mut Command) -> Process {
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    Process(quiet.spawn().expect("the binary starts"))
}

pub fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < SOON, "not within {SOON:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

/// Two shards of bf16, about 4 MiB.
pub fn checkpoint(dir: &Path, fill: u8) {
    std::fs::create_dir_all(dir).expect("dir");
    for shard in ["a", "b"] {
        let bytes = 1 << 21;
        let mut header = format!(
            "{{\"{shard}.weight\":{{\"dtype\":\"BF16\",\"shape\":[1024,1024],\"data_offsets\":[0,{bytes}]}}}}"
        );
        header.push_str(&" ".repeat(header.len().next_multiple_of(64) - header.len()));
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.resize(file.len() + bytes, fill);
        std::fs::write(dir.join(format!("model-{shard}.safetensors")), file).expect("written");
    }
}

/// A manager, and where it says that it can be reached.
pub fn manager(dir: &Path) -> (Process, String) {
    let announce = dir.join("manager.json");
    let mut manager = anabranch();
    manager.args(["manager", "--listen", "127.0.0.1:0", "--announce"]).arg(&announce);
    let manager = start(manager.arg("--state-dir").arg(dir.join("state")));
    wait("the manager announces itself", || announce.exists().then_some(()));
    (manager, format!("file:{}", announce.display()))
}

/// The embedded engine behind an agent without a listener.
pub fn engine(manager: &str, id: &str, staging: &Path, more: &[&str]) -> Process {
    let port =
        TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
    let mut agent = anabranch();
    agent
        .args(["agent", "--manager", manager, "--id", id, "--staging"])
        .arg(staging)
        .args(more)
        .arg("--");
    agent.arg(env!("CARGO_BIN_EXE_anabranch")).args(["engine", "--model", "synthetic"]);
    start(agent.args(["--listen", &format!("127.0.0.1:{port}")]))
}

pub fn bytes_under(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes = |path: PathBuf| {
        let meta = std::fs::metadata(&path).expect("metadata");
        if meta.is_dir() { bytes_under(&path) } else { meta.len() }
    };
    entries.map(|entry| bytes(entry.path())).sum()
}
