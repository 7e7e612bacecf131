//! Every deadline of the deciding core: one enum, one table. Nothing waits in a hidden sleep.

use anabranch_proto::{GroupId, SessionId, Step};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// No byte from an agent for a whole lease.
    Lease(SessionId),
    /// A suspect engine did not come back: its samples move.
    Reattach(SessionId),
    /// An engine that was busy or silent may get work again.
    Rested(SessionId),
    /// A draining engine's time is up.
    Drain(SessionId),
    /// A quarantined engine may serve again.
    Quarantine(SessionId),
    /// A load order took too long.
    Load(SessionId),
    /// A failed load is ordered again.
    LoadRetry(SessionId),
    /// Loads that did not fit into the turn before are ordered.
    Orders,
    /// The publishers of a version are told how it stands.
    Tidings(u64),
    /// Siblings stop waiting for their leader's first token.
    Leader(GroupId),
    /// A group's own deadline.
    Group(GroupId),
    /// A partial micro-batch has waited long enough.
    Flush(Step),
    /// The mode switch answers now, whatever is still missing.
    ModeSwitch,
    /// No trainer for `on_trainer_lost`.
    TrainerLost,
}
