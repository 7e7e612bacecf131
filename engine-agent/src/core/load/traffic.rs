//! Rates of a fetch: bytes received, and bytes served on to peers meanwhile. The manager ranks
//! hosts by them. Pure.

use std::time::Duration;

use anabranch_runtime::Now;

use crate::core::event::Moved;

/// Shortest span that a rate is measured over: shorter spans say more about buffers than about the
/// network.
const WINDOW: Duration = Duration::from_millis(250);

/// Rates of one fetch.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    ingress: Peak,
    egress: Peak,
    /// Bytes served to peers so far.
    pub served_bytes: u64,
}

/// Highest rate of any window, in bytes/s; 0 before the first window is over.
#[derive(Clone, Debug, Default)]
struct Peak {
    bytes_per_s: u64,
    window: Option<(Now, u64)>,
}

// === impl Traffic ===

impl Traffic {
    /// Takes the totals at `now`.
    pub fn moved(&mut self, now: Now, so_far: Moved) {
        self.ingress.count(now, so_far.received_bytes);
        self.egress.count(now, so_far.served_bytes);
        self.served_bytes = so_far.served_bytes;
    }

    /// Highest rate received, in bytes/s.
    pub fn ingress(&self) -> u64 {
        self.ingress.bytes_per_s
    }

    /// Highest rate served, in bytes/s.
    pub fn egress(&self) -> u64 {
        self.egress.bytes_per_s
    }
}

// === impl Peak ===

impl Peak {
    fn count(&mut self, now: Now, bytes: u64) {
        let (began, before) = *self.window.get_or_insert((now, bytes));
        let span = now.since(began);
        if span < WINDOW {
            return;
        }
        let rate = u128::from(bytes.saturating_sub(before)) * 1_000_000 / span.as_micros();
        self.bytes_per_s = self.bytes_per_s.max(u64::try_from(rate).unwrap_or(u64::MAX));
        self.window = Some((now, bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_of_whole_windows_and_what_was_there_before_does_not_count() {
        let mut traffic = Traffic::default();
        let mut at = |ms, received_bytes, served_bytes| {
            traffic.moved(Now::from_millis(ms), Moved { bytes: 0, received_bytes, served_bytes });
            (traffic.ingress(), traffic.egress())
        };
        assert_eq!(at(100, 5_000_000, 70), (0, 0));
        assert_eq!(at(300, 5_900_000, 70), (0, 0), "a burst within a window");
        assert_eq!(at(350, 6_000_000, 70), (4_000_000, 0));
        assert_eq!(at(850, 6_500_000, 500_070), (4_000_000, 1_000_000));
        assert_eq!(traffic.served_bytes, 500_070);
    }
}
