//! Roll-out of versions: what the manager tells about each version, and a watch over all of them.

use std::time::Duration;

use anabranch_proto::{Invalid, LoadStage, Version, VersionState, pb};
use tonic::Streaming;

use crate::error::{Error, Failure};
use crate::session::Session;
use crate::stream::{Attach, Link};
use crate::trajectory::version;

/// Name of the call in errors and logs.
const CALL: &str = "watch versions";
/// How long a lost manager is looked for.
const LOST_AFTER: Duration = Duration::from_secs(300);

/// Roll-out of one version, as the manager sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionStatus {
    /// The version; its root is all zeros before the seal.
    pub version: Version,
    /// State of the version.
    pub state: VersionState,
    /// Size of its weights.
    pub bytes: u64,
    /// How far each engine is.
    pub engines: Vec<OnEngine>,
    /// Every live engine that should have it serves it.
    pub settled: bool,
}

/// How far one engine is with a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnEngine {
    /// Id of the engine.
    pub engine: String,
    /// Stage of the load.
    pub stage: LoadStage,
    /// Bytes fetched.
    pub bytes: u64,
    /// Time from the seal to this stage.
    pub since: Duration,
    /// Why the load failed; empty if it did not.
    pub error: String,
}

/// Stream of changes in the roll-out of versions; attached again after a loss. Made by
/// [`crate::Job::watch_versions`].
pub struct VersionWatch {
    link: Link,
    open: Open,
}

/// The stream while it is attached; it lives on between two calls of [`VersionWatch::next`].
#[derive(Default)]
struct Open(Option<Streaming<pb::VersionStatus>>);

// === impl VersionWatch ===

impl VersionWatch {
    pub(crate) fn new(session: Session) -> Self {
        Self { link: Link::new(session, CALL, LOST_AFTER), open: Open::default() }
    }

    /// Waits for the next change. After a lost link the manager tells how things stand, so a status may
    /// come twice. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<VersionStatus, Error> {
        self.link.run(&mut self.open).await
    }
}

impl Open {
    async fn message(&mut self, link: &mut Link) -> Result<VersionStatus, Failure> {
        let failed = |status: tonic::Status| Failure::of(CALL, &status);
        let stream = match &mut self.0 {
            Some(stream) => stream,
            empty => {
                let (mut rpc, opened) = link.begin().await;
                let request = pb::WatchRequest { session: opened.id.0 };
                let reply = rpc.watch_versions(request).await;
                empty.insert(reply.map_err(failed)?.into_inner())
            }
        };
        let ended = || Failure::Transport("the manager ended the stream".into());
        let status = stream.message().await.map_err(failed)?.ok_or_else(ended)?;
        link.heard();
        VersionStatus::from_wire(status)
            .map_err(|what| Failure::Final(Error::Protocol { call: CALL, what }))
    }
}

impl Attach for Open {
    type Done = VersionStatus;

    async fn attach(&mut self, link: &mut Link) -> Result<VersionStatus, Failure> {
        let status = self.message(link).await;
        if status.is_err() {
            self.0 = None;
        }
        status
    }
}

// === conversions ===

impl VersionStatus {
    /// Reads the status; the error says what cannot be read.
    pub(crate) fn from_wire(status: pb::VersionStatus) -> Result<Self, String> {
        Ok(Self {
            version: version(status.version)?,
            state: status.state.parse().map_err(|invalid: Invalid| invalid.to_string())?,
            bytes: status.bytes,
            engines: status
                .engines
                .into_iter()
                .map(OnEngine::from_wire)
                .collect::<Result<_, _>>()?,
            settled: status.settled,
        })
    }

    /// True if nothing more is to come: every engine has it, or a newer version took its place.
    pub(crate) fn is_over(&self) -> bool {
        self.settled || matches!(self.state, VersionState::Superseded | VersionState::Retired)
    }
}

impl OnEngine {
    fn from_wire(on: pb::version_status::OnEngine) -> Result<Self, String> {
        let since = Duration::from_millis(on.since_ms);
        let stage = on.stage.parse().map_err(|invalid: Invalid| invalid.to_string())?;
        Ok(Self { engine: on.engine, stage, bytes: on.bytes, since, error: on.error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_over_when_all_have_it_or_a_newer_one_took_its_place() {
        let status = |state: &str, settled| {
            let state = state.to_owned();
            let wire = pb::VersionStatus { state, settled, ..Default::default() };
            VersionStatus::from_wire(wire).expect("sound")
        };
        assert!(!status("current", false).is_over());
        assert!(status("current", true).is_over());
        assert!(status("superseded", false).is_over());
        let root = vec![1; 3].into();
        let version = Some(pb::Version { number: 1, root, ..Default::default() });
        let cut = pb::VersionStatus { version, ..Default::default() };
        assert!(VersionStatus::from_wire(cut).expect_err("3 bytes").contains("root has 3 bytes"));
        let odd = pb::VersionStatus { state: "lost".into(), ..Default::default() };
        assert!(VersionStatus::from_wire(odd).expect_err("no state").contains("\"lost\""));
    }
}
