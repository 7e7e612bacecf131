//! The single-GPU case with real processes: a checkpoint is published where it lies by a process that
//! ends, and the engine loads it from there, byte for byte, with next to nothing in its staging area.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

fn anabranch() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.env_remove("ANABRANCH_MANAGER").env_remove("ANABRANCH_TOKEN");
    command.stdin(Stdio::null());
    command
}

/// Killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command) -> Process {
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    Process(quiet.spawn().expect("the binary starts"))
}

fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
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
fn checkpoint(dir: &Path, fill: u8) {
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

fn publish(manager: &str, dir: &Path, more: &[&str]) -> Output {
    let mut command = anabranch();
    command.args(["publish", "--once", "--json", "--manager", manager]).args(more).arg(dir);
    command.output().expect("the binary starts")
}

fn bytes_under(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes = |path: PathBuf| {
        let meta = std::fs::metadata(&path).expect("metadata");
        if meta.is_dir() { bytes_under(&path) } else { meta.len() }
    };
    entries.map(|entry| bytes(entry.path())).sum()
}

#[test]
fn a_checkpoint_is_loaded_where_it_lies_after_its_publisher_has_gone() {
    let dir = tempfile::tempdir().expect("a directory");
    let announce = dir.path().join("manager.json");
    let mut manager = anabranch();
    manager.args(["manager", "--listen", "127.0.0.1:0", "--announce"]).arg(&announce);
    let _manager = start(manager.arg("--state-dir").arg(dir.path().join("state")));
    wait("the manager announces itself", || announce.exists().then_some(()));
    let at = format!("file:{}", announce.display());
    let staging = dir.path().join("staging");
    std::fs::create_dir(&staging).expect("dir");
    let port =
        TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
    let mut agent = anabranch();
    agent.args(["agent", "--manager", &at, "--id", "e1", "--staging"]).arg(&staging).arg("--");
    agent.arg(env!("CARGO_BIN_EXE_anabranch")).args(["engine", "--model", "synthetic"]);
    let _agent = start(agent.args(["--listen", &format!("127.0.0.1:{port}")]));

    let steps: Vec<PathBuf> = (1..=2).map(|n| dir.path().join(format!("step-{n}"))).collect();
    for (step, fill) in steps.iter().zip(1..) {
        checkpoint(step, fill);
    }
    // Nobody is there to serve it when the engine comes to load it.
    let output = publish(&at, &steps[0], &["--detach"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((said["number"].as_u64(), said["bytes"].as_u64()), (Some(1), Some(4 << 20)));
    // The next one waits for the engine, so the first was loaded or skipped by then.
    let output = publish(&at, &steps[1], &[]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(said["engines"][0]["stage"], "active", "{said}");
    assert!(bytes_under(&staging) < 1 << 20, "nothing was copied");
}
