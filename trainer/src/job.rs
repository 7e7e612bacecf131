//! An open job: its session, and the calls that name it. A session that the manager forgot is opened
//! again; a manager that lost the job's state is an error, never silently a new job.

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anabranch_proto::{Version, pb};
use anabranch_transfer::layout::TensorSpec;
use anabranch_transfer::{PieceRef, Publisher};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::client::{Client, Rpc, Tries};
use crate::config::{JobConfig, millis};
use crate::consume::{Consumer, Pack, Shard, Window};
use crate::error::{Error, Failure};
use crate::group::{Group, SubmitResult};
use crate::part::{NamedPiece, Part};
use crate::publish::{NamedTensor, Publications, Published, Weights};
use crate::submit::Pending;
use crate::trajectory::version;
use crate::versions::VersionWatch;

/// How long calls without a deadline of their own look for the manager.
const CALL_WITHIN: Duration = Duration::from_secs(60);

/// Cheap to clone; all clones are the same job and session.
#[derive(Clone)]
pub struct Job {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    client: Client,
    config: JobConfig,
    session: Mutex<Session>,
    closed: CancellationToken,
    publications: Publications,
}

/// What the manager answered to the last open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Session {
    pub id: u64,
    pub manager_epoch: u64,
    pub floor_cursor: u64,
    pub current: Version,
    pub serve_key: [u8; 32],
    pub resumed: bool,
}

/// Who uses the GPUs of colocated engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Train,
    Generate,
}

/// What became of one engine in a mode switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PerEngine {
    pub engine: String,
    pub drained: bool,
    pub memory_released: bool,
    /// Continued on other engines.
    pub moved_samples: u32,
    /// Empty where all is well.
    pub error: String,
}

/// Which submitted work to give up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    Keys(Vec<String>),
    Step(u64),
    All,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cancelled {
    pub groups: u32,
    pub samples: u32,
}

// === impl Job ===

