//! Agents' links and sessions as the driver sees them: where to send, what was sent. A session outlives
//! its link.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anabranch_proto::{EngineId, SessionId, pb};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Out, Overflow};
use crate::event::LinkId;

/// Messages to one agent that it has not taken yet. Prompts in them are shared, not copied, so this
/// bounds a few MiB; it is large enough for 256 starts with prompts of 32 frames each.
pub(crate) const OUTGOING: usize = 16_384;

/// A Control stream, from its Hello on.
pub(crate) struct Link {
    pub out: Out<pb::ToAgent>,
    pub closed: CancellationToken,
    pub engine: EngineId,
    pub proto: u32,
    /// Waits until the core has welcomed the agent.
    pub welcomed: Option<oneshot::Sender<Attached>>,
    pub session: Option<SessionId>,
}

pub(crate) struct Session {
    pub engine: EngineId,
    pub tally: Arc<Tally>,
    /// `None` while its link is lost.
    pub live: Option<Live>,
}

/// What a link that works adds to a session.
pub(crate) struct Live {
    pub link: LinkId,
    pub control: Out<pb::ToAgent>,
    pub closed: CancellationToken,
    pub data: Data,
    /// Prompts that went out over this link: after a re-attach each goes once more.
    pub prompts: BTreeSet<u64>,
}

pub(crate) enum Data {
    /// The agent has not opened its Data stream yet.
    Waiting(VecDeque<pb::DataToAgent>),
    Bound(Out<pb::DataToAgent>),
}

/// Counts of a session, over all its links.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// The last tick whose facts are in the core's inbox.
    pub acked_tick: AtomicU64,
    /// Time of the last `EngineHeard`, in ms of the clock.
    pub heard_ms: AtomicU64,
    /// New tokens in the ledger since the last `EngineHeard`.
    pub tokens: AtomicU64,
}

/// What the tasks of a link know of their session.
#[derive(Clone)]
pub(crate) struct Attached {
    pub session: SessionId,
    pub link: LinkId,
    pub engine: EngineId,
    pub tally: Arc<Tally>,
    pub closed: CancellationToken,
}

impl Live {
    pub fn send(&mut self, message: pb::data_to_agent::Kind) -> Result<(), Overflow> {
        let message = pb::DataToAgent { kind: Some(message) };
        match &mut self.data {
            Data::Waiting(queue) if queue.len() < OUTGOING => queue.push_back(message),
            Data::Waiting(_) => return Err(Overflow),
            Data::Bound(out) => return push(out, message),
        }
        Ok(())
    }

    pub fn order(&self, message: pb::to_agent::Kind) -> Result<(), Overflow> {
        push(&self.control, pb::ToAgent { kind: Some(message) })
    }

    /// The agent's Data stream is there: what waited for it goes first.
    pub fn bind(&mut self, out: Out<pb::DataToAgent>) -> Result<(), Overflow> {
        let bound = Data::Bound(out.clone());
        if let Data::Waiting(queue) = std::mem::replace(&mut self.data, bound) {
            queue.into_iter().try_for_each(|message| push(&out, message))?;
        }
        Ok(())
    }

    /// Ends both streams; what was sent before still goes out.
    pub fn close(self, status: Status) {
        // A full queue belongs to a peer that does not read; it sees the end of the stream instead.
        let _ = self.control.try_send(Err(status));
        self.closed.cancel();
    }
}

/// To a stream whose other end has gone is no error: its reader notices and says so.
fn push<T>(out: &Out<T>, message: T) -> Result<(), Overflow> {
    match out.try_send(Ok(message)) {
        Ok(()) | Err(TrySendError::Closed(_)) => Ok(()),
        Err(TrySendError::Full(_)) => Err(Overflow),
    }
}
