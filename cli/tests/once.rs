//! The single-GPU case with real processes: a checkpoint is published where it lies by a process that
//! ends, and the engine loads it from there, byte for byte, with next to nothing in its staging area.

mod common;

use std::path::{Path, PathBuf};
use std::process::Output;

use common::*;
use serde_json::Value;

fn publish(manager: &str, dir: &Path, more: &[&str]) -> Output {
    let mut command = anabranch();
    command.args(["publish", "--once", "--json", "--manager", manager]).args(more).arg(dir);
    command.output().expect("the binary starts")
}

#[test]
fn a_checkpoint_is_loaded_where_it_lies_after_its_publisher_has_gone() {
    let dir = tempfile::tempdir().expect("a directory");
    let (_manager, at) = manager(dir.path());
    let staging = dir.path().join("staging");
    std::fs::create_dir(&staging).expect("dir");
    let _agent = engine(&at, "e1", &staging, &[]);

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
