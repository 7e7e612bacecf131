//! Carries out what the core asks for, in order: ledger pages, messages to agents, answers and batches to
//! the trainer, notices. Decides nothing. What it finds broken goes back to the core as events.
//!
//! This is the seam for a journal: what must survive is [`crate::ledger::Fact`]s on the way in, and here
//! `OpenPage`, `ClearPage`, `Forget`, `Start` and `Deliver` on the way out.

mod orders;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{LogprobsMode, SessionId, pb};
use anabranch_runtime::Clock;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::action::{Action, Answer, VersionStatus};
use crate::event::{ConsumerId, Event, LinkId, PublisherId, ReplyTo};
use crate::ledger::Ledger;
use crate::view::metrics::Metrics;
use crate::view::notice_log;
use crate::view::notices::Notices;
use crate::wire::gate::Life;
use crate::wire::inbox::{Attach, NewConsumer};
use crate::wire::streams::consumers::{Consumers, ToConsumer};
use crate::wire::streams::sessions::{Attached, Data, Link, Live, Session};
use crate::wire::streams::{Out, Overflow, ToPublisher};

pub(crate) struct Effects {
    pub ledger: Arc<Ledger>,
    pub notices: Arc<Notices>,
    pub metrics: Arc<Metrics>,
    pub life: Life,
    pub tick: Duration,
    clock: Clock,
    links: BTreeMap<LinkId, Link>,
    sessions: BTreeMap<SessionId, Session>,
    pub consumers: Consumers,
    publishers: BTreeMap<PublisherId, mpsc::Sender<ToPublisher>>,
    /// Statuses that publishers have not been sent: the last one of each version.
    statuses: BTreeMap<(PublisherId, u64), VersionStatus>,
    replies: BTreeMap<ReplyTo, oneshot::Sender<Answer>>,
    /// Name of the open job, and what its log-probabilities mean, as the core last said.
    job: Option<(String, LogprobsMode)>,
    /// For the core, at the end of this turn: one a link, consumer or page at most.
    found: Vec<Event>,
}

impl Effects {
    pub fn new(
        ledger: Arc<Ledger>,
        notices: Arc<Notices>,
        metrics: Arc<Metrics>,
        life: Life,
        tick: Duration,
        clock: Clock,
    ) -> Self {
        Self {
            ledger,
            notices,
            metrics,
            life,
            tick,
            clock,
            links: BTreeMap::new(),
            sessions: BTreeMap::new(),
            consumers: Consumers::default(),
            publishers: BTreeMap::new(),
            statuses: BTreeMap::new(),
            replies: BTreeMap::new(),
            job: None,
            found: Vec::new(),
        }
    }

    pub fn apply(&mut self, action: Action) {
        match action {
            Action::OpenPage { sample, rules } => self.ledger.open(sample, rules),
            Action::ClearPage { sample } => {
                if let Some(tokens) = self.ledger.clear(sample) {
                    self.found.push(Event::PageCleared { sample, tokens });
                }
            }
            Action::FreezePage { sample } => {
                if let Some((kept, oldest)) = self.ledger.freeze(sample) {
                    self.found.push(Event::PageFrozen { sample, kept, oldest });
                }
            }
            Action::Forget { samples } => self.forget(&samples),
            Action::Start(order) => self.start(&order),
            Action::Stop { session, sample, attempt, why } => {
                self.ledger.end(sample, attempt);
                let stop = pb::Stop {
                    sample: Some(sample.into()),
                    attempt: attempt.0,
                    why: why.to_owned(),
                };
                self.send(session, pb::data_to_agent::Kind::Stop(stop));
            }
            Action::ForgetPrompt { session, digest } => self.forget_prompt(session, digest),
            Action::Welcome { link, session, lease, keep, drop, serve_key } => {
                let welcome =
                    orders::welcome(self, (link, session), lease, (&keep, &drop), serve_key);
                self.welcome(link, session, welcome);
            }
            Action::Refuse { link, why, retry_after } => self.refuse(link, why, retry_after),
            Action::EndSession { session, why } => self.end_session(session, &why),
            Action::OrderLoad(order) => {
                let session = order.session;
                self.order(session, pb::to_agent::Kind::Load(orders::load(*order)));
            }
            Action::CancelLoad { session, order } => {
                let cancel = pb::Load { order: order.0, cancel: true, ..pb::Load::default() };
                self.order(session, pb::to_agent::Kind::Load(cancel));
            }
            Action::OrderMode { session, order, mode, deadline, why } => {
                let mode = orders::mode(order, mode, deadline, why);
                self.order(session, pb::to_agent::Kind::Mode(mode));
            }
            Action::Reply { to, answer } => self.reply(to, answer),
            Action::Deliver { consumer, batch, samples } => {
                let batch = self.consumers.outgoing(batch, samples);
                self.queue_for(consumer, batch);
            }
            Action::StepDone { consumer, report } => {
                self.queue_for(consumer, ToConsumer::StepDone(report));
            }
            Action::CloseConsumer { consumer, why } => self.consumers.close(consumer, why),
            Action::TellPublisher { publisher, status } => {
                self.statuses.insert((publisher, status.version.number), status);
                self.send_statuses();
            }
            Action::DialReceiver(order) => {
                if let Some(out) = self.publishers.get(&order.publisher) {
                    // Lost only with a trainer that reads nothing: the load is then ordered again.
                    let _ = out.try_send(ToPublisher::Dial(orders::dial(*order)));
                }
            }
            Action::Emit(notice) => {
                notice_log::log(&notice);
                self.metrics.noticed(&notice);
                self.notices.tell(&notice);
            }
        }
    }

