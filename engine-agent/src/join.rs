//! One link to the manager: dials, opens both streams, and carries messages. The core decides what
//! messages mean. A link that breaks is never repaired: the core dials a new one.

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::limits::MAX_MESSAGE_BYTES;
use anabranch_proto::pb::agent_client::AgentClient;
use anabranch_proto::pb::{self, data_from_agent, from_agent};
use anabranch_runtime::{Endpoint, JoinToken, connect_to};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::core::{DIAL_PATIENCE, Event, LinkId, WINDOW_TICKS};
use crate::shared::Shared;

/// Address and token of the manager.
#[derive(Clone)]
pub struct Manager {
    /// Address of the manager.
    pub endpoint: Endpoint,
    /// Join token; `None` on loopback.
    pub token: Option<JoinToken>,
}

/// The driver's end of a link. Dropping the handle ends the streams in order; [`LinkHandle::cut`]
/// ends them at once.
pub struct LinkHandle {
    /// Name of the link in events.
    pub id: LinkId,
    control: mpsc::Sender<pb::FromAgent>,
    data: mpsc::Sender<pb::DataFromAgent>,
    bind: Option<oneshot::Sender<u64>>,
    cancel: CancellationToken,
    done: CancellationToken,
}

/// The task's end of a link.
pub struct Link {
    id: LinkId,
    shared: Arc<Shared>,
    manager: Manager,
    control: mpsc::Receiver<pb::FromAgent>,
    data: mpsc::Receiver<pb::DataFromAgent>,
    bind: oneshot::Receiver<u64>,
    cancel: CancellationToken,
    done: CancellationToken,
}

/// Bound of control messages that wait for the stream: beats and outcomes between two polls.
const CONTROL_QUEUE: usize = 256;
/// Bound of ticks that wait for the stream: the core has no more than a window in flight, so the
/// queue never fills.
const DATA_QUEUE: usize = WINDOW_TICKS + 2;

/// Both ends of a new link, with `hello` as its first message.
pub fn link(
    id: LinkId,
    hello: pb::Hello,
    shared: &Arc<Shared>,
    manager: &Manager,
) -> (LinkHandle, Link) {
    let (control, control_out) = mpsc::channel(CONTROL_QUEUE);
    let (data, data_out) = mpsc::channel(DATA_QUEUE);
    let (bind, bound) = oneshot::channel();
    let (cancel, done) = (CancellationToken::new(), CancellationToken::new());
    let hello = pb::FromAgent { kind: Some(from_agent::Kind::Hello(hello)) };
    control.try_send(hello).expect("the queue is new");
    let handle = LinkHandle {
        id,
        control,
        data,
        bind: Some(bind),
        cancel: cancel.clone(),
        done: done.clone(),
    };
    let link = Link {
        id,
        shared: shared.clone(),
        manager: manager.clone(),
        control: control_out,
        data: data_out,
        bind: bound,
        cancel,
        done,
    };
    (handle, link)
}

// === impl LinkHandle ===

impl LinkHandle {
    /// Queues a control message.
    pub fn control(&self, kind: from_agent::Kind) {
        self.sent(self.control.try_send(pb::FromAgent { kind: Some(kind) }).is_ok());
    }

    /// Queues a tick.
    pub fn tick(&self, tick: pb::Tick) {
        let kind = Some(data_from_agent::Kind::Tick(tick));
        self.sent(self.data.try_send(pb::DataFromAgent { kind }).is_ok());
    }

    /// Opens the Data stream of `session`.
    pub fn bind(&mut self, session: u64) {
        let bind = pb::Bind { session };
        let kind = Some(data_from_agent::Kind::Bind(bind));
        self.sent(self.data.try_send(pb::DataFromAgent { kind }).is_ok());
        if let Some(go) = self.bind.take() {
            // If the task has ended, the link is lost, and the task has said so.
            let _ = go.send(session);
        }
    }

    /// Cuts the link at once.
    pub fn cut(&self) {
        self.cancel.cancel();
    }

