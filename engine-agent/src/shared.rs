//! The core behind its lock, and the way to wake the driver. Streams hand tokens over right here,
//! without a hop through the driver: the lock is held for a copy of some hundred bytes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use anabranch_runtime::{Clock, Now};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::core::{Action, AfterChunk, Core, Event};
use crate::engine::{AttemptId, Chunk};

/// State that the tasks of one agent share.
pub struct Shared {
    /// The clock of the process.
    pub clock: Clock,
    inner: Mutex<Inner>,
    /// Wakes the driver before its next timeout.
    pub wake: Notify,
    /// Asks the watcher to look at the engine now.
    pub check_engine: Notify,
    /// Number of chunks of all streams: the count stands still once the streams are quiet.
    pub chunks: AtomicU64,
    streams: Mutex<BTreeMap<AttemptId, AbortHandle>>,
}

struct Inner {
    core: Core,
    /// Time until which the driver sleeps.
    sleeps_until: Option<Now>,
}

impl Shared {
    /// Shares `core`.
    pub fn new(core: Core, clock: Clock) -> Shared {
        Shared {
            clock,
            inner: Mutex::new(Inner { core, sleeps_until: None }),
            wake: Notify::new(),
            check_engine: Notify::new(),
            chunks: AtomicU64::new(0),
            streams: Mutex::default(),
        }
    }

    /// Hands an event to the core.
    pub fn handle(&self, event: Event) {
        let now = self.clock.now();
        let mut inner = self.lock();
        inner.core.handle(now, event);
        self.wake_if_needed(&inner);
    }

    /// Hands a chunk to the core; the hot path.
    pub fn tokens(&self, attempt: AttemptId, chunk: &Chunk) -> AfterChunk {
        self.chunks.fetch_add(1, Ordering::Relaxed);
        let now = self.clock.now();
        let mut inner = self.lock();
        let verdict = inner.core.tokens(now, attempt, chunk);
        self.wake_if_needed(&inner);
        verdict
    }

    /// Fires due timers and hands all actions to the driver. Returns the time until which the
    /// driver sleeps.
    pub fn turn(&self, actions: &mut Vec<Action>) -> Option<Now> {
        let now = self.clock.now();
        let mut inner = self.lock();
        if inner.core.next_timeout().is_some_and(|at| at <= now) {
            inner.core.on_timeout(now);
        }
        actions.extend(std::iter::from_fn(|| inner.core.poll_action()));
        inner.sleeps_until = inner.core.next_timeout();
        inner.sleeps_until
    }

    /// The label that the engine must give its weights; `None` if that is not settled.
    pub fn expected_label(&self) -> Option<String> {
        self.lock().core.expected_label()
    }

    /// Size of the vocabulary; 0 if unknown.
    pub fn vocab(&self) -> u32 {
        self.lock().core.vocab()
    }

    /// Number of requests at the engine.
    pub fn streams_at_engine(&self) -> usize {
        self.lock().core.streams_at_engine()
    }

    /// Opens a stream. `start` spawns its task; the entry is there before the task can remove it.
    pub fn open_stream(&self, attempt: AttemptId, start: impl FnOnce() -> AbortHandle) {
        let mut streams = self.lock_streams();
        streams.insert(attempt, start());
    }

    /// True until the stream of an attempt ended.
    pub fn is_open(&self, attempt: AttemptId) -> bool {
        self.lock_streams().contains_key(&attempt)
    }

    /// Notes that a stream ended by itself.
    pub fn stream_ended(&self, attempt: AttemptId) {
        self.lock_streams().remove(&attempt);
    }

    /// Closes a stream from this side.
    pub fn drop_stream(&self, attempt: AttemptId) {
        if let Some(task) = self.lock_streams().remove(&attempt) {
            task.abort();
        }
    }

    fn wake_if_needed(&self, inner: &Inner) {
        let sooner = match (inner.core.next_timeout(), inner.sleeps_until) {
            (Some(next), Some(until)) => next < until,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if sooner || inner.core.has_actions() {
            self.wake.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no code panics while it holds this lock")
    }

    fn lock_streams(&self) -> MutexGuard<'_, BTreeMap<AttemptId, AbortHandle>> {
        self.streams.lock().expect("no code panics while it holds this lock")
    }
}
