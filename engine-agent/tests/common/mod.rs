//! A scripted manager over real gRPC, an embedded engine over real HTTP, and an oracle that recomputes
//! every token from its prompt and its versions.
#![allow(dead_code)] // each test file uses its part
#![allow(clippy::type_complexity)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use anabranch_agent::{AgentConfig, AgentError, EngineSpec};
use anabranch_engine::synthetic::{Chain, SyntheticParams, WeightsKey, base_digest, next};
use anabranch_engine::{EngineConfig, Server};
use anabranch_proto::pb::agent_server::{Agent, AgentServer};
use anabranch_proto::pb::{self, data_from_agent, data_to_agent, from_agent, to_agent};
use anabranch_proto::{SampleId, tokens};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

pub const PATIENCE: Duration = Duration::from_secs(20);

// === the engine ===

pub struct TestEngine {
    pub addr: SocketAddr,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl TestEngine {
    pub async fn start(tune: impl FnOnce(&mut EngineConfig)) -> TestEngine {
        let mut config = EngineConfig::synthetic(params());
        config.faults = true;
        tune(&mut config);
        let server = Server::bind(config).await.expect("engine binds");
        let addr = server.local_addr();
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let token = stop.clone();
        tasks.spawn(async move { server.run(token).await.expect("engine runs") });
        TestEngine { addr, stop, tasks }
    }

    pub async fn kill(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }

    pub async fn fault(&self, body: &str) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut socket = tokio::net::TcpStream::connect(self.addr).await.expect("connect");
        let head = format!(
            "POST /fault HTTP/1.1\r\nhost: e\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        socket.write_all(head.as_bytes()).await.expect("write");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.expect("read");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

pub fn params() -> SyntheticParams {
    SyntheticParams { vocab: 1000, eos_id: 7, mean_len: None }
}

// === the manager ===

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

struct Service {
    attaches: mpsc::Sender<(Streaming<pb::FromAgent>, mpsc::Sender<Result<pb::ToAgent, Status>>)>,
    datas:
        mpsc::Sender<(Streaming<pb::DataFromAgent>, mpsc::Sender<Result<pb::DataToAgent, Status>>)>,
}

#[tonic::async_trait]
impl Agent for Service {
    type ControlStream = Out<pb::ToAgent>;
    type DataStream = Out<pb::DataToAgent>;

    async fn control(
        &self,
        request: Request<Streaming<pb::FromAgent>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        let (tx, rx) = mpsc::channel(1024);
        self.attaches.send((request.into_inner(), tx)).await.expect("the test listens");
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn data(
        &self,
        request: Request<Streaming<pb::DataFromAgent>>,
    ) -> Result<Response<Self::DataStream>, Status> {
        let (tx, rx) = mpsc::channel(4096);
        self.datas.send((request.into_inner(), tx)).await.expect("the test listens");
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

pub struct TestManager {
    pub addr: SocketAddr,
    attaches: mpsc::Receiver<(Streaming<pb::FromAgent>, mpsc::Sender<Result<pb::ToAgent, Status>>)>,
    datas: mpsc::Receiver<(
        Streaming<pb::DataFromAgent>,
        mpsc::Sender<Result<pb::DataToAgent, Status>>,
    )>,
    _tasks: JoinSet<()>,
}

/// One attached agent.
pub struct Attached {
    pub hello: pb::Hello,
    control_in: Streaming<pb::FromAgent>,
    control_out: mpsc::Sender<Result<pb::ToAgent, Status>>,
    data_in: Streaming<pb::DataFromAgent>,
    data_out: mpsc::Sender<Result<pb::DataToAgent, Status>>,
    /// Control messages that were passed over while waiting for something else.
    pub said: Vec<from_agent::Kind>,
    pub ack: bool,
}

impl TestManager {
    pub async fn start() -> TestManager {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let addr = listener.local_addr().expect("bound");
        let (attaches_tx, attaches) = mpsc::channel(8);
        let (datas_tx, datas) = mpsc::channel(8);
        let service = Service { attaches: attaches_tx, datas: datas_tx };
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            tonic::transport::Server::builder()
                .add_service(AgentServer::new(service))
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .expect("serves");
        });
        TestManager { addr, attaches, datas, _tasks: tasks }
    }

    pub async fn attach(&mut self, welcome: impl FnOnce(&pb::Hello) -> pb::Welcome) -> Attached {
        let (mut control_in, control_out) = soon(self.attaches.recv()).await.expect("an agent");
        let first = soon(control_in.message()).await.expect("stream").expect("message");
        let Some(from_agent::Kind::Hello(hello)) = first.kind else { panic!("{first:?}") };
        let kind = Some(to_agent::Kind::Welcome(welcome(&hello)));
        control_out.send(Ok(pb::ToAgent { kind })).await.expect("open");
        let (mut data_in, data_out) = soon(self.datas.recv()).await.expect("data");
        let bind = soon(data_in.message()).await.expect("stream").expect("message");
        assert!(matches!(bind.kind, Some(data_from_agent::Kind::Bind(_))), "{bind:?}");
        Attached { hello, control_in, control_out, data_in, data_out, said: Vec::new(), ack: true }
    }

    pub async fn welcome_only(&mut self, welcome: pb::Welcome) {
        self.answer(to_agent::Kind::Welcome(welcome)).await;
    }

    pub async fn refuse(&mut self, refused: pb::Refused) {
        self.answer(to_agent::Kind::Refused(refused)).await;
    }

    async fn answer(&mut self, kind: to_agent::Kind) {
        let (mut control_in, control_out) = soon(self.attaches.recv()).await.expect("an agent");
        soon(control_in.message()).await.expect("stream").expect("message");
        control_out.send(Ok(pb::ToAgent { kind: Some(kind) })).await.expect("open");
    }
}

pub fn welcome(session: u64) -> pb::Welcome {
    pb::Welcome {
        proto: 1,
        session,
        manager_epoch: 1,
        lease_ms: 3000,
        tick_ms: 10,
        job: "test".into(),
        serve_key: vec![9; 32].into(),
        convention: pb::Convention::Tempered.into(),
        ..Default::default()
    }
}

pub async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.expect("within the test's patience")
}

impl Attached {
    pub async fn control(&self, kind: to_agent::Kind) {
        self.control_out.send(Ok(pb::ToAgent { kind: Some(kind) })).await.expect("open");
    }

    pub async fn data(&self, kind: data_to_agent::Kind) {
        self.data_out.send(Ok(pb::DataToAgent { kind: Some(kind) })).await.expect("open");
    }

    pub async fn prompt(&self, ids: &[u32]) -> u64 {
        let ids = tokens::encode_ids(ids);
        let digest = tokens::prompt_digest(&ids);
        self.data(data_to_agent::Kind::Prompt(pb::PromptPart { digest, at: 0, ids, last: true }))
            .await;
        digest
    }

    pub async fn start(&self, sample: SampleId, digest: u64, max_tokens: u32, seed: u64) {
        self.start_with(
            sample,
            digest,
            seed,
            &[],
            pb::Sampling { max_tokens, ..Default::default() },
        )
        .await;
    }

    pub async fn start_with(
        &self,
        sample: SampleId,
        digest: u64,
        seed: u64,
        kept: &[u32],
        sampling: pb::Sampling,
    ) {
        self.data(data_to_agent::Kind::Start(pb::Start {
            sample: Some(sample.into()),
            attempt: 1,
            prompt: digest,
            kept: tokens::encode_ids(kept),
            sampling: Some(sampling),
            offset: kept.len() as u32,
            stop_ids: vec![7],
            seed,
            ..Default::default()
        }))
        .await;
    }

    /// The next control message that `want` accepts; others are kept in `said`. Ticks meanwhile go to `ledger`.
    pub async fn until_said<T>(
        &mut self,
        ledger: &mut Ledger,
        want: impl Fn(&from_agent::Kind) -> Option<T>,
    ) -> T {
        soon(async {
            loop {
                tokio::select! {
                    said = self.control_in.message() => {
                        let kind = said.expect("control").expect("open").kind.expect("kind");
                        self.answer_beat(&kind).await;
                        if let Some(found) = want(&kind) {
                            self.said.push(kind);
                            return found;
                        }
                        self.said.push(kind);
                    }
                    tick = self.data_in.message() => {
                        if let Ok(Some(tick)) = tick {
                            self.take(ledger, tick).await;
                        }
                    }
                }
            }
        })
        .await
    }

    pub async fn until(&mut self, ledger: &mut Ledger, done: impl Fn(&Ledger) -> bool) {
        let waited = timeout(PATIENCE, async {
            while !done(ledger) {
                tokio::select! {
                    said = self.control_in.message() => {
                        let kind = said.expect("control").expect("open").kind.expect("kind");
                        self.answer_beat(&kind).await;
                        self.said.push(kind);
                    }
                    tick = self.data_in.message() => {
                        let tick = tick.expect("data").expect("open");
                        self.take(ledger, tick).await;
                    }
                }
            }
        });
        if waited.await.is_err() {
            panic!("not done: {:?}", ledger.summary());
        }
    }

    /// What is still in the streams after the agent left.
    pub async fn rest(&mut self, ledger: &mut Ledger) {
        while let Ok(Ok(Some(tick))) = timeout(PATIENCE, self.data_in.message()).await {
            self.take(ledger, tick).await;
        }
    }

    async fn answer_beat(&self, kind: &from_agent::Kind) {
        if let from_agent::Kind::Beat(beat) = kind {
            let ack = to_agent::Kind::BeatAck(pb::BeatAck { seq: beat.seq });
            // The agent may be leaving.
            let _ = self.control_out.send(Ok(pb::ToAgent { kind: Some(ack) })).await;
        }
    }

    async fn take(&mut self, ledger: &mut Ledger, message: pb::DataFromAgent) {
        let Some(data_from_agent::Kind::Tick(tick)) = message.kind else { panic!("{message:?}") };
        let seq = tick.seq;
        ledger.take(tick);
        if self.ack {
            // The agent may be leaving.
            let ack = data_to_agent::Kind::Ack(pb::TickAck { seq });
            let _ = self.data_out.send(Ok(pb::DataToAgent { kind: Some(ack) })).await;
        }
    }
}

// === the ledger and the oracle ===

#[derive(Default)]
pub struct Ledger {
    pub samples: BTreeMap<SampleId, Row>,
    pub last_seq: u64,
}

#[derive(Default)]
pub struct Row {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<f32>,
    /// One version number per token.
    pub versions: Vec<u64>,
    pub inexact: usize,
    pub end: Option<pb::End>,
}

impl Ledger {
    fn take(&mut self, tick: pb::Tick) {
        assert_eq!(tick.seq, self.last_seq + 1, "ticks come in order, each once");
        self.last_seq = tick.seq;
        let mut ids = tokens::ids(&tick.tokens);
        let mut logprobs = tokens::logprobs(&tick.logprobs);
        for seg in &tick.segs {
            let row = self.samples.entry(SampleId::new(seg.group, seg.index)).or_default();
            assert!(row.end.is_none(), "tokens after the end");
            assert_eq!(seg.offset as usize, row.tokens.len(), "offsets follow on");
            let version = &tick.versions[seg.version_ix as usize];
            for _ in 0..seg.count {
                row.tokens.push(ids.next().expect("as many as counted"));
                row.logprobs.push(logprobs.next().expect("as many as counted"));
                row.versions.push(version.number);
            }
            row.inexact += if seg.inexact { seg.count as usize } else { 0 };
        }
        assert_eq!((ids.len(), logprobs.len()), (0, 0), "no token belongs to nobody");
        for end in tick.ends {
            let row = self.samples.entry(end.sample.expect("sample").into()).or_default();
            assert_eq!(
                end.at as usize,
                row.tokens.len(),
                "the end agrees with the tokens: {end:?}"
            );
            assert!(row.end.replace(end).is_none(), "one end");
        }
    }

    pub fn ended(&self) -> usize {
        self.samples.values().filter(|row| row.end.is_some()).count()
    }

    pub fn why(&self, sample: SampleId) -> pb::end::Why {
        self.samples[&sample].end.as_ref().expect("ended").why()
    }

    pub fn tokens(&self) -> usize {
        self.samples.values().map(|row| row.tokens.len()).sum()
    }

    pub fn summary(&self) -> Vec<(SampleId, usize, Option<i32>)> {
        let row =
            |(id, row): (&SampleId, &Row)| (*id, row.tokens.len(), row.end.as_ref().map(|e| e.why));
        self.samples.iter().map(row).collect()
    }
}

/// Recomputes a row; `digests` by version number. Returns how many tokens do not count as exact.
pub fn verify(row: &Row, prompt: &[u32], seed: u64, digests: &BTreeMap<u64, [u8; 32]>) {
    let mut chain = Chain::new(seed).extend(prompt);
    for (at, token) in row.tokens.iter().enumerate() {
        let key = WeightsKey::new(&digests[&row.versions[at]]);
        let made = next(chain, key, params(), false);
        assert_eq!(
            (made.token, made.logprob),
            (*token, row.logprobs[at]),
            "token {at} of {} under v{}",
            row.tokens.len(),
            row.versions[at]
        );
        chain = chain.push(*token);
    }
}

pub fn base() -> BTreeMap<u64, [u8; 32]> {
    BTreeMap::from([(0, base_digest())])
}

/// A checkpoint of two small tensors whose content depends on `fill`.
pub fn checkpoint(dir: &Path, fill: u8, rows: usize) -> [u8; 32] {
    let data = vec![fill; rows * 8 * 4];
    let shape = vec![rows, 8];
    let view = |data: &'static [u8]| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data)
            .expect("view")
    };
    let data: &'static [u8] = data.leak();
    std::fs::create_dir_all(dir).expect("dir");
    let tensors = [("a.weight", view(data)), ("b.weight", view(data))];
    safetensors::serialize_to_file(tensors, None, &dir.join("model.safetensors")).expect("written");
    anabranch_engine::content_digest(dir).expect("digest")
}

// === the agent ===

pub struct TestAgent {
    pub stop: CancellationToken,
    pub task: JoinHandle<Result<(), AgentError>>,
    _staging: tempfile::TempDir,
}

impl TestAgent {
    #[allow(clippy::disallowed_methods)]
    pub fn start(
        manager: SocketAddr,
        engine: SocketAddr,
        tune: impl FnOnce(&mut AgentConfig),
    ) -> TestAgent {
        let spec = EngineSpec::parse(&format!("sglang=http://{engine}")).expect("url");
        let mut config = AgentConfig::new(format!("http://{manager}"), spec);
        let staging = tempfile::tempdir().expect("dir");
        config.staging = staging.path().to_owned();
        config.id = Some("e1".into());
        tune(&mut config);
        let stop = CancellationToken::new();
        let task = tokio::spawn(anabranch_agent::run(config, stop.clone()));
        TestAgent { stop, task, _staging: staging }
    }

    pub async fn ended(self) -> Result<(), AgentError> {
        soon(self.task).await.expect("no panic")
    }
}

pub fn logs() {
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
}
