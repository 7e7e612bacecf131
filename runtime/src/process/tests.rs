//! Real processes: `sh`, `sleep`, and this test binary itself as the parent that dies.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;

const LONG: Duration = Duration::from_secs(10);

fn sh(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

/// Polls: other processes' deaths have no event for us.
async fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let from = Instant::now();
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(from.elapsed() < LONG, "waited {LONG:?} for: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn read_pid(path: &Path) -> u32 {
    until("a process id in the file", || {
        let text = std::fs::read_to_string(path).ok()?;
        text.strip_suffix('\n')?.lines().last()?.parse().ok()
    })
    .await
}

/// Gone, or dead and waiting for an init that may not reap.
fn is_dead(pid: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['Z', 'X'])),
        Err(_) => true,
    }
}

async fn dies(pid: u32) {
    until("the process to die", || is_dead(pid).then_some(())).await;
}

#[tokio::test]
async fn terminate_ends_the_whole_group() {
    let (dir, drain) = (tempfile::tempdir().expect("dir"), Drain::new());
    let file = dir.path().join("pid");
    let output = Output::File(file.clone());
    let script = sh("sleep 1000 & echo $!; wait");
    let mut child = Child::start("group", script, output, &drain).await.expect("started");
    let grandchild = read_pid(&file).await;
    assert!(!is_dead(grandchild));
    let status = child.terminate(LONG).await.expect("ended");
    assert_eq!(status.signal(), Some(15));
    dies(grandchild).await;
    assert!(!child.signal(Signal::TERM).expect("nothing is sent"), "its id is not used again");
    assert_eq!(child.wait().await.expect("again"), status);
}

#[tokio::test]
async fn a_process_that_ignores_sigterm_is_killed_at_the_deadline() {
    let (dir, drain) = (tempfile::tempdir().expect("dir"), Drain::new());
    let file = dir.path().join("pid");
    let script = sh("trap '' TERM; echo $$; while :; do sleep 0.01; done");
    let mut child = Child::start("stubborn", script, Output::File(file.clone()), &drain)
        .await
        .expect("started");
    assert_eq!(read_pid(&file).await, child.id());
    let from = Instant::now();
    let status = child.terminate(Duration::from_millis(100)).await.expect("ended");
    assert_eq!(status.signal(), Some(9));
    assert!(from.elapsed() >= Duration::from_millis(100));
}

#[tokio::test]
async fn a_stopped_process_can_be_terminated() {
    let drain = Drain::new();
    let mut sleep = Command::new("sleep");
    sleep.arg("1000");
    let mut child = Child::start("stopped", sleep, Output::Null, &drain).await.expect("started");
    assert!(child.signal(Signal::STOP).expect("sent"));
    let status = child.terminate(LONG).await.expect("ended");
    assert_eq!(status.signal(), Some(15));
}

#[tokio::test]
async fn leftovers_of_a_leader_that_ended_are_killed() {
    let (dir, drain) = (tempfile::tempdir().expect("dir"), Drain::new());
    let file = dir.path().join("pid");
    let script = sh("sleep 1000 & echo $!; exit 7");
    let mut child =
        Child::start("leader", script, Output::File(file.clone()), &drain).await.expect("started");
    assert_eq!(child.wait().await.expect("ended").code(), Some(7));
    dies(read_pid(&file).await).await;
    assert_eq!(child.try_wait().expect("known").and_then(|s| s.code()), Some(7));
}

#[tokio::test]
async fn dropping_a_child_kills_its_group() {
    let (dir, drain) = (tempfile::tempdir().expect("dir"), Drain::new());
    let file = dir.path().join("pid");
    let script = sh("sleep 1000 & echo $!; wait");
    let child =
        Child::start("dropped", script, Output::File(file.clone()), &drain).await.expect("started");
    let (leader, grandchild) = (child.id(), read_pid(&file).await);
    drop(child);
    dies(leader).await;
    dies(grandchild).await;
}

#[tokio::test]
async fn output_is_read_to_its_end_even_without_newlines() {
    let drain = Drain::new();
    let script = sh("head -c 100000 /dev/zero; echo tail >&2; printf no-newline");
    let mut child = Child::start("noisy", script, Output::Log, &drain).await.expect("started");
    assert!(child.wait().await.expect("ended").success());
    drain.close(LONG).await.expect("both readers ended with the child");
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_named() {
    let drain = Drain::new();
    let command = Command::new("/no/such/engine");
    let error = Child::start("engine", command, Output::Log, &drain).await.expect_err("no such");
    assert!(error.to_string().contains("no program \"/no/such/engine\""), "{error}");
}

#[test]
fn a_child_outlives_the_runtime_thread_that_asked_for_it() {
    let drain = Drain::new();
    let asking = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asking = asking.expect("runtime");
    let mut sleep = Command::new("sleep");
    sleep.arg("1000");
    let child = thread::scope(|scope| {
        let start = || asking.block_on(Child::start("kept", sleep, Output::Null, &drain));
        scope.spawn(start).join().expect("no panic").expect("started")
    });
    assert!(!is_dead(child.id()));
}

const HELPER_FILE: &str = "ANABRANCH_TEST_HELPER_FILE";

/// Not a test of its own: [`children_die_with_us_even_by_sigkill`] starts it in another process.
#[tokio::test]
async fn helper_that_starts_a_child_and_waits() {
    let Some(file) = std::env::var_os(HELPER_FILE) else { return };
    let drain = Drain::new();
    let script = sh("echo $$; exec sleep 1000");
    let mut child =
        Child::start("orphan", script, Output::File(file.into()), &drain).await.expect("started");
    child.wait().await.expect("never ends by itself");
}

#[tokio::test]
async fn children_die_with_us_even_by_sigkill() {
    let (dir, drain) = (tempfile::tempdir().expect("dir"), Drain::new());
    let file = dir.path().join("pid");
    let mut helper = Command::new(std::env::current_exe().expect("this binary"));
    helper.args(["--exact", "process::tests::helper_that_starts_a_child_and_waits"]);
    helper.env(HELPER_FILE, &file);
    let mut parent = Child::start("parent", helper, Output::Null, &drain).await.expect("started");
    let orphan = read_pid(&file).await;
    assert!(!is_dead(orphan));
    // The orphan leads a group of its own: killing the parent's group does not reach it.
    parent.kill().await.expect("killed");
    dies(orphan).await;
}
