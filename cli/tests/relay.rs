//! A relay with real processes: the trainer cannot be reached and dials, the engine has no listener, and
//! the relay is where they meet.

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::*;
use serde_json::Value;

/// Published by a process that listens nowhere and waits for all; what became of the version.
fn publish(manager: &str, dir: &Path) -> Value {
    let mut command = anabranch();
    command.args(["publish", "--dial-out", "--json", "--timeout", "60", "--manager", manager]);
    let output = command.arg(dir).output().expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn attached(manager: &str) -> Vec<String> {
    let mut command = anabranch();
    let output = command.args(["engines", "list", "--json", "--manager", manager]).output();
    let list: Value =
        serde_json::from_slice(&output.expect("the binary starts").stdout).unwrap_or_default();
    let names = list.as_array().into_iter().flatten().filter_map(|e| e["id"].as_str());
    names.map(str::to_owned).collect()
}

/// The memory behind each staging area in `shm` that holds the version, whose bytes all are its number.
fn holders(shm: &Path, number: u64) -> Vec<u64> {
    let under = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let is_it = |name: &str| name.starts_with(&format!("v{number}-"));
    let is_right = |image: &[u8]| {
        let tensors = image.len().checked_sub(4 << 20).map(|at| &image[at..]);
        tensors.is_some_and(|bytes| bytes.iter().all(|b| u64::from(*b) == number))
    };
    under(shm)
        .flat_map(|area| under(&area.path()).collect::<Vec<_>>())
        .filter(|version| is_it(&version.file_name().to_string_lossy()))
        .map(|version| version.path().join("model.safetensors"))
        .filter(|model| std::fs::read(model).is_ok_and(|image| is_right(&image)))
        .filter_map(|model| Some(std::fs::metadata(model).ok()?.ino()))
        .collect()
}

/// Two versions from a trainer that dials to a relay, and on to an engine; whose memory they lie in.
fn memory_of_two_versions(engine_args: &[&str]) -> Vec<[u64; 2]> {
    let dir = tempfile::tempdir().expect("a directory");
    let shm = tempfile::tempdir_in("/dev/shm").expect("shm");
    let (_manager, at) = manager(dir.path());
    let mut relay = anabranch();
    relay.args(["relay", "--id", "r1", "--listen", "127.0.0.1:0", "--manager", &at, "--staging"]);
    let _relay = start(relay.arg(shm.path()));
    let _engine = engine(&at, "e1", shm.path(), engine_args);
    wait("both are attached", || {
        let ids = attached(&at);
        ["r1", "e1"].iter().all(|id| ids.iter().any(|known| known == id)).then_some(())
    });
    let through = |number: u64| {
        let step = dir.path().join(format!("step-{number}"));
        checkpoint(&step, number as u8);
        let said = publish(&at, &step);
        let told = (said["number"].as_u64(), said["settled"].as_bool());
        assert_eq!(told, (Some(number), Some(true)));
        let on = |id: &str| {
            let all = said["engines"].as_array().expect("a list");
            let one = all.iter().find(|engine| engine["engine"] == id);
            one.and_then(|engine| engine["stage"].as_str()).map(str::to_owned)
        };
        assert_eq!([on("r1"), on("e1")].map(Option::unwrap_or_default), ["active"; 2], "{said}");
        holders(shm.path(), number).try_into().expect("both hold it")
    };
    (1..=2).map(through).collect()
}

#[test]
fn versions_of_a_trainer_that_dials_reach_an_engine_without_a_listener_through_the_relay() {
    let memory = memory_of_two_versions(&["--no-sharing"]);
    assert!(memory.iter().all(|[relay, engine]| relay != engine), "each has a copy of its own");
}

#[test]
fn agents_of_one_host_hold_a_version_in_the_same_memory() {
    let memory = memory_of_two_versions(&[]);
    assert!(memory.iter().all(|[relay, engine]| relay == engine), "{memory:?}");
}
