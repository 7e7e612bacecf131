//! Groups of tasks. A [`Drain`] starts tasks, tells them all to stop, and names those that do not.
//! Every task of the project is started through a drain; what a task does when told to stop is its
//! own business.
//!
//! ```text
//!   Open ── close(deadline) ──► Closing{deadline} ── all ended, or deadline passed ──► Closed
//! ```

use std::collections::BTreeMap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// Progress of a [`Drain`]; the graph is in the module's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Tasks run and may be started.
    Open,
    /// Tasks were told to stop.
    Closing {
        /// Longest time that [`Drain::close`] waits.
        deadline: Duration,
    },
    /// [`Drain::close`] returned.
    Closed,
}

/// Tasks that had not ended when the deadline of [`Drain::close`] passed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("still running {waited:?} after they were told to stop: {}", summary(.names))]
pub struct StillRunning {
    /// One name per task, oldest first.
    pub names: Vec<&'static str>,
    /// Time waited: the deadline of [`Drain::close`].
    pub waited: Duration,
}

/// A group of tasks that stop together. Clones are the same group.
#[derive(Clone, Debug)]
pub struct Drain {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    tracker: TaskTracker,
    token: CancellationToken,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    next_id: u64,
    running: BTreeMap<u64, &'static str>,
}

// === impl Drain ===

impl Drain {
    /// An open group without tasks.
    pub fn new() -> Drain {
        Drain::with_token(CancellationToken::new())
    }

    /// A new group that is told to stop when this one is, but not the reverse.
    pub fn child(&self) -> Drain {
        Drain::with_token(self.shared.token.child_token())
    }

    /// Starts `task` under `name`. A panic is logged as an error, and the handle returns it.
    pub fn spawn<F>(&self, name: &'static str, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let entry = self.enter(name);
        let task = async move {
            let _entry = entry;
            match AssertUnwindSafe(task).catch_unwind().await {
                Ok(output) => output,
                Err(panic) => {
                    tracing::error!(task = name, message = panic_text(&*panic), "task panicked");
                    resume_unwind(panic)
                }
            }
        };
        #[allow(clippy::disallowed_methods)]
        tokio::spawn(self.shared.tracker.track_future(task.in_current_span()))
    }

    /// Resolves when tasks are to stop.
    pub async fn cancelled(&self) {
        self.shared.token.cancelled().await;
    }

    /// True once tasks are to stop.
    pub fn is_cancelled(&self) -> bool {
        self.shared.token.is_cancelled()
    }

    /// The token behind the group: cancelling it tells all tasks to stop, without waiting for them.
    pub fn token(&self) -> CancellationToken {
        self.shared.token.clone()
    }

    /// The present phase.
    pub fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Names of the tasks that run now, oldest first.
    pub fn running(&self) -> Vec<&'static str> {
        self.lock().running.values().copied().collect()
    }

    /// Tells every task to stop and waits for all of them, `deadline` at most. Tasks that remain
    /// are named in the error, not killed: only their owner knows what they hold.
    pub async fn close(&self, deadline: Duration) -> Result<(), StillRunning> {
        self.lock().phase = Phase::Closing { deadline };
        self.shared.token.cancel();
        self.shared.tracker.close();
        let ended = tokio::time::timeout(deadline, self.shared.tracker.wait()).await;
        self.lock().phase = Phase::Closed;
        match ended {
            Ok(()) => Ok(()),
            Err(_) => Err(StillRunning { names: self.running(), waited: deadline }),
        }
    }

    fn with_token(token: CancellationToken) -> Drain {
        let state = State { phase: Phase::Open, next_id: 0, running: BTreeMap::new() };
        let shared = Shared { tracker: TaskTracker::new(), token, state: Mutex::new(state) };
        Drain { shared: Arc::new(shared) }
    }

    fn enter(&self, name: &'static str) -> Entry {
        let mut state = self.lock();
        if state.phase == Phase::Closed {
            tracing::warn!(task = name, "started after shutdown; nothing waits for it");
        }
        let id = state.next_id;
        state.next_id += 1;
        state.running.insert(id, name);
        Entry { shared: self.shared.clone(), id }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }
}

impl Default for Drain {
    fn default() -> Self {
        Drain::new()
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds this lock")
    }
}

/// A running task's line in the list of names; gone when the task ends, however it ends.
struct Entry {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.shared.lock().running.remove(&self.id);
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(not text)")
}

/// Names with counts, as in `a, b x3`: thousands of connections must not fill a log line.
fn summary(names: &[&'static str]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    let parts: Vec<String> = counts
        .into_iter()
        .map(|(name, n)| if n == 1 { name.to_string() } else { format!("{name} x{n}") })
        .collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn close_waits_for_tasks_that_heed_the_signal() {
        let drain = Drain::new();
        let inner = drain.clone();
        let task = drain.spawn("polite", async move {
            inner.cancelled().await;
            7
        });
        assert_eq!(drain.running(), ["polite"]);
        assert_eq!(drain.close(Duration::from_secs(5)).await, Ok(()));
        assert_eq!(task.await.expect("ended"), 7);
        assert_eq!(drain.phase(), Phase::Closed);
    }

    #[tokio::test]
    async fn close_names_the_task_that_is_stuck() {
        let drain = Drain::new();
        drain.spawn("stuck", std::future::pending::<()>());
        drain.spawn("stuck", std::future::pending::<()>());
        drain.spawn("quick", async {});
        let error = drain.close(Duration::from_millis(30)).await.expect_err("one is stuck");
        assert_eq!(error.names, ["stuck", "stuck"]);
        assert_eq!(error.to_string(), "still running 30ms after they were told to stop: stuck x2");
    }

    #[tokio::test]
    async fn a_panic_ends_the_task_and_shows_in_its_handle() {
        let drain = Drain::new();
        let task = drain.spawn("doomed", async { panic!("as planned") });
        let error = task.await.expect_err("it panicked");
        assert!(error.is_panic());
        assert!(drain.running().is_empty());
        drain.close(Duration::from_secs(1)).await.expect("nothing left");
    }

    #[tokio::test]
    async fn an_aborted_task_leaves_the_list() {
        let drain = Drain::new();
        let task = drain.spawn("aborted", std::future::pending::<()>());
        task.abort();
        assert!(task.await.expect_err("aborted").is_cancelled());
        assert!(drain.running().is_empty());
    }

    #[tokio::test]
    async fn a_child_stops_with_its_parent_but_not_the_reverse() {
        let parent = Drain::new();
        let child = parent.child();
        child.token().cancel();
        assert!(!parent.is_cancelled());
        let other = parent.child();
        parent.token().cancel();
        other.cancelled().await;
    }
}