impl Job {
    pub(crate) async fn open(client: Client, config: JobConfig) -> Result<Self, Error> {
        let session = open(&client, config.request(), CALL_WITHIN).await?;
        let inner = Inner {
            client,
            config,
            session: Mutex::new(session),
            closed: CancellationToken::new(),
            publications: Publications::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// As it was opened.
    pub fn config(&self) -> &JobConfig {
        &self.inner.config
    }

    /// The version that was current when the session was opened.
    pub async fn opened_at(&self) -> Version {
        self.session().await.current
    }

    /// Batches up to here were committed and forgotten, by what the manager said at opening.
    pub async fn floor_cursor(&self) -> u64 {
        self.session().await.floor_cursor
    }

    /// Whether the job existed before this session.
    pub async fn resumed(&self) -> bool {
        self.session().await.resumed
    }

    /// Submits whole groups for `step`; `last` says that no more will come for it. Groups that do
    /// not fit now, and lost links, are tried again for as long as `within`. The step is closed only
    /// when every group is settled: where one is [`crate::Outcome::Full`], submit it again with `last`.
    pub async fn submit(
        &self,
        step: u64,
        groups: Vec<Group>,
        last: bool,
        within: Duration,
    ) -> Result<Vec<SubmitResult>, Error> {
        let mut pending = Pending::new(groups)?;
        let tries = Tries::new("submit", within);
        while !pending.is_settled() {
            let sent = pending.next_request();
            let reply = self.send_groups(step, sent.clone(), false, tries.left()).await?;
            let pause = pending
                .answered(&sent, reply)
                .map_err(|what| Error::Protocol { call: "submit", what })?;
            if !pause.is_zero() && pause >= tries.left() {
                return Ok(pending.finish());
            }
            tokio::time::sleep(pause).await;
        }
        if last {
            self.send_groups(step, Vec::new(), true, tries.left().max(CALL_WITHIN)).await?;
        }
        Ok(pending.finish())
    }

    async fn send_groups(
        &self,
        step: u64,
        groups: Vec<pb::Group>,
        last: bool,
        within: Duration,
    ) -> Result<pb::Submitted, Error> {
        self.call("submit", within, |mut rpc, session| {
            let groups = groups.clone();
            async move { rpc.submit(pb::SubmitRequest { session, step, r#final: last, groups }).await }
        })
        .await
    }

    /// Attaches to the stream of trajectories with the default window (64 MiB, 4096 samples).
    pub fn consume(&self, pack: Pack, shard: Shard) -> Result<Consumer, Error> {
        self.consume_within(pack, shard, Window::default())
    }

    /// Like [`Job::consume`], with bounds of one's own on what may wait here.
    pub fn consume_within(
        &self,
        pack: Pack,
        shard: Shard,
        window: Window,
    ) -> Result<Consumer, Error> {
        Consumer::start(self.clone(), pack, shard, window)
    }

    /// Gives up submitted work; with `keep_partial` what was made is delivered as cancelled.
    pub async fn cancel(&self, which: Which, keep_partial: bool) -> Result<Cancelled, Error> {
        let request = |session| {
            let mut request = pb::CancelRequest { session, keep_partial, ..Default::default() };
            match which.clone() {
                Which::Keys(keys) => request.keys = keys,
                Which::Step(step) => request.step = Some(step),
                Which::All => request.all = true,
            }
            request
        };
        let done = self
            .call("cancel", CALL_WITHIN, |mut rpc, session| {
                let request = request(session);
                async move { rpc.cancel(request).await }
            })
            .await?;
        Ok(Cancelled { groups: done.groups, samples: done.samples })
    }

    /// A barrier: answers when every colocated engine did its part, or `deadline` passed. Samples
    /// that ran there continue elsewhere.
    pub async fn set_mode(&self, mode: Mode, deadline: Duration) -> Result<Vec<PerEngine>, Error> {
        let mode = match mode {
            Mode::Train => pb::set_mode_request::Mode::Train,
            Mode::Generate => pb::set_mode_request::Mode::Generate,
        } as i32;
        let deadline_ms = millis(deadline);
        let set = self
            .call("set the mode", deadline + CALL_WITHIN, |mut rpc, session| async move {
                rpc.set_mode(pb::SetModeRequest { session, mode, deadline_ms }).await
            })
            .await?;
        Ok(set.engines.into_iter().map(PerEngine::from).collect())
    }

    /// Attests that this trainer itself loaded `version` into `engine`.
    pub async fn report_engine(&self, engine: &str, version: Version) -> Result<(), Error> {
        self.call("report an engine", CALL_WITHIN, |mut rpc, session| {
            let version = Some(version.into());
            let report = pb::EngineReport { session, engine: engine.to_owned(), version };
            async move { rpc.report_engine(report).await }
        })
        .await
        .map(|_| ())
    }

    /// Every change of a version's roll-out, beginning with how things stand.
    pub fn watch_versions(&self) -> VersionWatch {
        VersionWatch::new(self.clone())
    }

    /// Publishes `tensors` as version `number`, which grows within the epoch. Returns when the snapshot
    /// was taken; engines fetch it from here meanwhile. See [`Published::settled`].
    pub async fn publish(
        &self,
        number: u64,
        tensors: Vec<NamedTensor>,
    ) -> Result<Published, Error> {
        self.inner.publications.publish(self, number, Weights::Tensors(tensors)).await
    }

    /// Publishes a safetensors directory (sharded or not) as version `number`.
    pub async fn publish_directory(&self, number: u64, path: &Path) -> Result<Published, Error> {
        self.inner.publications.publish(self, number, Weights::Directory(path.to_owned())).await
    }

    /// Makes a safetensors directory itself version `number`: engines that can read it under the same path
    /// verify it and load it, and nothing is copied. For engines on this host or on a shared file system.
    /// It must not change until a newer version is active. After [`Published::announced`] this process may
    /// end.
    pub async fn publish_in_place(&self, number: u64, path: &Path) -> Result<Published, Error> {
        self.inner.publications.publish_in_place(self, number, path).await
    }

    /// Publishes what this process has of version `number`: one of the senders that the job was opened with
    /// ([`crate::WeightServer::sender`]). `layout` are all tensors, the same at every sender in the same
    /// order. See [`Part`] for how it goes on.
    pub async fn publish_part(
        &self,
        number: u64,
        layout: Vec<TensorSpec>,
        pieces: Vec<NamedPiece>,
    ) -> Result<Part, Error> {
        let write = move |publisher: &Publisher| {
            let pieces: Vec<PieceRef<'_>> = pieces.iter().map(NamedPiece::borrow).collect();
            publisher.publish_part(number, &layout, &pieces)
        };
        Part::new(self, number, self.inner.publications.publish_part(self, number, write)).await
    }

    /// Publishes this sender's share of a safetensors directory that all senders see: whole tensors, in
    /// about equal bytes.
    pub async fn publish_directory_part(&self, number: u64, path: &Path) -> Result<Part, Error> {
        let sender = Part::sender(self, number)?;
        let path = path.to_owned();
        let write =
            move |publisher: &Publisher| publisher.publish_directory_part(number, &path, sender);
        Part::new(self, number, self.inner.publications.publish_part(self, number, write)).await
    }

    /// Ends this trainer's session; `cancel_running` also gives up what is still open.
    pub async fn close(self, cancel_running: bool) -> Result<(), Error> {
        self.inner.closed.cancel();
        let closed = self
            .call("close", CALL_WITHIN, |mut rpc, session| async move {
                rpc.close(pb::CloseRequest { session, cancel_running }).await
            })
            .await
            .map(|_| ());
        self.inner.publications.close().await;
        closed
    }
}

/// For the other rooms of this crate.
impl Job {
    pub(crate) async fn session(&self) -> Session {
        *self.inner.session.lock().await
    }

    pub(crate) fn downgrade(&self) -> Weak<Inner> {
        Arc::downgrade(&self.inner)
    }

    pub(crate) fn upgrade(weak: &Weak<Inner>) -> Option<Self> {
        weak.upgrade().map(|inner| Self { inner })
    }

    pub(crate) fn publications(&self) -> &Publications {
        &self.inner.publications
    }

    pub(crate) fn client(&self) -> &Client {
        &self.inner.client
    }

    pub(crate) fn closed(&self) -> &CancellationToken {
        &self.inner.closed
    }

    /// Makes an idempotent call, on a fresh session where the manager forgot ours.
    pub(crate) async fn call<T, F, Fut>(
        &self,
        call: &'static str,
        within: Duration,
        mut once: F,
    ) -> Result<T, Error>
    where
        F: FnMut(Rpc, u64) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let tries = Tries::new(call, within);
        let mut renewed = false;
        loop {
            let id = self.session().await.id;
            match self.inner.client.call(call, tries.left(), |rpc| once(rpc, id)).await {
                Ok(reply) => return Ok(reply),
                Err(Failure::NotFound(_)) if !renewed => self.renew(id, tries.left()).await?,
                Err(failure) => return Err(failure.into_error(call, within)),
            }
            renewed = true;
        }
    }

    /// Opens the job again, unless another call did since `lost`.
    pub(crate) async fn renew(&self, lost: u64, within: Duration) -> Result<(), Error> {
        let mut session = self.inner.session.lock().await;
        if session.id != lost {
            return Ok(());
        }
        // A rewind belongs to the first opening; now the job is only joined.
        let request = pb::OpenRequest { resume: false, ..self.inner.config.request() };
        let renewed = open(&self.inner.client, request, within).await?;
        let (was, is) = (session.manager_epoch, renewed.manager_epoch);
        if was != is {
            return Err(Error::StateLost { was, is });
        }
        tracing::info!(job = self.inner.config.job, "the session was opened again");
        *session = renewed;
        Ok(())
    }
}

async fn open(
    client: &Client,
    request: pb::OpenRequest,
    within: Duration,
) -> Result<Session, Error> {
    let reply = client
        .call("open", within, |mut rpc| {
            let request = request.clone();
            async move { rpc.open(request).await }
        })
        .await;
    let opened = reply.map_err(|failure| failure.into_error("open", within))?;
    Session::new(opened).map_err(|what| Error::Protocol { call: "open", what })
}

// === impl Session ===

impl Session {
    fn new(opened: pb::Opened) -> Result<Self, String> {
        let serve_key = match opened.serve_key.len() {
            0 => [0; 32],
            32 => opened.serve_key.as_ref().try_into().expect("length was checked"),
            len => return Err(format!("a serve key of {len} bytes, 32 expected")),
        };
        Ok(Self {
            id: opened.session,
            manager_epoch: opened.manager_epoch,
            floor_cursor: opened.floor_cursor,
            current: version(opened.current)?,
            serve_key,
            resumed: opened.resumed,
        })
    }
}

impl From<pb::mode_set::PerEngine> for PerEngine {
    fn from(engine: pb::mode_set::PerEngine) -> Self {
        Self {
            engine: engine.engine,
            drained: engine.drained,
            memory_released: engine.memory_released,
            moved_samples: engine.moved_samples,
            error: engine.error,
        }
    }
}
