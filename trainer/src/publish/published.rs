//! The trainer's handle on a version that it publishes.
//!
//! ```text
//!   Hashing ── root known, manager told ──► Sealed{version} ── its news ──► Rolling{version, status}
//!      └──────────────────────┴── refused, or given up ──► Failed{why}
//! ```

use std::time::Duration;

use anabranch_proto::Version;
use tokio::sync::watch;

use crate::error::Error;
use crate::versions::VersionStatus;

/// A version whose snapshot was taken. Dropping the handle changes nothing: the roll-out goes on.
///
/// Two moments matter to a trainer:
///
/// - [`Published::sealed`]: **an on-policy step may begin.** Groups that are submitted from then on start
///   with these weights or newer ones. Engines may not have them yet; the groups wait for the first that has.
/// - [`Published::settled`]: every live engine has the version. Scripts wait for it before they end; a
///   training loop does not need it.
#[derive(Clone, Debug)]
pub struct Published {
    /// Number of the version.
    pub number: u64,
    /// Size of its weights.
    pub bytes: u64,
    /// Time that the trainer was kept: the copy into the arena.
    pub copied_in: Duration,
    progress: watch::Receiver<Progress>,
}

/// How far a version is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Progress {
    /// The bytes are being hashed, or the manager has not been told yet.
    Hashing,
    /// The manager sealed the version.
    Sealed(Version),
    /// The manager tells of the roll-out.
    Rolling(Version, VersionStatus),
    /// The version is not followed any more.
    Failed(String),
}

const GIVEN_UP: &str = "newer versions took its place in the arena, or the job was closed";

// === impl Published ===

impl Published {
    pub(crate) fn new(
        number: u64,
        bytes: u64,
        copied_in: Duration,
        progress: watch::Receiver<Progress>,
    ) -> Self {
        Self { number, bytes, copied_in, progress }
    }

    /// Waits until the manager has sealed the version, and returns its full name. From then on an
    /// on-policy step may begin: no group that is submitted later starts with older weights. A version
    /// that is loaded in place ([`crate::Job::publish_in_place`]) needs this process no more.
    ///
    /// The manager seals a version of several senders when the last of them has sealed its part: there,
    /// a step may begin once all senders have returned from here.
    pub async fn sealed(&self) -> Result<Version, Error> {
        self.wait(|progress| match progress {
            Progress::Sealed(version) | Progress::Rolling(version, _) => Some(*version),
            Progress::Hashing | Progress::Failed(_) => None,
        })
        .await
    }

    /// Waits until every live engine that should have the version serves it, or a newer version took its
    /// place (the status says which).
    pub async fn settled(&self) -> Result<VersionStatus, Error> {
        self.wait(|progress| match progress {
            Progress::Rolling(_, status) if status.is_over() => Some(status.clone()),
            _ => None,
        })
        .await
    }

    /// The newest status of the roll-out; `None` before the first.
    pub fn status(&self) -> Option<VersionStatus> {
        match &*self.progress.borrow() {
            Progress::Rolling(_, status) => Some(status.clone()),
            _ => None,
        }
    }

    /// Waits for a status that this handle has not returned yet, to show progress.
    pub async fn changed(&mut self) -> Result<VersionStatus, Error> {
        loop {
            self.progress.changed().await.map_err(|_| self.failed(GIVEN_UP))?;
            let progress = self.progress.borrow_and_update().clone();
            match progress {
                Progress::Rolling(_, status) => return Ok(status),
                Progress::Failed(why) => return Err(self.failed(&why)),
                Progress::Hashing | Progress::Sealed(_) => {}
            }
        }
    }

    /// Waits for progress that `reached` makes something of.
    async fn wait<T>(&self, reached: impl Fn(&Progress) -> Option<T>) -> Result<T, Error> {
        let mut progress = self.progress.clone();
        let over = |p: &Progress| matches!(p, Progress::Failed(_)) || reached(p).is_some();
        match progress.wait_for(over).await.as_deref() {
            Ok(Progress::Failed(why)) => Err(self.failed(why)),
            Ok(at) => Ok(reached(at).expect("it was reached when the wait ended")),
            Err(_) => Err(self.failed(GIVEN_UP)),
        }
    }

    fn failed(&self, why: &str) -> Error {
        failed(self.number, why)
    }
}

/// Error of a version that is not published.
pub(crate) fn failed(number: u64, error: impl ToString) -> Error {
    Error::Publish { number, why: error.to_string() }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::VersionState;

    use super::*;

    fn published() -> (watch::Sender<Progress>, Published) {
        let (progress, seen) = watch::channel(Progress::Hashing);
        (progress, Published::new(3, 10, Duration::ZERO, seen))
    }

    fn status(settled: bool) -> Progress {
        let version = Version::base(0);
        let state = VersionState::Current;
        let engines = Vec::new();
        Progress::Rolling(version, VersionStatus { version, state, bytes: 10, engines, settled })
    }

    #[tokio::test]
    async fn a_seal_ends_the_wait_for_it_and_a_status_stands_for_it() {
        let (progress, published) = published();
        assert_eq!(published.status(), None);
        progress.send_replace(Progress::Sealed(Version::base(7)));
        assert_eq!(published.sealed().await.expect("sealed").epoch, 7);
        progress.send_replace(status(false));
        assert_eq!(published.sealed().await.expect("rolling").epoch, 0);
        assert!(!published.status().expect("told").settled);
    }

    #[tokio::test]
    async fn changes_are_told_one_by_one_until_the_version_has_settled() {
        let (progress, mut published) = published();
        progress.send_replace(Progress::Sealed(Version::base(0)));
        let told = async {
            tokio::task::yield_now().await;
            progress.send_replace(status(false));
        };
        let (first, ()) = tokio::join!(published.changed(), told);
        assert!(!first.expect("a status").settled);
        progress.send_replace(status(true));
        assert!(published.changed().await.expect("the last").settled);
        assert!(published.settled().await.expect("settled").settled);
    }

    #[tokio::test]
    async fn a_failure_and_a_version_that_lost_its_place_end_every_wait() {
        let (progress, published) = published();
        progress.send_replace(Progress::Failed("refused".into()));
        for error in [published.sealed().await.err(), published.settled().await.err()] {
            assert_eq!(error.expect("failed").to_string(), "version 3: refused");
        }
        let (progress, mut published) = self::published();
        drop(progress);
        assert!(published.settled().await.is_err());
        let error = published.changed().await.expect_err("nobody tells any more");
        assert!(error.to_string().contains("newer versions took its place"), "{error}");
    }
}
