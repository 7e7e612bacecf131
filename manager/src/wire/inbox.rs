//! The way into the driver's loop: one bounded queue. Whoever sends waits while it is full, so that a
//! busy core slows the readers of sockets and not the other way round.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anabranch_proto::SessionId;
use anabranch_proto::pb;
use anabranch_runtime::Clock;
use anabranch_views::{StatePage, StateView};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::action::Answer;
use crate::event::{ConsumerId, EngineHello, Event, LinkId, Pack, PublisherId, ReplyTo, Shard};
use crate::wire::streams::consumers::ToConsumer;
use crate::wire::streams::sessions::Attached;
use crate::wire::streams::{Out, ToPublisher};

/// Inputs that wait for the loop, which takes them in batches; whoever sends waits while it is full.
const CAPACITY: usize = 4096;

pub(crate) enum Input {
    Event(Event),
    /// An event whose answer somebody waits for.
    Ask {
        to: ReplyTo,
        event: Event,
        answer: oneshot::Sender<Answer>,
    },
    Attach(Box<Attach>),
    LinkLost {
        link: LinkId,
        why: &'static str,
    },
    /// A Data stream names its session. No answer: there is no such session.
    Bind {
        session: SessionId,
        out: Out<pb::DataToAgent>,
        answer: oneshot::Sender<Attached>,
    },
    ConsumerOpened(Box<NewConsumer>),
    ConsumerLost(ConsumerId),
    PublisherOpened {
        publisher: PublisherId,
        out: mpsc::Sender<ToPublisher>,
    },
    PublisherLost(PublisherId),
    /// A page of the state is asked for.
    State {
        page: StatePage,
        answer: oneshot::Sender<Arc<StateView>>,
    },
}

/// An agent said Hello.
pub(crate) struct Attach {
    pub link: LinkId,
    pub hello: EngineHello,
    pub out: Out<pb::ToAgent>,
    pub welcomed: oneshot::Sender<Attached>,
    pub closed: CancellationToken,
}

pub(crate) struct NewConsumer {
    pub session: SessionId,
    pub consumer: ConsumerId,
    pub pack: Pack,
    pub shard: Shard,
    pub out: mpsc::Sender<ToConsumer>,
}

#[derive(Clone)]
pub(crate) struct Inbox {
    to: mpsc::Sender<Input>,
    clock: Clock,
    ids: Arc<AtomicU64>,
    /// Time of the last `TrainerHeard`, in ms of the clock.
    trainer_heard_ms: Arc<AtomicU64>,
}

/// The loop has ended: the manager is shutting down.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Closed;

impl From<Closed> for Status {
    fn from(Closed: Closed) -> Self {
        Status::unavailable("the manager is shutting down")
    }
}

impl Inbox {
    pub fn new(clock: Clock) -> (Self, mpsc::Receiver<Input>) {
        let (to, from) = mpsc::channel(CAPACITY);
        let inbox =
            Self { to, clock, ids: Arc::new(AtomicU64::new(1)), trainer_heard_ms: Arc::default() };
        (inbox, from)
    }

    pub async fn send(&self, input: Input) -> Result<(), Closed> {
        self.to.send(input).await.map_err(|_| Closed)
    }

    pub async fn event(&self, event: Event) -> Result<(), Closed> {
        self.send(Input::Event(event)).await
    }

    /// Sends what `make` makes and waits for the core's answer, `within` at most.
    pub async fn ask(
        &self,
        within: Duration,
        make: impl FnOnce(ReplyTo) -> Event,
    ) -> Result<Answer, Status> {
        let to = ReplyTo(self.next_id());
        let (answer, answered) = oneshot::channel();
        let event = make(to);
        self.send(Input::Ask { to, event, answer }).await?;
        match tokio::time::timeout(within, answered).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(Closed.into()),
            Err(_) => Err(Status::deadline_exceeded(format!("no answer within {within:?}"))),
        }
    }

    /// One page of the state, at most 100 ms old.
    pub async fn state(&self, page: StatePage) -> Result<Arc<StateView>, Closed> {
        let (answer, answered) = oneshot::channel();
        self.send(Input::State { page, answer }).await?;
        answered.await.map_err(|_| Closed)
    }

    /// All pages of the state, each asked for on its own, so that the loop turns in between.
    pub async fn whole_state(&self) -> Result<Arc<StateView>, Closed> {
        let mut all = self.state(StatePage::default()).await?;
        while let Some(from) = all.next {
            let page = self.state(StatePage::starting(from)).await?;
            Arc::make_mut(&mut all).extend(Arc::unwrap_or_clone(page));
        }
        Ok(all)
    }

    /// Links, consumers, publishers and replies are counted together: unique is all they need to be.
    pub fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// Tells the core that a trainer lives, at most every 100 ms.
    pub async fn trainer_heard(&self) -> Result<(), Closed> {
        if self.due(&self.trainer_heard_ms) {
            self.event(Event::TrainerHeard).await
        } else {
            Ok(())
        }
    }

    /// The same for an engine.
    pub async fn engine_heard(&self, from: &Attached) -> Result<(), Closed> {
        if self.due(&from.tally.heard_ms) {
            let tokens = from.tally.tokens.swap(0, Ordering::Relaxed);
            self.event(Event::EngineHeard { session: from.session, tokens }).await
        } else {
            Ok(())
        }
    }

    fn due(&self, last_ms: &AtomicU64) -> bool {
        const EVERY_MS: u64 = 100;
        // From 1, so that the first one is due at once.
        let now = self.clock.now().as_millis() + 1;
        let last = last_ms.load(Ordering::Relaxed);
        let due = last == 0 || now >= last + EVERY_MS;
        // Of two at once, one sends.
        due && last_ms.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}
