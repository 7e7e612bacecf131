//! The session of an open job: which job and epoch, the manager that it is open at, and what the manager
//! answered. Everything that the SDK does for a job is a call or a stream of its session; the session knows
//! none of them.
//!
//! ```text
//!   Open{id} ── the manager forgot it, same life ──► Open{new id}
//!      │   └──── the manager lost its state ───────► Error::StateLost
//!      └── close ──► Closed
//! ```
//! A session that the manager forgot is opened again. A manager that lost the job's state is an error: a
//! new job in its place would hide that submitted work is gone.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{BatchSeq, SessionId, Version, pb};
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::client::{Client, Rpc};
use crate::config::JobConfig;
use crate::error::{Error, Failure};
use crate::retry::Tries;
use crate::trajectory::version;

/// Time that calls without a deadline of their own look for the manager.
pub(crate) const CALL_WITHIN: Duration = Duration::from_secs(60);

/// An open job at one manager. Cheap to clone; all clones are the same session.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    client: Client,
    config: JobConfig,
    /// Runtime that the job was opened in; the session's tasks run there.
    runtime: Handle,
    opened: Mutex<Opened>,
    closed: CancellationToken,
}

/// Answer of the manager to the newest open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opened {
    /// Name of the session in every call.
    pub id: SessionId,
    /// Life of the manager's state; another number means that the state is lost.
    pub manager_epoch: u64,
    /// Highest committed batch; 0 for none.
    pub committed: BatchSeq,
    /// Current version of the weights.
    pub current: Version,
    /// Key that verifies grants for chunks which this process serves.
    pub serve_key: [u8; 32],
    /// The job existed before.
    pub resumed: bool,
}

// === impl Session ===

impl Session {
    /// Opens the job, or joins it.
    pub(crate) async fn open(client: Client, config: JobConfig) -> Result<Self, Error> {
        let opened = open(&client, config.request(), CALL_WITHIN).await?;
        let (runtime, closed) = (Handle::current(), CancellationToken::new());
        let opened = Mutex::new(opened);
        Ok(Self { inner: Arc::new(Inner { client, config, runtime, opened, closed }) })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.inner.client
    }

    pub(crate) fn config(&self) -> &JobConfig {
        &self.inner.config
    }

    /// Runtime for the session's tasks.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.inner.runtime
    }

    /// Cancelled when the job is closed here; every stream ends then.
    pub(crate) fn closed(&self) -> &CancellationToken {
        &self.inner.closed
    }

    /// The newest answer to an open.
    pub(crate) async fn opened(&self) -> Opened {
        *self.inner.opened.lock().await
    }

    /// Makes an idempotent call, once more on a fresh session if the manager forgot this one.
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
            let id = self.opened().await.id;
            match self.client().call(call, tries.left(), |rpc| once(rpc, id.0)).await {
                Ok(reply) => return Ok(reply),
                Err(Failure::NotFound(_)) if !renewed => self.renew(id, tries.left()).await?,
                Err(failure) => return Err(failure.into_error(call, within)),
            }
            renewed = true;
        }
    }

    /// Opens the job again, unless another call did since `lost` was the session.
    pub(crate) async fn renew(&self, lost: SessionId, within: Duration) -> Result<(), Error> {
        let mut opened = self.inner.opened.lock().await;
        if opened.id != lost {
            return Ok(());
        }
        // A rewind belongs to the first opening; now the job is only joined.
        let request = pb::OpenRequest { resume: false, ..self.config().request() };
        let renewed = open(self.client(), request, within).await?;
        let (was, is) = (opened.manager_epoch, renewed.manager_epoch);
        if was != is {
            return Err(Error::StateLost { was, is });
        }
        tracing::info!(job = self.config().job, "the session was opened again");
        *opened = renewed;
        Ok(())
    }
}

async fn open(
    client: &Client,
    request: pb::OpenRequest,
    within: Duration,
) -> Result<Opened, Error> {
    let reply = client
        .call("open", within, |mut rpc| {
            let request = request.clone();
            async move { rpc.open(request).await }
        })
        .await;
    let opened = reply.map_err(|failure| failure.into_error("open", within))?;
    Opened::from_wire(opened).map_err(|what| Error::Protocol { call: "open", what })
}

// === impl Opened ===

impl Opened {
    fn from_wire(opened: pb::Opened) -> Result<Self, String> {
        let serve_key = match opened.serve_key.len() {
            0 => [0; 32],
            32 => opened.serve_key.as_ref().try_into().expect("length was checked"),
            len => return Err(format!("a serve key of {len} bytes, 32 expected")),
        };
        Ok(Self {
            id: SessionId(opened.session),
            manager_epoch: opened.manager_epoch,
            committed: BatchSeq(opened.floor_cursor),
            current: version(opened.current)?,
            serve_key,
            resumed: opened.resumed,
        })
    }
}

#[cfg(test)]
impl Session {
    /// A session whose manager cannot be reached; needs a runtime.
    pub(crate) fn offline() -> Self {
        let opened = Opened::from_wire(pb::Opened { session: 1, ..Default::default() });
        let inner = Inner {
            client: Client::offline(),
            config: JobConfig::new("offline"),
            runtime: Handle::current(),
            opened: Mutex::new(opened.expect("sound")),
            closed: CancellationToken::new(),
        };
        Self { inner: Arc::new(inner) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serve_key_has_32_bytes_or_none() {
        let opened = |len| {
            let serve_key = vec![7; len].into();
            Opened::from_wire(pb::Opened { serve_key, floor_cursor: 5, ..Default::default() })
        };
        assert_eq!(opened(0).expect("none").serve_key, [0; 32]);
        let full = opened(32).expect("a whole key");
        assert_eq!((full.serve_key, full.committed), ([7; 32], BatchSeq(5)));
        assert!(opened(31).expect_err("cut").contains("31 bytes"));
    }
}
