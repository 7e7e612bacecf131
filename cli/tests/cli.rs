//! The binary as its user meets it: wrong use is answered with a status and a sentence, right use works
//! against a manager that runs. Engines are real processes of the same binary.

mod common;

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use common::{Process, anabranch, start, wait};
use serde_json::Value;
use tempfile::TempDir;

fn run(args: &[&str]) -> Output {
    anabranch().args(args).stdin(Stdio::null()).output().expect("the binary starts")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A manager on a free port, with its files in a directory of its own.
struct Manager {
    dir: TempDir,
    url: String,
    _process: Process,
}

impl Manager {
    fn start(more: &[&str]) -> Manager {
        let dir = tempfile::tempdir().expect("a directory");
        let announce = dir.path().join("manager.json");
        let mut command = anabranch();
        command.args(["manager", "--listen", "127.0.0.1:0", "--announce"]).arg(&announce);
        command.arg("--state-dir").arg(dir.path().join("state")).args(more);
        let process = start(&mut command);
        let url = wait("the manager announces itself", || {
            let text = std::fs::read_to_string(&announce).ok()?;
            let announced: Value = serde_json::from_str(&text).ok()?;
            Some(announced["url"].as_str()?.to_owned())
        });
        Manager { dir, url, _process: process }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        path
    }

    /// An engine with its agent; returns when it serves.
    fn engine(&self, id: &str, more: &[&str]) -> Process {
        let port =
            TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
        let mut command = anabranch();
        command
            .args(["agent", "--manager", &self.url, "--id", id, "--staging"])
            .arg(self.dir.path());
        command.arg("--").arg(env!("CARGO_BIN_EXE_anabranch"));
        command.args(["engine", "--model", "synthetic", "--listen", &format!("127.0.0.1:{port}")]);
        command.args(more);
        let process = start(&mut command);
        wait("the engine is attached", || {
            let engines = self.engines();
            engines.iter().any(|engine| engine["id"] == id).then_some(())
        });
        process
    }

    fn engines(&self) -> Vec<Value> {
        let output = run(&["engines", "list", "--json", "--manager", &self.url]);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("written");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn wrong_use_is_64_with_a_sentence_that_helps() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("m.toml");
    std::fs::write(&config, "listen = '127.0.0.1:0'\n[core]\nleese_ms = 1\n").expect("written");
    let config = config.to_str().expect("UTF-8");
    let ids = dir.path().join("p.jsonl");
    std::fs::write(&ids, "{\"input_ids\": [1]}\n{\"input_ids\": []}\n").expect("written");
    let ids = ids.to_str().expect("UTF-8");
    for (args, says) in [
        (&["manager", "--lisen", "x"][..], "unexpected argument '--lisen'"),
        (&["manager", "--config", config], "unknown field `leese_ms`"),
        (&["manager", "--config", "/nonexistent.toml"], "/nonexistent.toml"),
        (&["manager", "--listen", "nowhere"], "not HOST:PORT"),
        (&["manager", "--zmq", "tcp://0.0.0.0:1"], "GET /events"),
        (&["agent"], "--engine"),
        (&["agent", "--engine", "sglang=x"], "http://HOST:PORT"),
        (&["agent", "--engine", "vllm=http://h:1"], "SGLang"),
        (
            &["agent", "--engine", "sglang=h:1", "--listen", "h:0", "--weights-link", "udp"],
            "invalid socket address",
        ),
        (
            &["agent", "--engine", "sglang=h:1", "--listen", "0.0.0.0:0", "--weights-link", "tls"],
            "name one with --advertise HOST",
        ),
        (
            &["agent", "--engine", "sglang=h:1", "--listen", "[::1]:0", "--weights-link", "udp"],
            "known: tcp, tls, quic",
        ),
        (&["publish", "/tmp", "--weights-link", "udp"], "known: tcp, tls, quic"),
        (&["agent", "--engine", "sglang=http://h:1", "--label", "x"], "KEY=VALUE"),
        (&["engine", "--model", "gpt"], "hf:DIR"),
        (
            &["engine", "--model", "synthetic", "--chunk", "0", "--listen", "127.0.0.1:0"],
            "at least 1",
        ),
        (&["submit", "-n", "0"], "0 is not in 1.."),
        (&["submit", "--max-tokens", "0"], "0 is not in 1.."),
        (&["submit", ids], "p.jsonl:2: the prompt is empty"),
        (&["submit", "/nonexistent.jsonl"], "cannot read /nonexistent.jsonl"),
        (&["submit", "--manager", "host:5000", "-"], "no prompts"),
        (&["publish", "/nonexistent"], "not a directory"),
        (&["engines", "list", "--manager", "host:5000"], "http://HOST:PORT"),
        (&["engines", "list", "--token", "hunter2"], "join token"),
        (&["engines", "drain"], "<ID>"),
        (&["sim", "--seeds", "0"], "0 is not in 1.."),
        (&["nonsense"], "unrecognized subcommand"),
        (&[], "Usage"),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(64), "{args:?}: {}", said(&output));
        assert!(said(&output).contains(says), "{args:?} should say {says:?}: {}", said(&output));
    }
}

#[test]
fn bad_sampling_is_refused_before_anything_is_sent() {
    for (flag, value, says) in [
        ("--temperature", "-1", "temperature"),
        ("--top-p", "0", "top_p: 0 is not above 0"),
        ("--min-tokens", "999", "above max_tokens, 256"),
        ("--stop", "", "stop_strings: empty"),
    ] {
        let mut command = anabranch();
        command.arg("submit").arg(format!("{flag}={value}")).stdin(Stdio::piped());
        command.stderr(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().expect("the binary starts");
        child.stdin.take().expect("piped").write_all(b"{\"input_ids\": [1]}\n").expect("written");
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(64), "{flag}: {}", said(&output));
        assert!(said(&output).contains(says), "{flag}: {}", said(&output));
    }
}

#[test]
fn help_and_version_are_answers() {
    for args in [&["--help"][..], &["--version"], &["manager", "--help"], &["submit", "--help"]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn nobody_at_the_address_is_69_and_a_taken_port_73() {
    let output = run(&["engines", "list", "--manager", "http://127.0.0.1:1"]);
    assert_eq!(output.status.code(), Some(69), "{}", said(&output));
    assert!(said(&output).contains("Is the manager running"), "{}", said(&output));

    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("bound").to_string();
    for args in [
        &["manager", "--listen", &addr][..],
        &["engine", "--model", "synthetic", "--listen", &addr],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(73), "{args:?}: {}", said(&output));
        assert!(said(&output).contains(&addr), "{args:?}: {}", said(&output));
    }
}

#[test]
fn tokens_are_checked_and_can_be_revoked() {
    let manager = Manager::start(&["--tls"]);
    let state = manager.dir.path().join("state");
    let state = state.to_str().expect("UTF-8");
    let issue = |role: &str| {
        let output = run(&["manager", "token", "--role", role, "--state-dir", state]);
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    };
    let list = |token: &str| run(&["engines", "list", "--manager", &manager.url, "--token", token]);

    let none = run(&["engines", "list", "--manager", &manager.url]);
    assert_eq!(none.status.code(), Some(64), "{}", said(&none));
    assert!(said(&none).contains("needs a join token"), "{}", said(&none));

    let wrong_role = list(&issue("agent"));
    assert_eq!(wrong_role.status.code(), Some(77), "{}", said(&wrong_role));

    let admin = issue("admin");
    // The manager looks at its tokens again after a second.
    wait("the new token is known", || list(&admin).status.success().then_some(()));

    let forged = format!("{}{}", &admin[..admin.len() - 4], "0000");
    assert_eq!(list(&forged).status.code(), Some(77));

    let tokens = run(&["manager", "tokens", "--json", "--state-dir", state]);
    let tokens: Value = serde_json::from_slice(&tokens.stdout).expect("JSON");
    assert!(!tokens.to_string().contains(&admin), "secrets are not listed");
}

#[test]
fn prompts_become_trajectories_on_an_engine_that_is_then_drained() {
    let manager = Manager::start(&[]);
    let prompts = manager.file(
        "p.jsonl",
        "{\"input_ids\": [5, 6, 7], \"key\": \"a\"}\n{\"input_ids\": [8], \"key\": \"b\"}\n",
    );
    let out = manager.dir.path().join("t.jsonl");
    let _engine = manager.engine("e1", &[]);
    let submit = || {
        anabranch()
            .args(["submit", "--manager", &manager.url, "--quiet", "-n", "3", "--max-tokens", "20"])
            .args(["--ignore-eos", "--seed", "7", "--out"])
            .args([&out, &prompts])
            .output()
            .expect("the binary starts")
    };
    let output = submit();
    assert!(output.status.success(), "{}", said(&output));
    let mut lines = lines(&out);
    lines.sort_by_key(|line| (line["key"].to_string(), line["index"].as_u64()));
    assert_eq!(lines.len(), 6);
    for line in &lines {
        assert_eq!(line["tokens"].as_array().map(Vec::len), Some(20), "{line}");
        assert_eq!(line["logprobs"].as_array().map(Vec::len), Some(20), "{line}");
        assert_eq!(line["finish"], "length");
        assert_eq!(line["spans"][0]["engine"], "e1");
        assert_eq!(line["versions"], serde_json::json!([0]));
    }
    assert_ne!(lines[0]["tokens"], lines[1]["tokens"], "siblings have seeds of their own");

    let status = run(&["rollout", "status", "--manager", &manager.url]);
    assert!(status.status.success(), "{}", said(&status));
    assert!(String::from_utf8_lossy(&status.stdout).contains("e1"));

    let gone = run(&["engines", "remove", "nobody", "--manager", &manager.url]);
    assert_eq!(gone.status.code(), Some(1), "{}", said(&gone));
    let drained = run(&["engines", "drain", "e1", "--deadline", "5", "--manager", &manager.url]);
    assert!(drained.status.success(), "{}", said(&drained));
    wait("the engine is gone", || {
        let serving = |engine: &Value| engine["id"] == "e1" && engine["state"] == "serving";
        (!manager.engines().iter().any(serving)).then_some(())
    });
}

#[test]
fn a_prompt_that_no_engine_can_take_is_refused_by_name() {
    let manager = Manager::start(&[]);
    let _engine = manager.engine("e1", &["--vocab", "100", "--context-capacity", "64"]);
    let prompts = manager.file(
        "p.jsonl",
        "{\"input_ids\": [100], \"key\": \"outside\"}\n{\"input_ids\": [9], \"key\": \"fine\"}\n",
    );
    let output = anabranch()
        .args(["submit", "--manager", &manager.url, "--quiet", "--max-tokens", "8"])
        .arg(&prompts)
        .output()
        .expect("the binary starts");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("\"outside\""), "{}", said(&output));
    let text = String::from_utf8(output.stdout).expect("text");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("\"fine\""));
}
