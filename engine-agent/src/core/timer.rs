//! Deadlines of the core: every wait is one of these timers.

/// Name of a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// The open tick is to be sealed.
    Tick,
    /// The next beat is due, every third of the lease.
    Beat,
    /// The manager said nothing for a whole lease.
    LinkSilent,
    /// The manager is to be dialled again.
    Redial,
    /// The manager did not take the tokens of the engine's former life in time: attach without
    /// them.
    Rejoin,
    /// The deadline of the load order passed.
    LoadDeadline,
    /// Streams that were told to end for a load have not ended in time.
    Quiesce,
    /// The drain is to abort what still runs.
    DrainCut,
    /// The drain gives up: the agent leaves, whatever is left.
    DrainGiveUp,
    /// The deadline of a release of memory passed.
    MemoryDeadline,
}
