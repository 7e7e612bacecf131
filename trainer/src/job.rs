//! The job as a trainer uses it: each method is a call or a stream of the job's session.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{BatchSeq, Pack, Shard, Step, Version};
use anabranch_transfer::layout::TensorSpec;
use anabranch_transfer::{PieceRef, TensorRef};

use crate::client::Client;
use crate::config::JobConfig;
use crate::consume::{Consumer, Window};
use crate::control::{self, Cancelled, Mode, PerEngine, Which};
use crate::error::Error;
use crate::publish::{Part, Publications, Published};
use crate::session::Session;
use crate::submit::Submit;
use crate::versions::VersionWatch;

/// An open job. Cheap to clone; all clones are the same session. When the last clone is dropped, this
/// process serves its weights no more.
#[derive(Clone)]
pub struct Job {
    session: Session,
    publications: Arc<Publications>,
}

// === impl Client ===

impl Client {
    /// Starts the job, takes it up again, or joins it if another process opened it.
    pub async fn open(&self, config: JobConfig) -> Result<Job, Error> {
        config.check()?;
        let session = Session::open(self.clone(), config).await?;
        Ok(Job { session, publications: Arc::default() })
    }
}

// === impl Job ===

impl Job {
    /// Settings that the job was opened with.
    pub fn config(&self) -> &JobConfig {
        self.session.config()
    }

    /// Version that was current when the session was opened.
    pub async fn version_at_open(&self) -> Version {
        self.session.opened().await.current
    }

    /// Highest committed batch when the session was opened, or 0. Batches up to there are forgotten.
    pub async fn committed_at_open(&self) -> BatchSeq {
        self.session.opened().await.committed
    }

    /// True if the job existed before this session.
    pub async fn resumed(&self) -> bool {
        self.session.opened().await.resumed
    }

    /// Begins a submit of groups for `step`, which [`Submit::send`] sends.
    pub fn submit(&self, step: impl Into<Step>) -> Submit<'_> {
        Submit::new(&self.session, step.into())
    }

    /// Attaches to the stream of trajectories with the default [`Window`]. May be called outside a runtime.
    pub fn consume(&self, pack: Pack, shard: Shard) -> Result<Consumer, Error> {
        self.consume_within(pack, shard, Window::default())
    }

    /// Attaches like [`Job::consume`], with other bounds on what waits here.
    pub fn consume_within(
        &self,
        pack: Pack,
        shard: Shard,
        window: Window,
    ) -> Result<Consumer, Error> {
        Consumer::start(&self.session, pack, shard, window)
    }

    /// Gives submitted work up. With `keep_partial`, samples are delivered as cancelled with the tokens
    /// that they have; else they are not delivered.
    pub async fn cancel(&self, which: Which, keep_partial: bool) -> Result<Cancelled, Error> {
        control::cancel(&self.session, which, keep_partial).await
    }

    /// Hands the GPUs of colocated engines over. Returns when every such engine did its part, or after
    /// `deadline`. Samples that ran there continue elsewhere.
    pub async fn set_mode(&self, mode: Mode, deadline: Duration) -> Result<Vec<PerEngine>, Error> {
        control::set_mode(&self.session, mode, deadline).await
    }

    /// Attests that this trainer itself loaded `version` into `engine`.
    pub async fn report_engine(&self, engine: &str, version: Version) -> Result<(), Error> {
        control::report_engine(&self.session, engine, version).await
    }

    /// Watches the roll-out of all versions: first how things stand, then every change.
    pub fn watch_versions(&self) -> VersionWatch {
        VersionWatch::new(self.session.clone())
    }

    /// Publishes `tensors` as version `number`, which grows within the epoch, from 1. Returns when the
    /// snapshot was taken: the tensors may change again, and engines fetch the snapshot from here.
    ///
    /// An on-policy loop then awaits [`Published::sealed`] before it submits the next step.
    ///
    /// The copy blocks the calling thread. A multi-threaded runtime runs its other tasks meanwhile; must
    /// not be called from a `LocalSet` there.
    pub async fn publish(
        &self,
        number: u64,
        tensors: &[TensorRef<'_>],
    ) -> Result<Published, Error> {
        self.publications.publish(&self.session, number, tensors).await
    }

    /// Publishes a safetensors directory (sharded or not) as version `number`.
    pub async fn publish_directory(&self, number: u64, path: &Path) -> Result<Published, Error> {
        let path = path.to_owned();
        self.publications.publish_directory(&self.session, number, path).await
    }

    /// Makes a safetensors directory itself version `number`: engines that can read it under the same path
    /// verify it and load it, and nothing is copied. For engines on this host or on a shared file system.
    /// The directory must not change until every engine has a newer version. This process may end after
    /// [`Published::sealed`].
    pub async fn publish_in_place(&self, number: u64, path: &Path) -> Result<Published, Error> {
        self.publications.publish_in_place(&self.session, number, path).await
    }

    /// Publishes the pieces of version `number` that this process has, as one of the senders that the job
    /// was opened with ([`crate::WeightServer::sender`]). `layout` names all tensors, the same at every
    /// sender in the same order. [`Part`] tells how it goes on. Blocks as [`Job::publish`] does.
    pub async fn publish_part(
        &self,
        number: u64,
        layout: &[TensorSpec],
        pieces: &[PieceRef<'_>],
    ) -> Result<Part, Error> {
        Part::sender(&self.session, number)?;
        let publishing =
            self.publications.publish_part(&self.session, number, layout, pieces).await?;
        Part::new(&self.session, &self.publications, publishing).await
    }

    /// Publishes this sender's share of a safetensors directory that all senders see: whole tensors, in
    /// about equal bytes.
    pub async fn publish_directory_part(&self, number: u64, path: &Path) -> Result<Part, Error> {
        let share = (path.to_owned(), Part::sender(&self.session, number)?);
        let publishing =
            self.publications.publish_directory_part(&self.session, number, share).await?;
        Part::new(&self.session, &self.publications, publishing).await
    }

    /// Ends this trainer's session. With `cancel_running`, unfinished work is given up as well.
    pub async fn close(self, cancel_running: bool) -> Result<(), Error> {
        self.session.closed().cancel();
        let closed = control::close(&self.session, cancel_running).await;
        self.publications.close().await;
        closed
    }
}
