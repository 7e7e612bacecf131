//! An engine that the agent starts itself: it is watched, started again after a death, and stopped at the end.

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream};

use anabranch_agent::{AgentConfig, EngineSpec};
use anabranch_engine::{EngineConfig, Server};
use anabranch_proto::{SampleId, pb::from_agent};
use common::*;
use tokio_util::sync::CancellationToken;

/// Not a test: the engine's process, when the agent starts this executable again.
#[tokio::test]
#[ignore = "a process of the test an_engine_of_ours_is_started_restarted_and_stopped"]
async fn serve_engine() {
    let Ok(addr) = std::env::var("ANABRANCH_TEST_ENGINE") else { return };
    let mut config = EngineConfig::synthetic(params());
    config.listen = addr.parse().expect("address");
    config.rate = Some(200.0);
    config.faults = true;
    let server = Server::bind(config).await.expect("binds");
    server.run(CancellationToken::new()).await.expect("runs");
}

fn command(addr: SocketAddr) -> Vec<String> {
    let exe = std::env::current_exe().expect("own path");
    let script = format!(
        "ANABRANCH_TEST_ENGINE={addr} exec {} --exact serve_engine --ignored",
        exe.display()
    );
    let port = addr.port().to_string();
    ["/bin/sh", "-c", &script, "engine", "--port", &port].map(str::to_owned).to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_of_ours_is_started_restarted_and_stopped() {
    logs();
    let addr = TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("bound");
    let mut manager = TestManager::start().await;
    let agent = TestAgent::start(manager.addr, addr, |config: &mut AgentConfig| {
        config.engine = EngineSpec::command(command(addr)).expect("a command");
    });
    let mut first = manager.attach(|_| welcome(1)).await;
    let mut ledger = Ledger::default();
    let prompt = first.prompt(&[3]).await;
    first.start(SampleId::new(1, 0), prompt, 9000, 0).await;
    first.until(&mut ledger, |ledger| ledger.tokens() > 50).await;
    die(addr);
    let down = first
        .until_said(&mut ledger, |kind| match kind {
            from_agent::Kind::EngineDown(down) => Some(down.clone()),
            _ => None,
        })
        .await;
    assert!(down.will_restart, "{down:?}");
    first.until(&mut ledger, |ledger| ledger.ended() == 1).await;
    verify(&ledger.samples[&SampleId::new(1, 0)], &[3], 0, &base());
    let mut second = manager.attach(|_| welcome(2)).await;
    let mut ledger = Ledger::default();
    let prompt = second.prompt(&[3]).await;
    second.start(SampleId::new(2, 0), prompt, 60, 0).await;
    second.until(&mut ledger, |ledger| ledger.ended() == 1).await;
    verify(&ledger.samples[&SampleId::new(2, 0)], &[3], 0, &base());
    agent.stop.cancel();
    second.rest(&mut ledger).await;
    agent.ended().await.expect("left in order");
    assert!(TcpStream::connect(addr).is_err(), "its engine went with it");
}

/// The answer never comes.
fn die(addr: SocketAddr) {
    use std::io::{Read, Write};
    let mut socket = TcpStream::connect(addr).expect("connect");
    let body = r#"{"kind":"die"}"#;
    let head =
        format!("POST /fault HTTP/1.1\r\nhost: e\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    socket.write_all(head.as_bytes()).expect("written");
    let _ = socket.read(&mut [0; 16]);
}
