//! A relay with real processes: the trainer cannot be reached and dials, the engine has no listener, and
//! the relay is where they meet.

mod common;

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

/// How many staging areas in `shm` hold the version, whose bytes all are its number.
fn holders(shm: &Path, number: u64) -> usize {
    let under = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let is_it = |name: &str| name.starts_with(&format!("v{number}-"));
    under(shm)
        .flat_map(|area| under(&area.path()).collect::<Vec<_>>())
        .filter(|version| is_it(&version.file_name().to_string_lossy()))
        .filter_map(|version| std::fs::read(version.path().join("model.safetensors")).ok())
        .filter(|image| {
            image.len() > 4 << 20
                && image[image.len() - (4 << 20)..].iter().all(|b| u64::from(*b) == number)
        })
        .count()
}

#[test]
fn versions_of_a_trainer_that_dials_reach_an_engine_without_a_listener_through_the_relay() {
    let dir = tempfile::tempdir().expect("a directory");
    let shm = tempfile::tempdir_in("/dev/shm").expect("shm");
    let (_manager, at) = manager(dir.path());
    let mut relay = anabranch();
    relay.args(["relay", "--id", "r1", "--listen", "127.0.0.1:0", "--manager", &at, "--staging"]);
    let _relay = start(relay.arg(shm.path()));
    let _engine = engine(&at, "e1", shm.path());
    wait("both are attached", || {
        let ids = attached(&at);
        ["r1", "e1"].iter().all(|id| ids.iter().any(|known| known == id)).then_some(())
    });
    for number in 1..=2u64 {
        let step = dir.path().join(format!("step-{number}"));
        checkpoint(&step, number as u8);
        let said = publish(&at, &step);
        assert_eq!(
            (said["number"].as_u64(), said["settled"].as_bool()),
            (Some(number), Some(true))
        );
        let on = |id: &str| {
            let all = said["engines"].as_array().expect("a list");
            let one = all.iter().find(|engine| engine["engine"] == id);
            one.and_then(|engine| engine["stage"].as_str()).map(str::to_owned)
        };
        assert_eq!([on("r1"), on("e1")].map(Option::unwrap_or_default), ["active"; 2], "{said}");
        assert_eq!(holders(shm.path(), number), 2, "each has a copy of its own");
    }
}
