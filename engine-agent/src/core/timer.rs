//! Every deadline of the core.

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// Close the open tick.
    Tick,
    /// Every third of the lease.
    Beat,
    /// The manager said nothing for a lease.
    LinkSilent,
    Redial,
    /// The manager did not take what the engine's former life made; attach without.
    Rejoin,
    /// Of the load order.
    LoadDeadline,
    /// Streams that were told to end for a load must have ended.
    Quiesce,
    /// Time to abort what still runs.
    DrainCut,
    /// Time to leave, whatever is left.
    DrainGiveUp,
    /// Memory must be free by now.
    MemoryDeadline,
}
