//! A manager on a free port, a trainer, and an agent that does what a test says. All over real sockets.
#![allow(dead_code)] // each test file uses its own part

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_manager::{Manager, ManagerConfig, RawConfig};
use anabranch_proto::pb::{
    self, agent_client::AgentClient, data_from_agent, data_to_agent, from_agent, from_consumer,
    to_agent, to_consumer, trainer_client::TrainerClient,
};
use anabranch_proto::tokens::{encode_ids, encode_logprobs, ids};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// Long enough for a loaded machine; a test that waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub async fn within<T>(what: &str, wait: impl Future<Output = T>) -> T {
    within_time(PATIENCE, what, wait).await
}

async fn within_time<T>(patience: Duration, what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(patience, wait)
        .await
        .unwrap_or_else(|_| panic!("waited too long for {what}"))
}

pub fn raw() -> RawConfig {
    RawConfig { listen: Some("127.0.0.1:0".into()), ..RawConfig::default() }
}

pub async fn start(raw: RawConfig) -> Manager {
    let config = ManagerConfig::try_from(raw).expect("valid");
    Manager::start(config).await.expect("started")
}

pub async fn channel(manager: &Manager) -> Channel {
    let url = format!("http://{}", manager.local_addr());
    anabranch_runtime::connect(&url, None).await.expect("connected")
}

/// Token `n` of every sample here: no two neighbours alike, none of them a stop id.
pub fn token(n: u32) -> u32 {
    10 + n * 7 % 1000
}

// === the agent ===

pub fn hello(id: &str) -> pb::Hello {
    pb::Hello {
        proto_min: 1,
        proto_max: 1,
        engine: Some(pb::Engine { id: id.into(), incarnation: 1, member: 0, members: 1 }),
        model: Some(pb::Model {
            vocab: 2000,
            max_context: 1 << 20,
            eos_ids: vec![2],
            ..Default::default()
        }),
        caps: Some(pb::Caps {
            seed_keying: pb::caps::SeedKeying::AbsolutePosition.into(),
            logprob_conventions: vec![pb::Convention::Tempered.into()],
            ..Default::default()
        }),
        kv_tokens: 1 << 22,
        max_running: 256,
        gpus: 1,
        engine_kind: "scripted".into(),
        ..Default::default()
    }
}

pub struct Agent {
    pub welcome: pb::Welcome,
    control: mpsc::Sender<pb::FromAgent>,
    orders: Streaming<pb::ToAgent>,
    data: mpsc::Sender<pb::DataFromAgent>,
    work: Streaming<pb::DataToAgent>,
    prompts: BTreeMap<u64, Vec<u32>>,
    /// The last tick that the manager acknowledged.
    pub acked: u64,
    seq: u64,
}

/// A start, with its prompt put together.
#[derive(Debug)]
pub struct Started {
    pub start: pb::Start,
    pub prompt: Vec<u32>,
}

/// The first word of the manager on Control.
pub async fn greet(
    channel: Channel,
    hello: pb::Hello,
) -> (mpsc::Sender<pb::FromAgent>, Streaming<pb::ToAgent>, Option<to_agent::Kind>) {
    let (control, out) = mpsc::channel(64);
    let mut client = AgentClient::new(channel);
    let mut orders = client.control(ReceiverStream::new(out)).await.expect("answered").into_inner();
    let kind = Some(from_agent::Kind::Hello(hello));
    control.send(pb::FromAgent { kind }).await.expect("open");
    let first = within("the answer to Hello", orders.message()).await.expect("a message");
    (control, orders, first.and_then(|message| message.kind))
}

impl Agent {
    pub async fn attach(channel: Channel, hello: pb::Hello) -> Agent {
        let (control, orders, first) = greet(channel.clone(), hello).await;
        let Some(to_agent::Kind::Welcome(welcome)) = first else {
            panic!("not welcome: {first:?}")
        };
        let (data, out) = mpsc::channel(1024);
        let bind = data_from_agent::Kind::Bind(pb::Bind { session: welcome.session });
        data.send(pb::DataFromAgent { kind: Some(bind) }).await.expect("open");
        let mut client = AgentClient::new(channel);
        let work = client.data(ReceiverStream::new(out)).await.expect("bound").into_inner();
        let seq = welcome.acked_tick;
        Agent { welcome, control, orders, data, work, prompts: BTreeMap::new(), acked: 0, seq }
    }

    pub async fn say(&self, kind: from_agent::Kind) {
        self.control.send(pb::FromAgent { kind: Some(kind) }).await.expect("open");
    }

