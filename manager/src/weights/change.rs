//! Change: one durable fact of a lineage of versions, in plain ids and numbers.

use anabranch_proto::{Root, SessionId, Version, VersionState};

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    /// A new epoch, or another job: earlier versions are no versions any more.
    Begun { epoch: u32 },
    /// A version was named; its root is not known yet.
    Announced { version: Version, of: u32, bytes: u64 },
    /// How many processes publish a version together, and the directory that has it, if any.
    Described { number: u64, of: u32, directory: Option<String> },
    /// Every sender has sealed: the root is known.
    Sealed { number: u64, root: Root },
    /// A version moved along the edges of its graph.
    Moved { number: u64, to: VersionState },
    /// This version is current.
    Current { version: Version },
    /// Every attached engine serves the version.
    Settled { number: u64 },
    /// An announced version whose senders all went away is no version.
    Removed { number: u64 },
    /// An engine can serve the version to peers.
    Holds { session: SessionId, version: Version },
    /// An engine does not hold the version any more.
    LetGo { session: SessionId, version: Version },
}
