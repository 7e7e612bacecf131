//! Following the roll-out of versions. The stream attaches again by itself after a lost link.

use std::time::Duration;

use anabranch_proto::{Version, pb};
use tonic::Streaming;

use crate::client::Tries;
use crate::error::{Error, Failure};
use crate::job::Job;
use crate::trajectory::version;

/// How long a lost manager is looked for.
const LOST_AFTER: Duration = Duration::from_secs(300);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionStatus {
    pub version: Version,
    pub state: VersionState,
    pub bytes: u64,
    pub engines: Vec<OnEngine>,
    /// Every live engine that should have it is active.
    pub settled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VersionState {
    Announced,
    /// Sealed: engines may load it.
    Available,
    Current,
    /// A newer one is current.
    Superseded,
    /// No longer kept anywhere.
    Retired,
    /// A state of a newer manager.
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnEngine {
    pub engine: String,
    pub stage: String,
    pub bytes: u64,
    /// Since the version was sealed.
    pub since: Duration,
    /// Empty where all is well.
    pub error: String,
}

/// Made by [`Job::watch_versions`].
pub struct VersionWatch {
    job: Job,
    stream: Option<Streaming<pb::VersionStatus>>,
    tries: Tries,
    /// The session that the newest stream named.
    session: u64,
}

// === impl VersionWatch ===

impl VersionWatch {
    pub(crate) fn new(job: Job) -> Self {
        let tries = Tries::new("watch versions", LOST_AFTER);
        Self { job, stream: None, tries, session: 0 }
    }

    /// The next change. After a lost link things are told as they stand, so some may come twice.
    pub async fn next(&mut self) -> Result<VersionStatus, Error> {
        loop {
            let failure = match self.step().await {
                Ok(Some(status)) => {
                    self.tries.reset();
                    return VersionStatus::try_from(status)
                        .map_err(|what| Error::Protocol { call: "watch versions", what });
                }
                Ok(None) => Failure::Transport("the manager ended the stream".into()),
                Err(status) => Failure::of("watch versions", &status),
            };
            self.stream = None;
            if self.job.closed().is_cancelled() {
                return Err(Error::Closed);
            }
            self.after(failure).await?;
        }
    }

    async fn step(&mut self) -> Result<Option<pb::VersionStatus>, tonic::Status> {
        if self.stream.is_none() {
            let session = self.job.session().await.id;
            self.session = session;
            let mut rpc = self.job.client().rpc();
            let stream = rpc.watch_versions(pb::WatchRequest { session }).await?;
            self.stream = Some(stream.into_inner());
        }
        self.stream.as_mut().expect("it was just set").message().await
    }

    async fn after(&mut self, failure: Failure) -> Result<(), Error> {
        let detail = match failure {
            Failure::Final(error) => return Err(error),
            Failure::NotFound(_) => {
                self.job.renew(self.session, self.tries.left()).await?;
                "the session was opened again".to_owned()
            }
            Failure::Transport(detail) => detail,
        };
        self.tries.pause(&detail).await?;
        self.job.client().after_loss().await;
        Ok(())
    }
}

// === conversions ===

impl TryFrom<pb::VersionStatus> for VersionStatus {
    type Error = String;

    fn try_from(status: pb::VersionStatus) -> Result<Self, String> {
        Ok(Self {
            version: version(status.version)?,
            state: VersionState::from_word(&status.state),
            bytes: status.bytes,
            engines: status.engines.into_iter().map(OnEngine::from).collect(),
            settled: status.settled,
        })
    }
}

impl VersionState {
    fn from_word(word: &str) -> Self {
        match word {
            "announced" => Self::Announced,
            "available" => Self::Available,
            "current" => Self::Current,
            "superseded" => Self::Superseded,
            "retired" => Self::Retired,
            _ => Self::Other,
        }
    }
}

impl From<pb::version_status::OnEngine> for OnEngine {
    fn from(on: pb::version_status::OnEngine) -> Self {
        let since = Duration::from_millis(on.since_ms);
        Self { engine: on.engine, stage: on.stage, bytes: on.bytes, since, error: on.error }
    }
}