    /// Ends the streams after the queued messages, and gives the manager `patience` to close its
    /// side.
    pub async fn finish(self, patience: Duration) {
        let LinkHandle { control, data, cancel, done, .. } = self;
        drop((control, data));
        // The connection is closed whether or not the manager did so in time.
        let _ = timeout(patience, done.cancelled()).await;
        cancel.cancel();
    }

    /// Cuts the link if a message could not be queued: a peer that takes nothing for a whole queue
    /// is gone, and the message is sent again.
    fn sent(&self, ok: bool) {
        if !ok {
            self.cancel.cancel();
        }
    }
}

// === impl Link ===

impl Link {
    /// Carries messages until the link is lost, then reports the loss.
    pub async fn run(self) {
        let (id, shared, cancel) = (self.id, self.shared.clone(), self.cancel.clone());
        let _done = self.done.clone().drop_guard();
        let why = tokio::select! {
            lost = self.carry() => lost,
            () = cancel.cancelled() => Lost::again("cut from this side"),
        };
        shared.handle(Event::LinkLost { link: id, why: why.text, fatal: why.fatal });
    }

    async fn carry(self) -> Lost {
        let channel = match connect_to(&self.manager.endpoint, self.manager.token.as_ref()).await {
            Ok(channel) => channel,
            Err(error) => return Lost { text: error.to_string(), fatal: !error.may_retry() },
        };
        let client = AgentClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let control = carry_control(self.id, self.shared.clone(), client.clone(), self.control);
        let data = carry_data(self.id, self.shared, client, self.data, self.bind);
        tokio::select! {
            lost = control => lost,
            lost = data => lost,
        }
    }
}

async fn carry_control(
    id: LinkId,
    shared: Arc<Shared>,
    mut client: AgentClient<Channel>,
    out: mpsc::Receiver<pb::FromAgent>,
) -> Lost {
    let opened = timeout(DIAL_PATIENCE, client.control(ReceiverStream::new(out))).await;
    let mut messages = match opened {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return Lost::from(status),
        Err(_) => return Lost::again("the manager does not answer"),
    };
    loop {
        match messages.message().await {
            Ok(Some(pb::ToAgent { kind: Some(kind) })) => {
                shared.handle(Event::ManagerSaid { link: id, kind });
            }
            // A newer manager may say things that this agent does not know.
            Ok(Some(pb::ToAgent { kind: None })) => {}
            Ok(None) => return Lost::again("the manager closed the control stream"),
            Err(status) => return Lost::from(status),
        }
    }
}

async fn carry_data(
    id: LinkId,
    shared: Arc<Shared>,
    mut client: AgentClient<Channel>,
    out: mpsc::Receiver<pb::DataFromAgent>,
    bind: oneshot::Receiver<u64>,
) -> Lost {
    if bind.await.is_err() {
        // The handle is gone: the control stream ends by itself.
        return std::future::pending().await;
    }
    let opened = timeout(DIAL_PATIENCE, client.data(ReceiverStream::new(out))).await;
    let mut messages = match opened {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return Lost::from(status),
        Err(_) => return Lost::again("the manager does not open the data stream"),
    };
    shared.handle(Event::Bound { link: id });
    loop {
        match messages.message().await {
            Ok(Some(pb::DataToAgent { kind: Some(kind) })) => {
                shared.handle(Event::DataCame { link: id, kind });
            }
            Ok(Some(pb::DataToAgent { kind: None })) => {}
            Ok(None) => return Lost::again("the manager closed the data stream"),
            Err(status) => return Lost::from(status),
        }
    }
}

/// Reason of a loss.
struct Lost {
    text: String,
    fatal: bool,
}

impl Lost {
    fn again(text: &str) -> Lost {
        Lost { text: text.to_owned(), fatal: false }
    }
}

impl From<Status> for Lost {
    fn from(status: Status) -> Lost {
        let fatal = matches!(
            status.code(),
            Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented
        );
        Lost { text: format!("{}: {}", status.code().description(), status.message()), fatal }
    }
}
