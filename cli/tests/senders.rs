//! Several senders of one version, with real processes: each publishes its share of a checkpoint, and two
//! agents with engines get it from all of them.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};

use common::*;
use serde_json::Value;

const TENSORS: usize = 7;
const TENSOR_BYTES: usize = 3 << 19;

/// Tensors whose borders lie within chunks of 1 MiB; about 10 MiB.
fn checkpoint(dir: &Path, fill: u8) {
    std::fs::create_dir_all(dir).expect("dir");
    let tensor = |ix: usize| {
        let (start, end) = (ix * TENSOR_BYTES, (ix + 1) * TENSOR_BYTES);
        let shape = format!("[768,{}]", TENSOR_BYTES / 768 / 2);
        format!(
            "\"layers.{ix}.weight\":{{\"dtype\":\"BF16\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}"
        )
    };
    let tensors: Vec<String> = (0..TENSORS).map(tensor).collect();
    let mut header = format!("{{{}}}", tensors.join(","));
    header.push_str(&" ".repeat(header.len().next_multiple_of(64) - header.len()));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    for ix in 0..TENSORS {
        file.resize(file.len() + TENSOR_BYTES, fill.wrapping_add(ix as u8));
    }
    std::fs::write(dir.join("model.safetensors"), file).expect("written");
}

struct Site {
    dir: tempfile::TempDir,
    at: String,
    _processes: Vec<Process>,
}

impl Site {
    fn new(engines: usize) -> Site {
        let dir = tempfile::tempdir().expect("a directory");
        let (manager, at) = manager(dir.path());
        let mut processes = vec![manager];
        for engine in 0..engines {
            let staging = dir.path().join(format!("staging-{engine}"));
            std::fs::create_dir(&staging).expect("dir");
            let more = ["--listen", "127.0.0.1:0", "--no-sharing"];
            processes.push(common::engine(&at, &format!("e{engine}"), &staging, &more));
        }
        Site { dir, at, _processes: processes }
    }

    /// All senders of a version, to their ends.
    fn publish(&self, checkpoint: &Path, number: u64, count: usize, more: &[&str]) -> Vec<Output> {
        let one = |k: usize| {
            let mut command = anabranch();
            command.args(["publish", "--json", "--manager", &self.at, "--timeout", "60"]);
            command.args(["--number", &number.to_string(), "--sender", &format!("{k}/{count}")]);
            command.args(more).arg(checkpoint).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().expect("the binary starts")
        };
        let started: Vec<Child> = (1..=count).map(one).collect();
        let end = |child: Child| child.wait_with_output().expect("its output");
        started.into_iter().map(end).collect()
    }

    fn checkpoint(&self, name: &str, fill: u8) -> PathBuf {
        let dir = self.dir.path().join(name);
        checkpoint(&dir, fill);
        dir
    }
}

fn roots(outputs: &[Output]) -> Vec<String> {
    let root = |output: &Output| {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}");
        let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let engines = said["engines"].as_array().expect("engines");
        assert!(engines.iter().all(|on| on["stage"] == "active"), "{said}");
        said["root"].as_str().expect("a root").to_owned()
    };
    outputs.iter().map(root).collect()
}

#[test]
fn shares_of_a_checkpoint_reach_every_engine_as_one_version() {
    let site = Site::new(2);
    let exchange = site.dir.path().join("exchange");
    let through = ["--exchange", exchange.to_str().expect("UTF-8")];
    let first = site.checkpoint("step-1", 1);
    let parts = roots(&site.publish(&first, 1, 3, &through));
    assert!(parts.windows(2).all(|w| w[0] == w[1]), "{parts:?}");
    assert_eq!(std::fs::read_dir(&exchange).expect("it is there").count(), 0, "nothing is left");
    // The same bytes from senders that have all of them are the same version.
    let whole = roots(&site.publish(&first, 2, 2, &["--whole"]));
    assert_eq!(whole[0], parts[0]);
    let next = site.checkpoint("step-2", 50);
    let parts = roots(&site.publish(&next, 3, 2, &through));
    assert_ne!(parts[0], whole[0]);
    let staged = wait("both engines hold the last version", || {
        let held: Vec<PathBuf> = (0..2)
            .filter_map(|engine| model_file(&site.dir.path().join(format!("staging-{engine}"))))
            .collect();
        (held.len() == 2).then_some(held)
    });
    for file in staged {
        let bytes = std::fs::read(file).expect("staged");
        assert_eq!(bytes.last(), Some(&(50 + TENSORS as u8 - 1)));
    }
}

/// The newest one.
fn model_file(dir: &Path) -> Option<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.file_name().is_some_and(|name| name == "model.safetensors") {
                found.push(path);
            }
        }
    }
    found.into_iter().max_by_key(|file| file.metadata().and_then(|meta| meta.modified()).ok())
}

#[test]
fn senders_of_different_bytes_are_told_of_each_other() {
    let site = Site::new(0);
    let (one, other) = (site.checkpoint("one", 1), site.checkpoint("other", 2));
    let publish = |dir: &Path, k: u32| {
        let mut command = anabranch();
        command.args(["publish", "--manager", &site.at, "--number", "1", "--whole"]);
        command.args(["--sender", &format!("{k}/2")]).arg(dir);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the binary starts")
    };
    let (mut first, mut second) = (publish(&one, 1), publish(&other, 2));
    // One of them seals last, and is refused; the other one waits for it.
    let refused = wait("one is refused", || {
        let ended = [&mut first, &mut second].map(|child| child.try_wait().expect("a child"));
        ended.iter().position(Option::is_some)
    });
    let (refused, mut waiting) = if refused == 0 { (first, second) } else { (second, first) };
    waiting.kill().expect("kill");
    waiting.wait().expect("wait");
    let text = refused.wait_with_output().expect("its output").stderr;
    let text = String::from_utf8_lossy(&text);
    assert!(text.contains("sender 1 of 2") && text.contains("sender 2 of 2"), "{text}");
}

#[test]
fn a_sender_without_a_place_for_the_others_is_a_usage_error() {
    let dir = tempfile::tempdir().expect("a directory");
    for (args, word) in [
        (&["--sender", "1/2"][..], "--exchange"),
        (&["--sender", "3/2", "--whole"][..], "K from 1 to N"),
        (&["--whole"][..], "--sender"),
    ] {
        let output = anabranch().arg("publish").args(args).arg(dir.path()).output();
        let output = output.expect("the binary starts");
        assert_eq!(output.status.code(), Some(64), "{args:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(word), "{args:?}: {text}");
    }
}
