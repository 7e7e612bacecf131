//! The manager's events while the demo runs, followed to the end and kept as a story. Owns the stream, the story, and
//! waits for an event. Decides nothing.

mod story;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anabranch_proto::pb::{self, admin_client::AdminClient, engines_request::Kind};
use anabranch_runtime::connect::ConnectError;
use anabranch_runtime::{Drain, connect};
use anabranch_views::{Notice, StateView};
use tokio::sync::watch;
use tonic::transport::Channel;

pub use story::{EngineStory, Move, Story, VersionStory};

/// Largest message in bytes. Events are small, but `/state` names every group of two steps.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Reason why the manager's events or state are not there.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The manager cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The manager refused a call.
    #[error("the manager refused to {what}: {why}")]
    Refused { what: &'static str, why: String },
    /// The events that were waited for did not come in time.
    #[error("after {waited:?} still not so: {what}")]
    TooLate { what: String, waited: Duration },
}

/// The story so far, and a way to wait for more of it. Clones share the story.
#[derive(Clone)]
pub struct Watcher {
    rpc: AdminClient<Channel>,
    story: Arc<Mutex<Story>>,
    /// Number of events so far.
    heard: watch::Receiver<u64>,
}

impl Watcher {
    /// Follows the manager at `url` from its first event on; `started` is the story's time zero.
    pub async fn start(url: &str, started: Instant, drain: &Drain) -> Result<Self, WatchError> {
        let channel = connect(url, None).await?;
        let rpc = AdminClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let story = Arc::new(Mutex::new(Story::default()));
        let (count, heard) = watch::channel(0);
        let follower = Follower { rpc: rpc.clone(), story: story.clone(), started, count };
        drain.spawn("manager events", follower.run(drain.clone()));
        Ok(Self { rpc, story, heard })
    }

    /// Reads from the story. Keep `read` short: the follower waits meanwhile.
    pub fn with<T>(&self, read: impl FnOnce(&Story) -> T) -> T {
        read(&self.story.lock().expect("no code panics while it holds this lock"))
    }

    /// Waits until `reached` returns a value. Fails after `within`; the error calls the awaited state `what`.
    pub async fn until<T>(
        &self,
        what: impl Into<String>,
        within: Duration,
        reached: impl Fn(&Story) -> Option<T>,
    ) -> Result<T, WatchError> {
        let mut heard = self.heard.clone();
        let looked = async {
            loop {
                heard.borrow_and_update();
                if let Some(found) = self.with(&reached) {
                    return found;
                }
                if heard.changed().await.is_err() {
                    // The manager is gone; the deadline will tell.
                    std::future::pending::<()>().await;
                }
            }
        };
        let late = |_| WatchError::TooLate { what: what.into(), waited: within };
        tokio::time::timeout(within, looked).await.map_err(late)
    }

    /// The manager's state; the demo's few engines fit on its first page.
    pub async fn state(&self) -> Result<StateView, WatchError> {
        let refused = |why: String| WatchError::Refused { what: "show its state", why };
        let reply = self.rpc.clone().state(pb::StateRequest::default()).await;
        let text = reply.map_err(|status| refused(status.message().to_owned()))?.into_inner().text;
        serde_json::from_str(&text).map_err(|error| refused(error.to_string()))
    }

    /// Drains an engine as `anabranch engines drain` does, and returns the manager's answer in words.
    pub async fn drain_engine(&self, id: &str, within: Duration) -> Result<String, WatchError> {
        let request = pb::EnginesRequest {
            kind: Kind::Drain as i32,
            engine: id.to_owned(),
            deadline_ms: u32::try_from(within.as_millis()).unwrap_or(u32::MAX),
        };
        let reply = self.rpc.clone().engines(request).await.map_err(|status| {
            WatchError::Refused { what: "drain an engine", why: status.message().to_owned() }
        })?;
        Ok(reply.into_inner().text)
    }
}

struct Follower {
    rpc: AdminClient<Channel>,
    story: Arc<Mutex<Story>>,
    started: Instant,
    count: watch::Sender<u64>,
}

impl Follower {
    async fn run(mut self, drain: Drain) {
        let mut stream = match self.rpc.events(pb::StateRequest::default()).await {
            Ok(reply) => reply.into_inner(),
            Err(status) => return tracing::warn!(%status, "the manager gives no events"),
        };
        loop {
            let told = tokio::select! {
                told = stream.message() => told,
                () = drain.cancelled() => return,
            };
            match told {
                Ok(Some(told)) => self.hear(&told.text),
                Ok(None) => return,
                Err(status) => return tracing::debug!(%status, "the manager's events ended"),
            }
        }
    }

    fn hear(&mut self, text: &str) {
        let at_s = self.started.elapsed().as_secs_f64();
        match serde_json::from_str::<Notice>(text) {
            Ok(notice) => {
                let mut story = self.story.lock().expect("no code panics while it holds this lock");
                story.hear(at_s, notice);
            }
            Err(error) => tracing::warn!(%error, text, "a notice that cannot be read"),
        }
        self.count.send_modify(|count| *count += 1);
    }
}
