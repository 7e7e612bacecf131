//! The loop of the agent: takes actions from the core and performs each without waiting for it.
//! Everything that takes time is a task of its own that reports back as an event.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use anabranch_runtime::{Drain, Now};
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::core::{Action, Call, Event, ExitReason, FetchOrder};
use crate::engine::{AttemptId, Engine};
use crate::join::{LinkHandle, Manager, link};
use crate::shared::Shared;
use crate::weights::Weights;
use crate::{calls, generate};

/// Everything that actions need.
pub struct Driver<E> {
    pub shared: Arc<Shared>,
    pub engine: Arc<E>,
    pub weights: Arc<Weights>,
    pub manager: Manager,
    pub drain: Drain,
    link: Option<LinkHandle>,
    fetches: BTreeMap<u64, CancellationToken>,
    /// Limit of aborts in flight: a drain aborts a thousand samples at once, not over a thousand
    /// connections.
    aborts: Arc<Semaphore>,
}

/// Most aborts in flight.
const ABORTS_AT_ONCE: usize = 32;
/// Time between repeats of an abort whose stream has not ended.
const ABORT_AGAIN: Duration = Duration::from_millis(500);
/// Time for the last messages of a link.
const LAST_MESSAGES: Duration = Duration::from_secs(1);

impl<E: Engine> Driver<E> {
    /// A driver without a link.
    pub fn new(
        shared: Arc<Shared>,
        engine: Arc<E>,
        weights: Arc<Weights>,
        manager: Manager,
        drain: Drain,
    ) -> Driver<E> {
        Driver {
            shared,
            engine,
            weights,
            manager,
            drain,
            link: None,
            fetches: BTreeMap::new(),
            aborts: Arc::new(Semaphore::new(ABORTS_AT_ONCE)),
        }
    }

    /// Runs until the core says how the agent ends.
    pub async fn run(&mut self) -> ExitReason {
        let mut actions = Vec::new();
        loop {
            let until = self.shared.turn(&mut actions);
            for action in actions.drain(..) {
                if let Action::Exit(exit) = action {
                    self.close_link().await;
                    return exit;
                }
                self.perform(action);
            }
            tokio::select! {
                () = self.shared.wake.notified() => {}
                () = self.sleep_until(until) => {}
            }
        }
    }

    async fn sleep_until(&self, until: Option<Now>) {
        match until {
            Some(at) => sleep(self.shared.clock.until(at)).await,
            None => pending().await,
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Dial { link: id, hello } => {
                let (handle, task) = link(id, *hello, &self.shared, &self.manager);
                self.link = Some(handle);
                self.drain.spawn("link", task.run());
            }
            Action::Bind { link, session } => {
                if let Some(handle) = self.link.as_mut().filter(|handle| handle.id == link) {
                    handle.bind(session);
                }
            }
            Action::HangUp { link } => {
                if let Some(handle) = self.link.take_if(|handle| handle.id == link) {
                    handle.cut();
                }
            }
            Action::SendControl(kind) => self.link.iter().for_each(|l| l.control((*kind).clone())),
            Action::SendTick(tick) => {
                if let Some(link) = &self.link {
                    link.tick(*tick);
                }
            }
            Action::ServePeers { key } => self.weights.serve(&key),
            Action::Generate(request) => {
                let (attempt, drain) = (request.attempt, self.drain.clone());
                let task = generate::stream_task(self.shared.clone(), self.engine.clone(), request);
                self.shared
                    .open_stream(attempt, move || drain.spawn("stream", task).abort_handle());
            }
            Action::Abort { attempt, rid } => self.abort(attempt, rid),
            Action::DropStream { attempt } => self.shared.drop_stream(attempt),
            Action::CheckEngine => self.shared.check_engine.notify_one(),
            Action::Call(call) => self.call(call),
            Action::LoadWeights { directory, label } => self.load_weights(directory, label),
            Action::Probe => self.probe(),
            Action::Fetch(order) => self.fetch(*order),
            Action::CancelFetch { order } => {
                if let Some(cancel) = self.fetches.remove(&order) {
                    cancel.cancel();
                }
            }
            Action::KeepStaged { version, directory } => self.weights.keep(version, &directory),
            Action::Exit(_) => {}
        }
    }

    /// Repeats an abort until the stream of the attempt ends.
    fn abort(&self, attempt: AttemptId, rid: String) {
        let (shared, engine, aborts) =
            (self.shared.clone(), self.engine.clone(), self.aborts.clone());
        self.drain.spawn("abort", async move {
            while shared.is_open(attempt) {
                let permit = aborts.acquire().await;
                let answered = engine.abort(&rid).await;
                drop(permit);
                if let Err(error) = answered {
                    tracing::debug!(rid, %error, "abort");
                    shared.check_engine.notify_one();
                }
                sleep(ABORT_AGAIN).await;
            }
        });
    }

    fn call(&self, call: Call) {
        let (shared, engine) = (self.shared.clone(), self.engine.clone());
        self.drain.spawn("engine call", async move {
            let result = calls::call(&shared, &*engine, call).await;
            let result = result.map_err(|error| error.to_string());
            shared.handle(Event::Called { call, result });
        });
    }

    fn load_weights(&self, directory: std::path::PathBuf, label: String) {
        let (shared, engine) = (self.shared.clone(), self.engine.clone());
        self.drain.spawn("load", async move {
            let began = tokio::time::Instant::now();
            let result = engine.load(&directory, &label).await;
            tracing::debug!(label, took_ms = began.elapsed().as_millis() as u64, "load call");
            let result = result.map_err(|error| error.to_string());
            shared.handle(Event::Called { call: Call::Load, result });
        });
    }

    fn probe(&self) {
        let (shared, engine) = (self.shared.clone(), self.engine.clone());
        let weights = self.weights.clone();
        self.drain.spawn("probe", async move {
            let result = match weights.loaded_as_verified() {
                Ok(()) => calls::probe(&*engine, shared.vocab()).await,
                Err(why) => Err(why),
            };
            shared.handle(Event::Probed { result });
        });
    }

    fn fetch(&mut self, order: FetchOrder) {
        let cancel = CancellationToken::new();
        self.fetches.clear();
        self.fetches.insert(order.order, cancel.clone());
        let (shared, weights) = (self.shared.clone(), self.weights.clone());
        self.drain.spawn("fetch", async move {
            let id = order.order;
            let heard = shared.clone();
            let progress = Arc::new(move |so_far| {
                heard.handle(Event::FetchProgressed { order: id, so_far });
            });
            let result = weights.fetch(&order, progress, cancel).await;
            shared.handle(Event::Fetched { order: id, result });
        });
    }

    /// Closes the link after its last messages arrived.
    async fn close_link(&mut self) {
        let Some(handle) = self.link.take() else { return };
        handle.finish(LAST_MESSAGES).await;
    }
}