    /// What broke, and what the ledger said, while actions were carried out.
    pub fn take_found(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.found)
    }

    pub fn attach(&mut self, attach: Attach) -> Event {
        let Attach { link, hello, out, welcomed, closed } = attach;
        let engine = hello.id.clone();
        let (proto, welcomed) = (hello.proto, Some(welcomed));
        self.links.insert(link, Link { out, closed, engine, proto, welcomed, session: None });
        Event::EngineAttached { link, hello: Box::new(hello) }
    }

    /// The link's own tasks, or we, found it broken. Told to the core once.
    pub fn link_lost(&mut self, link: LinkId, why: &'static str) -> Option<Event> {
        let gone = self.links.remove(&link)?;
        gone.closed.cancel();
        if let Some(session) = gone.session.and_then(|id| self.sessions.get_mut(&id)) {
            session.live.take_if(|live| live.link == link);
        }
        Some(Event::LinkLost { link, why })
    }

    pub fn bind(
        &mut self,
        id: SessionId,
        out: Out<pb::DataToAgent>,
        answer: oneshot::Sender<Attached>,
    ) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(live) = &mut session.live else { return };
        let attached = Attached {
            session: id,
            link: live.link,
            engine: session.engine.clone(),
            tally: session.tally.clone(),
            closed: live.closed.clone(),
        };
        // An agent that hung up meanwhile is noticed by its Control stream.
        if answer.send(attached).is_ok() && live.bind(out).is_err() {
            let link = live.link;
            self.overflowed(link);
        }
    }

    pub fn open_consumer(&mut self, new: NewConsumer) -> Event {
        let NewConsumer { session, consumer, pack, shard, out } = new;
        self.consumers.open(consumer, out);
        Event::ConsumerAttached { session, consumer, pack, shard }
    }

    pub fn open_publisher(&mut self, publisher: PublisherId, out: mpsc::Sender<ToPublisher>) {
        self.publishers.insert(publisher, out);
    }

    pub fn publisher_lost(&mut self, publisher: PublisherId) -> Event {
        self.publishers.remove(&publisher);
        self.statuses.retain(|(of, _), _| *of != publisher);
        Event::PublisherLost { publisher }
    }

    /// Somebody waits for what the core will say.
    pub fn expect_reply(&mut self, to: ReplyTo, answer: oneshot::Sender<Answer>) {
        self.replies.insert(to, answer);
    }

    /// Sends publishers what they have not been sent. Whoever does not read is sent the last status once it does.
    pub fn send_statuses(&mut self) {
        let publishers = &self.publishers;
        self.statuses.retain(|(publisher, _), status| {
            let Some(out) = publishers.get(publisher) else { return false };
            matches!(
                out.try_send(ToPublisher::Status(status.clone())),
                Err(mpsc::error::TrySendError::Full(_))
            )
        });
    }

    /// Those who stopped waiting.
    pub fn drop_stale_replies(&mut self) {
        self.replies.retain(|_, answer| !answer.is_closed());
    }

    /// The manager ends: every stream is told, then closed.
    pub fn close_all(&mut self) {
        let status = || Status::unavailable("the manager is shutting down");
        for link in std::mem::take(&mut self.links).into_values() {
            let _ = link.out.try_send(Err(status()));
            link.closed.cancel();
        }
        for session in std::mem::take(&mut self.sessions).into_values() {
            if let Some(Live { data: Data::Bound(out), .. }) = session.live {
                let _ = out.try_send(Err(status()));
            }
        }
        self.consumers.close_all();
        self.publishers.clear();
        self.replies.clear();
    }

    fn forget(&mut self, samples: &[anabranch_proto::SampleId]) {
        self.consumers.forget(samples);
        self.ledger.forget(samples);
    }

    fn welcome(&mut self, id: LinkId, session_id: SessionId, welcome: pb::Welcome) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.session = Some(session_id);
        let session = self.sessions.entry(session_id).or_insert_with(|| Session {
            engine: link.engine.clone(),
            tally: Arc::default(),
            live: None,
        });
        let welcomed = link.welcomed.take();
        let live = Live {
            link: id,
            control: link.out.clone(),
            closed: link.closed.clone(),
            data: Data::Waiting(VecDeque::new()),
            prompts: Default::default(),
        };
        let attached = Attached {
            session: session_id,
            link: id,
            engine: session.engine.clone(),
            tally: session.tally.clone(),
            closed: link.closed.clone(),
        };
        let sent = live.order(pb::to_agent::Kind::Welcome(welcome));
        if let Some(old) = session.live.replace(live) {
            // The agent dialled again before we saw its old link break.
            self.links.remove(&old.link);
            old.close(Status::aborted("the agent attached again over another link"));
        }
        if let Some(welcomed) = welcomed {
            // A reader that is gone reports the lost link itself.
            let _ = welcomed.send(attached);
        }
        if sent.is_err() {
            self.overflowed(id);
        }
    }

    fn refuse(&mut self, id: LinkId, why: String, retry_after: Option<Duration>) {
        self.metrics.families.hellos_refused.increment(1);
        let Some(link) = self.links.remove(&id) else { return };
        let refused = pb::to_agent::Kind::Refused(orders::refused(why, retry_after));
        let _ = link.out.try_send(Ok(pb::ToAgent { kind: Some(refused) }));
        link.closed.cancel();
    }

    fn end_session(&mut self, id: SessionId, why: &str) {
        let Some(session) = self.sessions.remove(&id) else { return };
        if let Some(live) = session.live {
            self.links.remove(&live.link);
            live.close(Status::aborted(format!("the session is over: {why}")));
        }
    }

    fn forget_prompt(&mut self, session: SessionId, digest: u64) {
        let had = self.live(session).is_some_and(|live| live.prompts.remove(&digest));
        if had {
            self.send(session, pb::data_to_agent::Kind::Forget(pb::PromptForget { digest }));
        }
    }

    /// On the Data stream. To a session whose link is lost nothing is sent: at re-attach both sides say
    /// what they have.
    fn send(&mut self, session: SessionId, message: pb::data_to_agent::Kind) {
        let Some(live) = self.live(session) else { return };
        let link = live.link;
        if let Err(Overflow) = live.send(message) {
            self.overflowed(link);
        }
    }

    /// On the Control stream.
    fn order(&mut self, session: SessionId, message: pb::to_agent::Kind) {
        let Some(live) = self.live(session) else { return };
        let link = live.link;
        if let Err(Overflow) = live.order(message) {
            self.overflowed(link);
        }
    }

    fn live(&mut self, session: SessionId) -> Option<&mut Live> {
        self.sessions.get_mut(&session)?.live.as_mut()
    }

    fn overflowed(&mut self, link: LinkId) {
        self.metrics.families.overflows.increment(1);
        let lost = self.link_lost(link, "the agent does not take what it is sent");
        self.found.extend(lost);
    }

    fn reply(&mut self, to: ReplyTo, answer: Answer) {
        if let Answer::Opened { job, logprobs_mode, .. } = &answer {
            self.job = Some((job.clone(), *logprobs_mode));
        }
        if let Some(waiting) = self.replies.remove(&to) {
            // Who stopped waiting has been told so by its deadline.
            let _ = waiting.send(answer);
        }
    }

    fn queue_for(&mut self, consumer: ConsumerId, message: ToConsumer) {
        if self.consumers.send(consumer, message).is_err() {
            self.metrics.families.overflows.increment(1);
            self.found.push(Event::ConsumerLost { consumer });
        }
    }
}
