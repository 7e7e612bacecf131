//! What every handler of a call needs, and how session numbers look on the wire.

use std::sync::Arc;

use anabranch_proto::SessionId;
use anabranch_runtime::{Clock, Drain};

use crate::auth::Auth;
use crate::driver::inbox::Inbox;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::notices::Notices;

pub(crate) struct Gate {
    pub inbox: Inbox,
    pub ledger: Arc<Ledger>,
    pub notices: Arc<Notices>,
    pub metrics: Arc<Metrics>,
    pub auth: Auth,
    pub life: Life,
    pub drain: Drain,
    pub clock: Clock,
    /// When the driver's loop last turned, for readiness.
    pub pulse: Arc<Pulse>,
}

/// One life of the manager's memory. Sessions carry it on the wire, so that a peer of an earlier life is
/// never taken for one of this, and so that no session can be guessed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Life {
    pub epoch: u64,
}

/// Room for the sessions of one life; the rest of the 64 bits is the life's own.
const SESSION_BITS: u32 = 40;

impl Life {
    pub fn new(secret: &[u8; 32]) -> Self {
        let hash = blake3::derive_key("anabranch 2026 manager epoch", secret);
        let epoch = u64::from_le_bytes(hash[..8].try_into().expect("32 bytes"));
        // Never 0, which means "none" on the wire.
        Self { epoch: epoch | 1 << 63 }
    }

    pub fn to_wire(self, session: SessionId) -> u64 {
        self.mark() | (session.0 & ((1 << SESSION_BITS) - 1))
    }

    pub fn from_wire(self, wire: u64) -> Option<SessionId> {
        let session = wire ^ self.mark();
        (session >> SESSION_BITS == 0).then_some(SessionId(session))
    }

    fn mark(self) -> u64 {
        self.epoch >> SESSION_BITS << SESSION_BITS
    }
}

/// When the driver's loop last turned.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    /// In ms of the clock, from 1; 0: it does not run.
    at_ms: std::sync::atomic::AtomicU64,
}

impl Pulse {
    /// A loop that has not turned for so long is stuck.
    const STALE_MS: u64 = 2_000;

    pub fn beat(&self, clock: &Clock) {
        self.at_ms.store(clock.now().as_millis() + 1, std::sync::atomic::Ordering::Relaxed);
    }

    pub fn stop(&self) {
        self.at_ms.store(0, std::sync::atomic::Ordering::Relaxed);
    }

    pub fn is_alive(&self, clock: &Clock) -> bool {
        let at = self.at_ms.load(std::sync::atomic::Ordering::Relaxed);
        at != 0 && clock.now().as_millis() < at + Self::STALE_MS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_of_another_life_is_not_recognised() {
        let (mine, other) = (Life::new(&[1; 32]), Life::new(&[2; 32]));
        let wire = mine.to_wire(SessionId(7));
        assert_eq!(mine.from_wire(wire), Some(SessionId(7)));
        assert_eq!(other.from_wire(wire), None);
        assert_eq!(mine.from_wire(7), None);
        assert_eq!(mine.from_wire(0), None);
    }
}
