//! Who is let in and who is told why not; health, state, metrics and events; start and stop.

mod common;

use std::time::{Duration, Instant};

use anabranch_manager::{Manager, ManagerConfig, ManagerError, RawConfig};
use anabranch_proto::pb::admin_client::AdminClient;
use anabranch_proto::pb::{self, to_agent};
use anabranch_runtime::{Announce, connect};
use anabranch_views::StateView;
use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::{Code, Request};

#[tokio::test]
async fn a_hello_that_cannot_be_served_is_refused_with_a_reason() {
    let manager = start(raw()).await;
    let old = pb::Hello { proto_min: 0, proto_max: 0, ..hello("e1") };
    let nameless = pb::Hello { engine: None, ..hello("e1") };
    let spaced = hello("two words");
    for (hello, says) in [
        (old, "install the same Anabranch version on both sides"),
        (nameless, "hello.engine: missing"),
        (spaced, "has a space in it"),
    ] {
        let (_control, mut orders, first) = greet(channel(&manager).await, hello).await;
        let Some(to_agent::Kind::Refused(refused)) = first else { panic!("{first:?}") };
        assert!(refused.why.contains(says) && !refused.retry, "{refused:?}");
        let end = within("the end of the stream", orders.message()).await;
        assert!(!matches!(end, Ok(Some(_))), "{end:?}");
    }
    let (_, metrics) = get(manager.local_addr(), "/metrics").await;
    assert!(metrics.contains("anabranch_hellos_refused_total 3"), "{metrics}");
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn an_engine_that_does_not_fit_the_job_is_refused_by_the_core() {
    let manager = start(raw()).await;
    let channel = channel(&manager).await;
    let _trainer = Trainer::open(channel.clone()).await;
    let mut raw_only = hello("e1");
    raw_only.caps.as_mut().expect("set").logprob_conventions = vec![pb::Convention::Raw.into()];
    let (_control, _orders, first) = greet(channel, raw_only).await;
    let Some(to_agent::Kind::Refused(refused)) = first else { panic!("{first:?}") };
    assert!(refused.why.contains("log-probabilities"), "{refused:?}");
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn bad_submissions_are_refused_whole_and_by_name() {
    let manager = start(raw()).await;
    let mut trainer = Trainer::open(channel(&manager).await).await;
    let bad = |change: fn(&mut pb::Group)| {
        let mut group = group("bad", 2, 10);
        change(&mut group);
        group
    };
    for (group_, says) in [
        (bad(|g| g.prompt = Default::default()), "group 1 (key \"bad\"): prompt: empty"),
        (bad(|g| g.prompt = vec![1, 2, 3].into()), "3 bytes are not whole token ids"),
        (bad(|g| g.n = 0), "n: 0 is not between 1 and 4096"),
        (bad(|g| g.sampling = None), "sampling: missing"),
        (bad(|g| g.sampling.as_mut().expect("set").temperature = Some(f32::NAN)), "temperature"),
    ] {
        let status = trainer.submit(1, vec![group("good", 1, 4), group_]).await.expect_err(says);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(says), "{}", status.message());
    }
    let state = state(manager.local_addr()).await;
    assert_eq!(state["samples"]["waiting"], 0, "nothing of a refused submission was taken");
    trainer.session = 12345;
    let status = trainer.submit(1, vec![group("x", 1, 4)]).await.expect_err("no such session");
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("open the job again"));
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn health_state_metrics_page_and_events_answer() {
    let manager = start(raw()).await;
    let addr = manager.local_addr();
    assert_eq!(get(addr, "/livez").await, (200, "ok\n".to_owned()));
    assert_eq!(get(addr, "/readyz").await.0, 200);
    assert_eq!(get(addr, "/nothing").await.0, 404);
    let (code, page) = get(addr, "/").await;
    assert!(code == 200 && page.contains("<title>Anabranch</title>") && !page.contains("http://"));
    let _agent = Agent::attach(channel(&manager).await, hello("e1")).await;
    let state = until(addr, "attached", |state| state["engines"][0]["id"] == "e1").await;
    assert!(state["uptime_ms"].is_u64() && state["ledger"]["tokens"] == 0, "{state:#}");
    let metered = async {
        while !get(addr, "/metrics").await.1.contains("anabranch_engines{state=\"joining\"} 1") {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    within("the engine in the metrics", metered).await;
    // A late listener gets what was, then what comes.
    let mut events = listen(addr).await;
    read_until(&mut events, "event: engine_attached").await;
    let _other = Agent::attach(channel(&manager).await, hello("e2")).await;
    let text = read_until(&mut events, "\"engine\":\"e2\"").await;
    assert!(text.contains("id: 2"), "{text}");
    manager.stop().await.expect("stopped");
}

async fn listen(addr: std::net::SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(addr).await.expect("connected");
    stream.write_all(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    stream
}

async fn read_until(stream: &mut TcpStream, wanted: &str) -> String {
    let mut text = String::new();
    within(wanted, async {
        let mut buffer = [0; 4096];
        while !text.contains(wanted) {
            let n = stream.read(&mut buffer).await.expect("open");
            assert!(n > 0, "ended before {wanted}: {text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    })
    .await;
    text
}

#[tokio::test]
async fn people_can_look_drain_and_remove_over_grpc() {
    let manager = start(raw()).await;
    let channel = channel(&manager).await;
    let mut agent = Agent::attach(channel.clone(), hello("e1")).await;
    let mut admin = AdminClient::new(channel);
    let state = admin.state(pb::StateRequest::default()).await.expect("shown").into_inner().text;
    assert!(state.contains("\"engines\":[{\"id\":\"e1\""), "{state}");
    let mut events =
        admin.events(pb::StateRequest::default()).await.expect("listening").into_inner();
    let first = within("an event", events.message()).await.expect("open").expect("one");
    assert!(first.text.contains("engine_attached"), "{}", first.text);
    let drain = |engine: &str, kind: pb::engines_request::Kind| pb::EnginesRequest {
        kind: kind.into(),
        engine: engine.into(),
        deadline_ms: 1_000,
    };
    let unknown = admin.engines(drain("e9", pb::engines_request::Kind::Drain)).await;
    assert_eq!(unknown.expect_err("no such engine").code(), Code::NotFound);
    let said = admin.engines(drain("e1", pb::engines_request::Kind::Remove)).await.expect("said");
    assert!(!said.into_inner().text.is_empty());
    let ended = async { while let Ok(Some(_)) = agent.order().await {} };
    within("the end of the removed engine's link", ended).await;
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn the_state_of_a_big_fleet_comes_in_pages_that_join_to_the_whole() {
    let manager = start(raw()).await;
    let channel = channel(&manager).await;
    let mut agents = Vec::new();
    for id in ["e1", "e2", "e3"] {
        agents.push(Agent::attach(channel.clone(), hello(id)).await);
    }
    let page = async |query: &str| -> StateView {
        let (code, body) = get(manager.local_addr(), &format!("/state{query}")).await;
        assert_eq!(code, 200, "{body}");
        serde_json::from_str(&body).expect("a state")
    };
    let ids = |state: &StateView| -> Vec<String> {
        state.engines.iter().map(|engine| engine.id.clone()).collect()
    };
    let whole = page("").await;
    assert_eq!((ids(&whole), whole.next), (vec!["e1".into(), "e2".into(), "e3".into()], None));

    let mut joined = page("?limit=2").await;
    assert_eq!((ids(&joined), joined.fleet.engines), (vec!["e1".into(), "e2".into()], 3));
    let from = joined.next.expect("one engine is left");
    let mut admin = AdminClient::new(channel);
    let request = pb::StateRequest { from, limit: 2, ..Default::default() };
    let rest = admin.state(request).await.expect("shown").into_inner().text;
    joined.extend(serde_json::from_str(&rest).expect("a state"));
    assert_eq!((ids(&joined), joined.next), (ids(&whole), None));

    let (code, body) = get(manager.local_addr(), "/state?limit=257").await;
    assert_eq!(code, 400, "{body}");
    assert!(body.starts_with("limit 257: a page has at most 256 engines"), "{body}");
    manager.stop().await.expect("stopped");
}

#[tokio::test]
async fn a_taken_port_is_told_before_anything_is_written() {
    let first = start(raw()).await;
    let dir = tempfile::tempdir().expect("dir");
    let announce = dir.path().join("m.json");
    let listen = Some(first.local_addr().to_string());
    let raw = RawConfig { listen, announce: Some(announce.clone()), ..raw() };
    let config = ManagerConfig::try_from(raw).expect("valid");
    let error = Manager::start(config).await.map(|_| ()).expect_err("taken");
    assert!(matches!(error, ManagerError::Listen(_)), "{error}");
    assert!(error.to_string().contains("the port is taken"), "{error}");
    assert_eq!(error.exit_code(), 73);
    assert!(!announce.exists());
    first.stop().await.expect("stopped");
}

#[tokio::test]
async fn stopping_ends_open_streams_quickly_and_removes_the_announcement() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("m.json");
    let manager = start(RawConfig { announce: Some(path.clone()), ..raw() }).await;
    let announced = Announce::read(&path).expect("announced");
    assert_eq!(announced.url, format!("http://{}", manager.local_addr()));
    assert!(announced.token.is_none());
    let channel = connect(&format!("file:{}", path.display()), None).await.expect("connected");
    let mut agent = Agent::attach(channel.clone(), hello("e1")).await;
    let mut trainer = Trainer::open(channel).await;
    let mut consumer = trainer.consume(pb::Pack::default()).await;
    let from = Instant::now();
    manager.stop().await.expect("stopped");
    assert!(from.elapsed() < Duration::from_secs(4), "{:?}", from.elapsed());
    assert!(agent.order().await.is_err(), "the agent is told");
    assert!(consumer.next().await.is_err(), "the trainer is told");
    assert!(!path.exists());
}

#[tokio::test]
async fn with_tls_each_door_asks_for_the_token_of_its_role() {
    let dir = tempfile::tempdir().expect("dir");
    let state_dir = Some(dir.path().join("state"));
    let raw = RawConfig { tls: Some(true), state_dir: state_dir.clone(), ..raw() };
    let manager = start(raw.clone()).await;
    let tokens = manager.ready().tokens.clone().expect("minted");
    let url = manager.ready().url.clone();
    assert!(url.starts_with("https://127.0.0.1:"));
    let channel = connect(&url, Some(&tokens.agent)).await.expect("connected");

    let (_control, _orders, first) = greet(channel.clone(), hello("e1")).await;
    let Some(to_agent::Kind::Refused(refused)) = first else { panic!("{first:?}") };
    assert!(refused.why.contains("asks for a join token of the role agent"), "{}", refused.why);
    let foreign = pb::Hello { token: tokens.trainer.to_string(), ..hello("e1") };
    let (_control, _orders, first) = greet(channel.clone(), foreign).await;
    let Some(to_agent::Kind::Refused(refused)) = first else { panic!("{first:?}") };
    assert!(refused.why.contains("role trainer, but this needs the role agent"), "{}", refused.why);
    let good = pb::Hello { token: tokens.agent.to_string(), ..hello("e1") };
    let _agent = Agent::attach(channel.clone(), good).await;

    let mut admin = AdminClient::new(channel.clone());
    let none = admin.state(pb::StateRequest::default()).await.expect_err("no token");
    assert_eq!(none.code(), Code::Unauthenticated);
    let token = tokens.admin.to_string();
    admin.state(pb::StateRequest { token, ..Default::default() }).await.expect("shown");

    let mut trainer = pb::trainer_client::TrainerClient::new(channel);
    let open = || Request::new(pb::OpenRequest { job: "job".into(), ..Default::default() });
    assert_eq!(trainer.open(open()).await.expect_err("no token").code(), Code::Unauthenticated);
    let mut with_token = open();
    let bearer = format!("Bearer {}", tokens.trainer).parse().expect("a header");
    with_token.metadata_mut().insert("authorization", bearer);
    trainer.open(with_token).await.expect("opened");
    manager.stop().await.expect("stopped");

    let again = start(raw).await;
    let kept = again.ready().tokens.clone().expect("kept");
    assert_eq!(kept.agent.to_string(), tokens.agent.to_string(), "lines once printed stay good");
    again.stop().await.expect("stopped");
}

#[tokio::test]
async fn an_open_address_without_tls_is_refused() {
    let raw =
        RawConfig { listen: Some("0.0.0.0:0".into()), tls: Some(false), ..RawConfig::default() };
    let config = ManagerConfig::try_from(raw).expect("valid");
    let error = Manager::start(config).await.map(|_| ()).expect_err("exposed");
    assert_eq!(error.exit_code(), 77);
    assert!(error.to_string().contains("--insecure"), "{error}");
}
