//! A manager that says what the test tells it to, and remembers what it heard.

use std::pin::Pin;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anabranch_proto::pb::trainer_server::{Trainer, TrainerServer};
use anabranch_proto::{pb, tokens};
use futures_util::Stream;
use pb::from_consumer::Kind as In;
use pb::publish_event::Kind as Event;
use pb::publish_part::Kind as Part;
use pb::to_consumer::Kind as Out;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

#[derive(Clone, Debug)]
pub enum Say {
    Tell(Box<pb::ToConsumer>),
    /// Breaks the attachment; what follows goes to the next one.
    Cut,
}

/// Credit in samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    Attach,
    Credit(u64),
    Ack(u64),
    Commit(u64),
    /// Addresses and bytes.
    Begin(usize, u64),
    /// Bytes of the root.
    Seal(usize),
}

#[derive(Clone)]
pub struct Fake {
    shared: Arc<Shared>,
    port: u16,
}

struct Shared {
    script: mpsc::Sender<Say>,
    says: tokio::sync::Mutex<mpsc::Receiver<Say>>,
    heard: Mutex<Vec<Heard>>,
    news: Notify,
    submits: Mutex<Vec<(usize, bool)>>,
    full: AtomicU32,
    session: AtomicU64,
    epoch: AtomicU64,
    /// Publish streams so far; the first is cut at its seal.
    cut_publish: AtomicU32,
    /// Watches so far.
    watches: AtomicU32,
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Say {
    pub fn part(seq: u64, part: u32, last: bool) -> Say {
        Say::of(pb::Part { last_part: last, part, ..base(seq) })
    }

    pub fn last_part(seq: u64) -> Say {
        Say::of(pb::Part { last_part: true, last_of_step: true, ..base(seq) })
    }

    pub fn bad_part(seq: u64) -> Say {
        let mut part = pb::Part { last_part: true, ..base(seq) };
        part.trajectories[0].spans.clear();
        Say::of(part)
    }

    pub fn done(seq: u64) -> Say {
        let done = pb::StepDone { step: 7, seq, ..Default::default() };
        Say::Tell(Box::new(pb::ToConsumer { kind: Some(Out::StepDone(done)) }))
    }

    fn of(part: pb::Part) -> Say {
        Say::Tell(Box::new(pb::ToConsumer { kind: Some(Out::Part(part)) }))
    }
}

fn base(seq: u64) -> pb::Part {
    let engine = pb::Engine { id: "e".into(), incarnation: 1, member: 0, members: 1 };
    let span = pb::Span { len: 2, engine: Some(engine), ..Default::default() };
    let trajectory = pb::Trajectory {
        key: format!("{seq}"),
        tokens: tokens::encode_ids(&[5, 6]),
        logprobs: tokens::encode_logprobs(&[-1.0, -2.0]),
        spans: vec![span],
        finish: pb::trajectory::Finish::Stop as i32,
        attempts: 1,
        ..Default::default()
    };
    pb::Part {
        seq,
        step: 7,
        trajectories: vec![trajectory],
        batch_samples: 1,
        ..Default::default()
    }
}

impl Fake {
    pub async fn start() -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let (script, says) = mpsc::channel(64);
        let shared = Arc::new(Shared {
            script,
            says: tokio::sync::Mutex::new(says),
            heard: Mutex::default(),
            news: Notify::new(),
            submits: Mutex::default(),
            full: AtomicU32::new(0),
            session: AtomicU64::new(1),
            epoch: AtomicU64::new(1),
            cut_publish: AtomicU32::new(0),
            watches: AtomicU32::new(0),
        });
        let fake = Fake { shared, port };
        let service = TrainerServer::new(fake.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        #[allow(clippy::disallowed_methods)] // ends with the test's runtime
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        fake
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub async fn say(&self, say: Say) {
        self.shared.script.send(say).await.expect("the script is open");
    }

    pub fn full_times(&self, times: u32) {
        self.shared.full.store(times, Ordering::SeqCst);
    }

    pub fn forget_session(&self, epoch: u64) {
        self.shared.session.fetch_add(1, Ordering::SeqCst);
        self.shared.epoch.store(epoch, Ordering::SeqCst);
    }

    pub fn submits(&self) -> Vec<(usize, bool)> {
        self.shared.submits.lock().expect("no panic").clone()
    }

    pub fn count(&self, what: impl Fn(&Heard) -> bool) -> usize {
        self.shared.heard.lock().expect("no panic").iter().filter(|heard| what(heard)).count()
    }

    pub async fn until(&self, what: impl Fn(&Heard) -> bool) {
        self.until_count(1, what).await;
    }

    pub async fn until_count(&self, times: usize, what: impl Fn(&Heard) -> bool) {
        let wait = async {
            loop {
                let news = self.shared.news.notified();
                if self.count(&what) >= times {
                    return;
                }
                news.await;
            }
        };
        let heard = || self.shared.heard.lock().expect("no panic").clone();
        let limit = std::time::Duration::from_secs(20);
        tokio::time::timeout(limit, wait).await.unwrap_or_else(|_| panic!("heard {:?}", heard()));
    }

    fn hear(&self, heard: Heard) {
        self.shared.heard.lock().expect("no panic").push(heard);
        self.shared.news.notify_waiters();
    }

    fn check(&self, session: u64) -> Result<(), Status> {
        if session == self.shared.session.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(Status::not_found("no such session"))
    }

    async fn listen(self, mut from: Streaming<pb::FromConsumer>) {
        while let Some(Ok(message)) = from.next().await {
            self.hear(match message.kind.expect("a kind") {
                In::Attach(_) => panic!("attached twice on one stream"),
                In::Credit(credit) => Heard::Credit(credit.samples),
                In::Ack(ack) => Heard::Ack(ack.seq),
                In::Commit(commit) => Heard::Commit(commit.seq),
            });
        }
    }
}

#[tonic::async_trait]
impl Trainer for Fake {
    type ConsumeStream = ReceiverStream<Result<pb::ToConsumer, Status>>;
    type PublishStream = Streamed<pb::PublishEvent>;
    type WatchVersionsStream = Streamed<pb::VersionStatus>;

