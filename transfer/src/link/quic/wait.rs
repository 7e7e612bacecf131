//! Waiting for quinn on a thread of our own: a deadline, and a gate that another thread may shut. Needs
//! no runtime around the caller, so it works inside one as well.

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Ends the waits of one stream, now and later.
#[derive(Default)]
pub(super) struct Gate {
    shut: AtomicBool,
    waiting: Mutex<Option<Waker>>,
}

struct Parked {
    thread: Thread,
    woken: AtomicBool,
}

/// Polls until it is ready; `TimedOut` after `patience`, `ConnectionAborted` once the gate is shut.
pub(super) fn wait<T>(
    gate: &Gate,
    patience: Duration,
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<io::Result<T>>,
) -> io::Result<T> {
    let until = Instant::now().checked_add(patience);
    let parked = Arc::new(Parked { thread: std::thread::current(), woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&parked));
    *gate.lock() = Some(waker.clone());
    let mut context = Context::from_waker(&waker);
    loop {
        if gate.shut.load(Ordering::Acquire) {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        if let Poll::Ready(done) = poll(&mut context) {
            return done;
        }
        parked.sleep(until)?;
    }
}

// === impl Gate ===

impl Gate {
    pub(super) fn shut(&self) {
        self.shut.store(true, Ordering::Release);
        if let Some(waiting) = &*self.lock() {
            waiting.wake_by_ref();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Waker>> {
        self.waiting.lock().expect("held only to look and note")
    }
}

// === impl Parked ===

impl Parked {
    fn sleep(&self, until: Option<Instant>) -> io::Result<()> {
        while !self.woken.swap(false, Ordering::AcqRel) {
            let Some(until) = until else {
                std::thread::park();
                continue;
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            std::thread::park_timeout(left);
        }
        Ok(())
    }
}

impl Wake for Parked {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn what_is_never_ready_ends_by_its_deadline() {
        let gate = Gate::default();
        let waited = wait::<()>(&gate, Duration::from_millis(20), |_| Poll::Pending);
        assert_eq!(waited.expect_err("late").kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn a_shut_gate_ends_a_wait_and_all_later_ones() {
        let gate = Gate::default();
        std::thread::scope(|s| {
            let waiting = s.spawn(|| wait::<()>(&gate, LONG, |_| Poll::Pending));
            gate.shut();
            let ended = waiting.join().expect("no panic").expect_err("shut");
            assert_eq!(ended.kind(), ErrorKind::ConnectionAborted);
        });
        assert!(wait(&gate, LONG, |_| Poll::Ready(Ok(()))).is_err());
    }

    #[test]
    fn another_thread_wakes_the_wait() {
        let (gate, shelf) = (Gate::default(), Mutex::new(None::<Waker>));
        let ready = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                let waker = loop {
                    if let Some(waker) = shelf.lock().expect("shelf").take() {
                        break waker;
                    }
                    std::thread::yield_now();
                };
                ready.store(true, Ordering::Release);
                waker.wake();
            });
            let waited = wait(&gate, LONG, |cx| {
                if ready.load(Ordering::Acquire) {
                    return Poll::Ready(Ok(7));
                }
                *shelf.lock().expect("shelf") = Some(cx.waker().clone());
                Poll::Pending
            });
            assert_eq!(waited.expect("woken"), 7);
        });
    }
}
