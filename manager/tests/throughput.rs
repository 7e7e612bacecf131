//! What the manager costs, measured on a manager in a process of its own: CPU, memory, and the delay from a
//! sample's last token to its delivery. Slow and for an idle machine, so ignored; run it with
//! `cargo test --release -p anabranch-manager --test throughput -- --ignored --nocapture measure`.
//! `TOKENS` (of each sample, default 1000) and `SAMPLES` (of each of 4 agents, default 256) change its size.

mod common;

use std::collections::BTreeMap;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anabranch_manager::RawConfig;
use anabranch_proto::pb::{self, data_from_agent, data_to_agent, from_consumer};
use anabranch_proto::tokens::{encode_ids, encode_logprobs};
use common::*;
use tokio::time::Instant;

const ANNOUNCE: &str = "ANABRANCH_TEST_ANNOUNCE";
const AGENTS: usize = 4;
const TICK: Duration = Duration::from_millis(20);
const SEGMENT: u32 = 8;
/// 8 tokens every 80 ms: 100 tokens/s a sample.
const PHASES: usize = 4;

/// Not a test: what the measured process runs until its stdin closes.
#[test]
#[ignore = "a process of the test `measure`"]
fn child() {
    let Some(path) = std::env::var_os(ANNOUNCE) else { return };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let manager = start(RawConfig { announce: Some(path.into()), ..raw() }).await;
        let closed = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
        closed.await.expect("ended").expect("closed");
        manager.stop().await.expect("stopped");
    });
}

#[test]
#[ignore = "measures on an idle machine: cargo test --release -p anabranch-manager --test throughput -- --ignored --exact measure --nocapture"]
fn measure() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("m.json");
    let mut child = Command::new(std::env::current_exe().expect("a path"))
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env(ANNOUNCE, &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("started");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(load(&path, child.id()));
    drop(child.stdin.take());
    assert!(child.wait().expect("ended").success());
}

fn setting(name: &str, default: u32) -> u32 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

type SentLast = Arc<Mutex<BTreeMap<(u64, u32), Instant>>>;

async fn load(announce: &std::path::Path, pid: u32) {
    let (tokens, samples) = (setting("TOKENS", 1000), setting("SAMPLES", 256));
    while !announce.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let url = format!("file:{}", announce.display());
    let connect = async || anabranch_runtime::connect(&url, None).await.expect("connected");
    let sent_last = SentLast::default();
    let mut agents = tokio::task::JoinSet::new();
    for n in 0..AGENTS {
        let hello =
            pb::Hello { max_running: samples, kv_tokens: 1 << 34, ..hello(&format!("e{n}")) };
        let agent = Agent::attach(connect().await, hello).await;
        agents.spawn(pace(agent, tokens, sent_last.clone()));
    }
    let mut trainer = Trainer::open(connect().await).await;
    let mut consumer =
        trainer.consume(pb::Pack { min: 64, max_wait_ms: 20, ..Default::default() }).await;
    consumer.patience = Duration::from_secs(600);
    let total = AGENTS as u32 * samples;
    let groups = (0..total / 8).map(|n| group(&format!("g{n}"), 8, tokens)).collect();
    let (cpu_before, from) = (cpu_seconds(pid), Instant::now());
    trainer.submit(1, groups).await.expect("taken");

    let mut delays = Vec::new();
    let mut got = 0;
    while got < total {
        let batch = consumer.batch().await;
        let now = Instant::now();
        for trajectory in &batch.trajectories {
            check_exact(trajectory, tokens);
            let sample = trajectory.sample.expect("set");
            let sent =
                sent_last.lock().expect("not poisoned").remove(&(sample.group, sample.index));
            delays.push(now - sent.expect("it was sent"));
        }
        got += batch.trajectories.len() as u32;
        consumer.say(from_consumer::Kind::Ack(pb::Ack { seq: batch.seq })).await;
    }
    let (wall, cpu) = (from.elapsed().as_secs_f64(), cpu_seconds(pid) - cpu_before);
    delays.sort();
    let made = f64::from(total) * f64::from(tokens);
    let at = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize];
    println!("tokens                        {made}");
    println!("wall_s                        {wall:.1}");
    println!("tokens_per_second             {:.0}", made / wall);
    println!("manager_cpu_s                 {cpu:.2}");
    println!("tokens_per_manager_cpu_second {:.0}", made / cpu);
    println!("manager_peak_rss_mib          {}", peak_rss_kib(pid) / 1024);
    println!("delivery p50 {:?} p99 {:?} max {:?}", at(0.5), at(0.99), at(1.0));
}

struct Running {
    start: pb::Start,
    at: u32,
    phase: usize,
}

/// An engine's agent: 8 tokens of each sample every 80 ms, what is due in one tick every 20 ms.
async fn pace(agent: Agent, tokens: u32, sent_last: SentLast) {
    let (data, mut work) = agent.into_streams();
    let mut every = tokio::time::interval(TICK);
    let (mut running, mut seq, mut arrived): (Vec<Running>, u64, usize) = (Vec::new(), 0, 0);
    loop {
        tokio::select! {
            message = work.message() => match message {
                Ok(Some(pb::DataToAgent { kind: Some(data_to_agent::Kind::Start(start)) })) => {
                    running.push(Running { at: start.offset, start, phase: arrived % PHASES });
                    arrived += 1;
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            },
            _ = every.tick() => {
                seq += 1;
                let tick = due(seq, &mut running, tokens, &sent_last);
                let kind = Some(data_from_agent::Kind::Tick(tick));
                if data.send(pb::DataFromAgent { kind }).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn due(seq: u64, running: &mut Vec<Running>, tokens: u32, sent_last: &SentLast) -> pb::Tick {
    let mut tick = pb::Tick { seq, versions: vec![pb::Version::default()], ..Default::default() };
    let mut ids = Vec::new();
    for run in running.iter_mut().filter(|run| run.phase == seq as usize % PHASES) {
        let sample = run.start.sample.expect("set");
        let count = SEGMENT.min(tokens - run.at);
        tick.segs.push(pb::Seg {
            group: sample.group,
            index: sample.index,
            attempt: run.start.attempt,
            offset: run.at,
            count,
            ..Default::default()
        });
        ids.extend((run.at..run.at + count).map(token));
        run.at += count;
        if run.at == tokens {
            sent_last
                .lock()
                .expect("not poisoned")
                .insert((sample.group, sample.index), Instant::now());
            let (attempt, why) = (run.start.attempt, pb::end::Why::Length.into());
            let sample = Some(sample);
            tick.ends.push(pb::End { sample, attempt, at: tokens, why, ..Default::default() });
        }
    }
    running.retain(|run| run.at < tokens);
    tick.logprobs = encode_logprobs(&vec![-0.25; ids.len()]);
    tick.tokens = encode_ids(&ids);
    tick
}

fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let after_name = stat.rsplit(')').next().expect("a name in parentheses");
    let fields: Vec<u64> =
        after_name.split_whitespace().skip(11).take(2).map(|f| f.parse().expect("ticks")).collect();
    // Clock ticks are 100 a second on Linux.
    fields.iter().sum::<u64>() as f64 / 100.0
}

fn peak_rss_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("there");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}
