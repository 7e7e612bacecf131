//! What a chunk costs the agent in CPU, sockets included: the engine is a process of its own, the agent a
//! thread of its own whose clock is read.

mod common;

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anabranch_agent::{AgentConfig, EngineSpec};
use anabranch_engine::{EngineConfig, Server};
use anabranch_proto::{SampleId, pb};
use common::*;
use tokio_util::sync::CancellationToken;

const SAMPLES: u32 = 512;
const RATE: f64 = 100.0;
const SECONDS: u64 = 10;

/// Not a test: the engine's process, when [`engine_process`] starts this executable again.
#[tokio::test]
#[ignore = "a process of the test `cost_of_a_chunk`"]
async fn serve_engine() {
    let Ok(addr) = std::env::var("ANABRANCH_TEST_ENGINE") else { return };
    let mut config = EngineConfig::synthetic(params());
    config.listen = addr.parse().expect("address");
    config.rate = Some(RATE);
    config.max_running = 4096;
    let server = Server::bind(config).await.expect("binds");
    server.run(CancellationToken::new()).await.expect("runs");
}

struct EngineProcess(Child, SocketAddr);

impl Drop for EngineProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn engine_process() -> EngineProcess {
    let free =
        std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("addr");
    let exe = std::env::current_exe().expect("own path");
    let child = Command::new(exe)
        .args(["--exact", "serve_engine", "--ignored"])
        .env("ANABRANCH_TEST_ENGINE", free.to_string())
        .stdout(Stdio::null())
        .spawn()
        .expect("starts");
    EngineProcess(child, free)
}

fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
#[ignore = "prints a figure: cargo test --release -p anabranch-agent --test cost -- --ignored --exact cost_of_a_chunk --nocapture"]
async fn cost_of_a_chunk() {
    let engine = engine_process();
    let mut manager = TestManager::start().await;
    let (manager_at, engine_at) = (manager.addr, engine.1);
    let stop = CancellationToken::new();
    let leave = stop.clone();
    let (ask, asked) = std::sync::mpsc::channel::<std::sync::mpsc::Sender<Duration>>();
    let agent = std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let staging = tempfile::tempdir().expect("dir");
        let spec = EngineSpec::parse(&format!("sglang={engine_at}")).expect("url");
        let mut config = AgentConfig::new(format!("http://{manager_at}"), spec);
        config.staging = staging.path().to_owned();
        config.drain_deadline = Duration::ZERO;
        runtime.block_on(async {
            let clock = async {
                loop {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    while let Ok(reply) = asked.try_recv() {
                        reply.send(thread_cpu()).expect("the test waits");
                    }
                }
            };
            tokio::select! {
                result = anabranch_agent::run(config, leave) => result,
                () = clock => unreachable!("never ends"),
            }
        })
    });
    let cpu = || {
        let (reply, answer) = std::sync::mpsc::channel();
        ask.send(reply).expect("the agent runs");
        answer.recv().expect("the agent runs")
    };
    let mut attached = manager.attach(|_| pb::Welcome { tick_ms: 20, ..welcome(1) }).await;
    let mut ledger = Ledger::default();
    let digest = attached.prompt(&[1, 2, 3]).await;
    for index in 0..SAMPLES {
        attached.start(SampleId::new(1, index), digest, 20_000, u64::from(index)).await;
    }
    attached
        .until(&mut ledger, |l| l.samples.len() == SAMPLES as usize && l.tokens() > 40_000)
        .await;
    let (cpu_before, tokens_before, began) = (cpu(), ledger.tokens(), std::time::Instant::now());
    attached.until(&mut ledger, |_| began.elapsed() > Duration::from_secs(SECONDS)).await;
    let (cpu_spent, made) = (cpu() - cpu_before, ledger.tokens() - tokens_before);
    let micros = cpu_spent.as_secs_f64() * 1e6 / (made as f64 / 8.0);
    println!(
        "agent: {made} tokens in {:.1} s, {:.2} s CPU: {micros:.2} us per chunk of 8, {:.0} tokens per CPU second",
        began.elapsed().as_secs_f64(),
        cpu_spent.as_secs_f64(),
        made as f64 / cpu_spent.as_secs_f64()
    );
    stop.cancel();
    attached.rest(&mut ledger).await;
    agent.join().expect("no panic").expect("left in order");
    verify(&ledger.samples[&SampleId::new(1, 0)], &[1, 2, 3], 0, &base());
}
