//! Tries of one call or stream: a back-off between them, a deadline over all of them.

use std::time::Duration;

use anabranch_runtime::{Backoff, BackoffConfig};
use tokio::time::Instant;

use crate::error::Error;

/// Short at first: most losses are a restart of the manager on the same machine.
const RETRY: BackoffConfig =
    BackoffConfig { first: Duration::from_millis(100), max: Duration::from_secs(3), factor: 2.0 };

/// A series of tries that must succeed within a time.
///
/// ```text
///   trying ── failed ──► pausing ── delay over ──► trying
///      │                    └── time is up ──► Error::Unreachable
///      └── succeeded ──► reset: the next loss has a deadline of its own
/// ```
#[derive(Debug)]
pub(crate) struct Tries {
    call: &'static str,
    started: Instant,
    within: Duration,
    backoff: Backoff,
}

// === impl Tries ===

impl Tries {
    /// Tries of `call`, all of them within `within` from now.
    pub(crate) fn new(call: &'static str, within: Duration) -> Self {
        let backoff = Backoff::new(RETRY).expect("the bounds are constants and sound");
        Self { call, started: Instant::now(), within, backoff }
    }

    /// True if nothing failed since the last success.
    pub(crate) fn is_first(&self) -> bool {
        self.backoff.tries() == 0
    }

    /// Time until the deadline.
    pub(crate) fn left(&self) -> Duration {
        self.within.saturating_sub(self.started.elapsed())
    }

    /// Starts the deadline and the back-off again, after a success.
    pub(crate) fn reset(&mut self) {
        self.started = Instant::now();
        self.backoff.reset();
    }

    /// Waits before the next try; an error if the deadline comes first. `detail` tells what failed.
    pub(crate) async fn pause(&mut self, detail: &str) -> Result<(), Error> {
        let delay = self.backoff.next_delay();
        if delay >= self.left() {
            let (call, within) = (self.call, self.within);
            return Err(Error::Unreachable { call, within, detail: detail.to_owned() });
        }
        tracing::debug!(call = self.call, ?delay, detail, "trying again");
        tokio::time::sleep(delay).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tries_end_at_the_deadline_with_the_last_detail() {
        let started = Instant::now();
        let mut tries = Tries::new("submit", Duration::from_secs(10));
        let error = loop {
            if let Err(error) = tries.pause("refused").await {
                break error.to_string();
            }
        };
        assert!(error.contains("for submit within 10s: refused"), "{error}");
        assert!(started.elapsed() <= Duration::from_secs(10));
        assert!(started.elapsed() >= Duration::from_secs(6), "the last pause is 3 s at most");
    }

    #[tokio::test(start_paused = true)]
    async fn a_success_starts_deadline_and_back_off_again() {
        let mut tries = Tries::new("consume", Duration::from_secs(1));
        assert!(tries.is_first());
        tries.pause("lost").await.expect("time is left");
        assert!(!tries.is_first());
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(tries.pause("lost").await.is_err());
        tries.reset();
        assert!(tries.is_first());
        assert_eq!(tries.left(), Duration::from_secs(1));
        tries.pause("lost").await.expect("a new deadline");
    }
}