    /// The next order on Control.
    pub async fn order(&mut self) -> Result<Option<to_agent::Kind>, Status> {
        let message = within("an order", self.orders.message()).await?;
        Ok(message.and_then(|message| message.kind))
    }

    /// The next start; prompts and acks on the way are taken in.
    pub async fn next_start(&mut self) -> Started {
        within("a start", async {
            loop {
                match self.next_work().await {
                    data_to_agent::Kind::Start(start) => {
                        let prompt = self.prompts.get(&start.prompt).expect("sent before").clone();
                        return Started { start, prompt };
                    }
                    data_to_agent::Kind::Stop(_) => {}
                    _ => {}
                }
            }
        })
        .await
    }

    pub async fn next_work(&mut self) -> data_to_agent::Kind {
        let message = self.work.message().await.expect("a message").expect("open");
        let kind = message.kind.expect("a kind");
        match &kind {
            data_to_agent::Kind::Prompt(part) => {
                let prompt = self.prompts.entry(part.digest).or_default();
                prompt.truncate(part.at as usize);
                prompt.extend(ids(&part.ids));
            }
            data_to_agent::Kind::Ack(ack) => self.acked = ack.seq,
            _ => {}
        }
        kind
    }

    /// Tokens [from, to) of a sample as one tick, with an end where `end` says why.
    pub async fn make(
        &mut self,
        start: &pb::Start,
        from: u32,
        to: u32,
        end: Option<pb::end::Why>,
    ) -> pb::Tick {
        self.seq += 1;
        let tick = tick(self.seq, start, from, to, end);
        self.send(tick.clone()).await;
        tick
    }

    pub async fn send(&self, tick: pb::Tick) {
        let kind = Some(data_from_agent::Kind::Tick(tick));
        self.data.send(pb::DataFromAgent { kind }).await.expect("open");
    }

    pub async fn until_acked(&mut self, seq: u64) {
        within("an ack", async {
            while self.acked < seq {
                self.next_work().await;
            }
        })
        .await;
    }

    /// Makes all of a sample at once, from where it starts.
    pub async fn finish(&mut self, start: &pb::Start) {
        let left = start.sampling.as_ref().expect("set").max_tokens;
        let (from, to) = (start.offset, start.offset + left);
        self.make(start, from, to, Some(pb::end::Why::Length)).await;
    }

    /// For a test that drives the Data stream itself; Control stays open as long as the process.
    pub fn into_streams(self) -> (mpsc::Sender<pb::DataFromAgent>, Streaming<pb::DataToAgent>) {
        let (control, mut orders) = (self.control, self.orders);
        let task = async move {
            let _open = control;
            while let Ok(Some(_)) = orders.message().await {}
        };
        #[allow(clippy::disallowed_methods)]
        tokio::spawn(task);
        (self.data, self.work)
    }

    /// Does so with every start until dropped.
    pub async fn serve(mut self) {
        loop {
            let started = loop {
                match self.work.message().await {
                    Ok(Some(pb::DataToAgent { kind: Some(data_to_agent::Kind::Start(start)) })) => {
                        break start;
                    }
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return,
                }
            };
            self.finish(&started).await;
        }
    }
}

pub fn tick(
    seq: u64,
    start: &pb::Start,
    from: u32,
    to: u32,
    end: Option<pb::end::Why>,
) -> pb::Tick {
    let sample = start.sample.expect("set");
    let made: Vec<u32> = (from..to).map(token).collect();
    let ends = end.map(|why| pb::End {
        sample: Some(sample),
        attempt: start.attempt,
        at: to,
        why: why.into(),
        ..Default::default()
    });
    pb::Tick {
        seq,
        segs: vec![pb::Seg {
            group: sample.group,
            index: sample.index,
            attempt: start.attempt,
            offset: from,
            count: to - from,
            ..Default::default()
        }],
        tokens: encode_ids(&made),
        logprobs: encode_logprobs(&vec![-0.25; made.len()]),
        versions: vec![pb::Version::default()],
        ends: ends.into_iter().collect(),
        ..Default::default()
    }
}

// === the trainer ===

pub struct Trainer {
    pub client: TrainerClient<Channel>,
    pub session: u64,
}

pub struct Consumer {
    to: mpsc::Sender<pb::FromConsumer>,
    from: Streaming<pb::ToConsumer>,
    pub patience: Duration,
}

/// A whole micro-batch.
#[derive(Debug)]
pub struct Received {
    pub seq: u64,
    pub last_of_step: bool,
    pub trajectories: Vec<pb::Trajectory>,
}

