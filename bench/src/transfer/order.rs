//! What the bench tells a node to do and what it hears back: one JSON object per line, over stdin and stdout. Owns
//! the words only.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use anabranch_proto::version::{Root, Version};
use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    pub id: u64,
    pub order: Order,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Order {
    /// Starts to serve what is fetched: answers with a [`Listening`].
    Receive(Receive),
    /// Starts a trainer: answers with a [`Listening`].
    Train(Train),
    /// Makes the next version and publishes it: answers with an [`Issued`].
    Publish(Publish),
    /// Gets a version into the staging area: answers with a [`Fetched`].
    Fetch(Fetch),
    /// Digest of all tensors of the version fetched last, as they lie in the staged file, whatever the hashes were.
    Digest,
    /// Lets the staged versions go, so that their slots can be used again.
    Release,
    /// Opens a job at a manager, as its trainer; `engines` are expected.
    Open { manager: String, engines: usize },
    /// Publishes through the SDK: answers with an [`Activated`] once all engines have it.
    PublishToEngines(Publish),
    /// Counters of the process: answers with a [`Usage`].
    Usage,
    /// CPU time of hashing so many bytes on one thread, in nanoseconds.
    Hash { bytes: u64 },
    /// Serves as many bytes to one [`Order::RawFetch`] after the other: answers with a [`Listening`].
    RawServe { bytes: u64 },
    /// Receives without verifying: answers with a [`RawFetched`].
    RawFetch { addr: String, bytes: u64, streams: usize },
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Receive {
    pub key: String,
    pub job: String,
    /// The address that others reach this host at; port 0 lets the system choose.
    pub listen: SocketAddr,
    pub staging: PathBuf,
    /// A stream that moves no byte for so long is given up.
    pub progress_ms: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Train {
    pub key: String,
    pub job: String,
    pub listen: SocketAddr,
    pub epoch: u32,
    pub delta: bool,
    /// Names for the arena, so that receivers of this host share it.
    pub arena: Option<PathBuf>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Publish {
    pub number: u64,
    /// Size of all tensors together.
    pub bytes: u64,
    pub seed: u64,
    /// Share of the elements that differ from the version before; without it all are made anew.
    pub changed: Option<f64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Source {
    pub holder: String,
    pub addr: String,
    pub grant: String,
    pub stripes: Vec<u32>,
    pub fallback_for: Vec<u32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fetch {
    pub version: VersionId,
    pub sources: Vec<Source>,
    pub stripe_count: u32,
    pub streams: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionId {
    pub epoch: u32,
    pub number: u64,
    pub root: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listening {
    pub addrs: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Issued {
    pub version: VersionId,
    pub image_bytes: u64,
    pub copied_ms: f64,
    pub sealed_ms: f64,
    pub delta_bytes: Option<u64>,
    /// Digest of all tensors, by name.
    pub digest: String,
    pub changed_share: f64,
    /// Page faults while it was copied and sealed: minor, major.
    pub faults: (u64, u64),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fetched {
    pub took_ms: f64,
    pub bytes: u64,
    pub carried_bytes: u64,
    pub delta_bytes: u64,
    pub received_bytes: u64,
    pub bytes_by_holder: Vec<(String, u64)>,
    pub queue: Value,
    pub cpu_ns: u64,
    /// Page faults meanwhile: minor, major.
    pub faults: (u64, u64),
    /// What an engine would load.
    pub dir: PathBuf,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Activated {
    pub copied_ms: f64,
    pub sealed_ms: f64,
    pub active_ms: f64,
    pub changed_share: f64,
    /// Filled in by the bench.
    pub trainer_link_bytes: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RawFetched {
    pub took_ms: f64,
    pub cpu_ns: u64,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Usage {
    pub cpu_ns: u64,
    pub minor_faults: u64,
    pub major_faults: u64,
    /// Proportional share of all mappings but those of shared memory.
    pub private_bytes: u64,
    /// Memory files that this process has open, by name, mapped or not.
    pub memfd_bytes: BTreeMap<String, u64>,
    /// Sent to receivers, of each version that is lent, by its number.
    pub sent_bytes: BTreeMap<u64, u64>,
}

/// A line from the node.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    pub id: u64,
    pub is: Answer,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Verified bytes so far; the outcome follows.
    Progress(u64),
    Done(Value),
    Failed(String),
}

// === conversions ===

impl From<Version> for VersionId {
    fn from(version: Version) -> VersionId {
        let Version { epoch, number, root } = version;
        VersionId { epoch, number, root: hex::encode(root.0) }
    }
}

impl VersionId {
    pub fn version(&self) -> anyhow::Result<Version> {
        let mut root = [0; 32];
        hex::decode_to_slice(&self.root, &mut root)?;
        Ok(Version { epoch: self.epoch, number: self.number, root: Root(root) })
    }
}
