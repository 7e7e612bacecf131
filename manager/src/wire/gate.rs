//! What every handler of a call needs, and how session numbers look on the wire.

use std::sync::Arc;

use anabranch_proto::SessionId;
use anabranch_runtime::{Clock, Drain};

use crate::ledger::Ledger;
use crate::view::metrics::Metrics;
use crate::view::notices::Notices;
use crate::wire::auth::Auth;
use crate::wire::inbox::Inbox;

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

/// One life of the manager's memory. On the wire a session carries a MAC of this life: a peer of an earlier
/// life is never taken for one of this, and nobody can guess another's session. So an agent's Data stream
/// needs no token of its own: only its Control stream was told the number.
#[derive(Clone, Copy)]
pub(crate) struct Life {
    pub epoch: u64,
    key: [u8; 32],
}

/// Room for the sessions of one life; the MAC has the rest.
const SESSION_BITS: u32 = 28;

impl Life {
    pub fn new(secret: &[u8; 32]) -> Self {
        let key = blake3::derive_key("anabranch 2026 sessions on the wire", secret);
        let hash = blake3::derive_key("anabranch 2026 manager epoch", secret);
        // Never 0, which means "none" on the wire.
        Self { epoch: first_word(&hash) | 1 << 63, key }
    }

    /// As it goes over the wire.
    pub fn mark(self, session: SessionId) -> u64 {
        debug_assert!(session.0 >> SESSION_BITS == 0, "a life has fewer sessions than that");
        self.mac(session.0) << SESSION_BITS | session.0
    }

    /// `None`: of another life, or made up.
    pub fn read(self, wire: u64) -> Option<SessionId> {
        let session = SessionId(wire & ((1 << SESSION_BITS) - 1));
        (self.mark(session) == wire).then_some(session)
    }

    fn mac(self, session: u64) -> u64 {
        first_word(blake3::keyed_hash(&self.key, &session.to_le_bytes()).as_bytes())
    }
}

fn first_word(hash: &[u8; 32]) -> u64 {
    u64::from_le_bytes(hash[..8].try_into().expect("32 bytes"))
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
        let wire = mine.mark(SessionId(7));
        assert_eq!(mine.read(wire), Some(SessionId(7)));
        assert_eq!(other.read(wire), None);
        assert_eq!(mine.read(7), None);
        assert_eq!(mine.read(0), None);
    }
}