pub fn group(key: &str, n: u32, max_tokens: u32) -> pb::Group {
    pb::Group {
        key: key.into(),
        prompt: encode_ids(&[5, 6, 7]),
        n,
        sampling: Some(pb::Sampling { max_tokens, ..Default::default() }),
        ..Default::default()
    }
}

impl Trainer {
    pub async fn open(channel: Channel) -> Trainer {
        let mut client = TrainerClient::new(channel).max_decoding_message_size(64 << 20);
        let request = pb::OpenRequest { job: "job".into(), ..Default::default() };
        let opened = client.open(request).await.expect("opened").into_inner();
        Trainer { client, session: opened.session }
    }

    pub async fn submit(
        &mut self,
        step: u64,
        groups: Vec<pb::Group>,
    ) -> Result<pb::Submitted, Status> {
        let session = self.session;
        let request = pb::SubmitRequest { session, step, r#final: true, groups };
        Ok(self.client.submit(request).await?.into_inner())
    }

    pub async fn consume(&mut self, pack: pb::Pack) -> Consumer {
        self.consume_shard(pack, 0, 1).await
    }

    pub async fn consume_shard(&mut self, pack: pb::Pack, index: u32, count: u32) -> Consumer {
        let (to, out) = mpsc::channel(64);
        let attach = pb::Attach {
            session: self.session,
            pack: Some(pack),
            shard_index: index,
            shard_count: count,
        };
        let consumer_says = |kind| pb::FromConsumer { kind: Some(kind) };
        to.send(consumer_says(from_consumer::Kind::Attach(attach))).await.expect("open");
        let credit = pb::Credit { bytes: 1 << 40, samples: 1 << 30 };
        to.send(consumer_says(from_consumer::Kind::Credit(credit))).await.expect("open");
        let from =
            self.client.consume(ReceiverStream::new(out)).await.expect("attached").into_inner();
        Consumer { to, from, patience: PATIENCE }
    }
}

impl Consumer {
    pub async fn say(&self, kind: from_consumer::Kind) {
        self.to.send(pb::FromConsumer { kind: Some(kind) }).await.expect("open");
    }

    pub async fn next(&mut self) -> Result<Option<to_consumer::Kind>, Status> {
        let message = within_time(self.patience, "a batch", self.from.message()).await?;
        Ok(message.and_then(|message| message.kind))
    }

    pub async fn batch(&mut self) -> Received {
        let mut trajectories = Vec::new();
        loop {
            let next = self.next().await.expect("a message");
            let Some(to_consumer::Kind::Part(part)) = next else { panic!("not a part: {next:?}") };
            trajectories.extend(part.trajectories);
            if part.last_part {
                return Received { seq: part.seq, last_of_step: part.last_of_step, trajectories };
            }
        }
    }

    pub async fn step_done(&mut self) -> pb::StepDone {
        let next = self.next().await.expect("a message");
        let Some(to_consumer::Kind::StepDone(done)) = next else { panic!("not the end: {next:?}") };
        done
    }
}

/// Every token where it belongs, each with its log-probability, spans without a gap.
pub fn check_exact(trajectory: &pb::Trajectory, len: u32) {
    let have: Vec<u32> = ids(&trajectory.tokens).collect();
    let want: Vec<u32> = (0..len).map(token).collect();
    assert_eq!(have, want, "{}/{}", trajectory.key, trajectory.index);
    assert_eq!(trajectory.logprobs.len(), trajectory.tokens.len());
    let mut at = 0;
    for span in &trajectory.spans {
        assert_eq!(span.start, at);
        at += span.len;
    }
    assert_eq!(at, len);
}

// === HTTP ===

/// Status code and body of a GET.
pub async fn get(addr: std::net::SocketAddr, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(addr).await.expect("connected");
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    within("the answer", stream.read_to_end(&mut answer)).await.expect("answered");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a code");
    (code, body.to_owned())
}

pub async fn state(addr: std::net::SocketAddr) -> serde_json::Value {
    let (code, body) = get(addr, "/state").await;
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).expect("JSON")
}

/// Until the state is as `wanted`; shows the last one otherwise.
pub async fn until(
    addr: std::net::SocketAddr,
    what: &str,
    wanted: impl Fn(&serde_json::Value) -> bool,
) -> serde_json::Value {
    let from = tokio::time::Instant::now();
    loop {
        let state = state(addr).await;
        if wanted(&state) {
            return state;
        }
        assert!(from.elapsed() < PATIENCE, "never {what}: {state:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
