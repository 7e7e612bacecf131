//! A host: what it holds, and, while it receives, the real queue with its streams.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use anabranch_manager::weights::plan::Feed;
use anabranch_transfer::chunks::ChunkSet;
use anabranch_transfer::queue::ChunkQueue;

/// One host.
pub(super) struct Node {
    pub life: Life,
    /// True if the host is a late joiner.
    pub late: bool,
    pub rate: u64,
    pub held: ChunkSet,
    pub fetch: Option<Fetch>,
    /// Watchers of what the node receives: (host, source).
    pub watchers: BTreeSet<(usize, usize)>,
    pub feed: Option<Feed>,
    /// Time in seconds at which the host joined.
    pub joined: f64,
    pub done: Option<f64>,
    pub received: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// The host has not joined.
    NotYet,
    Up,
    /// Nothing answers for the host, and nobody hears of it.
    Cut,
    Dead,
}

/// A fetch in progress.
pub(super) struct Fetch {
    pub queue: ChunkQueue,
    /// Hosts in the order of the plan.
    pub sources: Vec<usize>,
    pub streams: BTreeMap<usize, Stream>,
    pub window: usize,
}

/// State of one stream, as in the receiver's driver: greeted, then as many chunks asked ahead as the window allows.
pub(super) enum Stream {
    /// The stream waits for the queue to give it a source.
    Idle,
    /// The stream has dialled its source; answers to an earlier `attempt` are not for it.
    Greeting {
        source: usize,
        attempt: u64,
    },
    Bound {
        source: usize,
        asked: VecDeque<u32>,
        attempt: u64,
    },
}

impl Node {
    /// A host that holds nothing.
    pub fn new(rate: u64, chunks: u32, late: bool) -> Self {
        Self {
            life: Life::NotYet,
            late,
            rate,
            held: ChunkSet::empty(chunks),
            fetch: None,
            watchers: BTreeSet::new(),
            feed: None,
            joined: 0.0,
            done: None,
            received: 0.0,
        }
    }
}

impl Stream {
    /// Index of the source, if there is one.
    pub fn source(&self) -> Option<usize> {
        match self {
            Stream::Idle => None,
            Stream::Greeting { source, .. } | Stream::Bound { source, .. } => Some(*source),
        }
    }
}