    async fn open(&self, _: Request<pb::OpenRequest>) -> Result<Response<pb::Opened>, Status> {
        let session = self.shared.session.load(Ordering::SeqCst);
        let manager_epoch = self.shared.epoch.load(Ordering::SeqCst);
        Ok(Response::new(pb::Opened { session, manager_epoch, ..Default::default() }))
    }

    async fn submit(
        &self,
        request: Request<pb::SubmitRequest>,
    ) -> Result<Response<pb::Submitted>, Status> {
        use pb::submitted::result::Kind;
        let request = request.into_inner();
        self.check(request.session)?;
        self.shared.submits.lock().expect("no panic").push((request.groups.len(), request.r#final));
        let full = self
            .shared
            .full
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
            .is_ok();
        let result = |group: pb::Group| {
            let (kind, why, retry_after_ms) = match group.key.as_str() {
                _ if full => (Kind::Rejected, "full", 100),
                "bad" => (Kind::Rejected, "never", 0),
                "old" => (Kind::Duplicate, "", 0),
                _ => (Kind::Accepted, "", 0),
            };
            let (kind, why) = (kind.into(), why.to_owned());
            pb::submitted::Result { key: group.key, kind, why, retry_after_ms }
        };
        let results = request.groups.into_iter().map(result).collect();
        Ok(Response::new(pb::Submitted { results }))
    }

    async fn consume(
        &self,
        request: Request<Streaming<pb::FromConsumer>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        let (out, stream) = mpsc::channel(1);
        let (fake, mut from) = (self.clone(), request.into_inner());
        match from.message().await?.and_then(|first| first.kind) {
            Some(In::Attach(attach)) => self.check(attach.session)?,
            other => panic!("the first message is Attach, not {other:?}"),
        }
        self.hear(Heard::Attach);
        #[allow(clippy::disallowed_methods)] // ends with the stream
        tokio::spawn(fake.listen(from));
        let shared = self.shared.clone();
        #[allow(clippy::disallowed_methods)] // ends at a cut
        tokio::spawn(async move {
            let mut says = shared.says.lock().await;
            while let Some(Say::Tell(message)) = says.recv().await {
                if out.send(Ok(*message)).await.is_err() {
                    return;
                }
            }
            let _ = out.send(Err(Status::unavailable("cut"))).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn cancel(
        &self,
        _: Request<pb::CancelRequest>,
    ) -> Result<Response<pb::Cancelled>, Status> {
        Ok(Response::new(pb::Cancelled::default()))
    }

    async fn set_mode(
        &self,
        _: Request<pb::SetModeRequest>,
    ) -> Result<Response<pb::ModeSet>, Status> {
        Ok(Response::new(pb::ModeSet::default()))
    }

    async fn report_engine(
        &self,
        _: Request<pb::EngineReport>,
    ) -> Result<Response<pb::EngineReported>, Status> {
        Ok(Response::new(pb::EngineReported {}))
    }

    async fn publish(
        &self,
        request: Request<Streaming<pb::PublishPart>>,
    ) -> Result<Response<Self::PublishStream>, Status> {
        let cut = self.shared.cut_publish.fetch_add(1, Ordering::SeqCst) == 0;
        let fake = self.clone();
        let mut version = pb::Version::default();
        let events = request.into_inner().map(move |part| {
            let kind = match part?.kind.expect("a kind") {
                Part::Begin(begin) => {
                    fake.hear(Heard::Begin(begin.addresses.len(), begin.bytes));
                    version = begin.version.expect("a version");
                    if version.number == 13 {
                        return Err(Status::failed_precondition("13 is not published here"));
                    }
                    Event::Accepted(pb::publish_event::Accepted {})
                }
                Part::Seal(seal) => {
                    fake.hear(Heard::Seal(seal.root.len()));
                    if cut {
                        return Err(Status::unavailable("cut"));
                    }
                    version.root = seal.root;
                    let (version, state) = (Some(version.clone()), "current".to_owned());
                    let settled = true;
                    Event::Status(pb::VersionStatus {
                        version,
                        state,
                        settled,
                        ..Default::default()
                    })
                }
            };
            Ok(pb::PublishEvent { kind: Some(kind) })
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn watch_versions(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchVersionsStream>, Status> {
        self.check(request.into_inner().session)?;
        // The first stream ends after one status; the second has settled.
        let settled = self.shared.watches.fetch_add(1, Ordering::SeqCst) > 0;
        let state = "current".to_owned();
        let status = pb::VersionStatus { state, settled, ..Default::default() };
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(status)))))
    }

    async fn close(&self, _: Request<pb::CloseRequest>) -> Result<Response<pb::Closed>, Status> {
        Ok(Response::new(pb::Closed {}))
    }
}
