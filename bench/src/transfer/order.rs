//! Orders of the bench to a node, and their answers: one JSON object per line, over stdin and stdout. Owns the words
//! only.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use anabranch_proto::version::{Root, Version};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One order, with the number that its answer repeats.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    /// Number of the order.
    pub id: u64,
    /// The order.
    pub order: Order,
}

/// An order to a node.
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
    /// Computes the digest of all tensors of the version fetched last, from the bytes in the staged file.
    Digest,
    /// Releases the staged versions, so that their slots can be used again.
    Release,
    /// Opens a job at a manager, as its trainer, and expects so many engines.
    Open { manager: String, engines: usize },
    /// Publishes through the SDK: answers with an [`Activated`] once all engines have it.
    PublishToEngines(Publish),
    /// Reads the counters of the process: answers with a [`Usage`].
    Usage,
    /// Hashes so many bytes on one thread: answers with the CPU time in nanoseconds.
    Hash { bytes: u64 },
    /// Serves so many bytes to one [`Order::RawFetch`] after the other: answers with a [`Listening`].
    RawServe { bytes: u64 },
    /// Receives without verifying: answers with a [`RawFetched`].
    RawFetch { addr: String, bytes: u64, streams: usize },
}

/// Settings of a receiver.
#[derive(Debug, Serialize, Deserialize)]
pub struct Receive {
    /// Key that grants are checked with, as 64 hex digits.
    pub key: String,
    /// Name of the job.
    pub job: String,
    /// Address at which others reach this host; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Folder of the staging area.
    pub staging: PathBuf,
    /// Time without a byte, in milliseconds, after which a stream is given up.
    pub progress_ms: u64,
}

/// Settings of a trainer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Train {
    /// Key that grants are checked with, as 64 hex digits.
    pub key: String,
    /// Name of the job.
    pub job: String,
    /// Address at which receivers reach the trainer.
    pub listen: SocketAddr,
    /// Epoch of its versions.
    pub epoch: u32,
    /// True if it makes deltas.
    pub delta: bool,
    /// Folder of names for the arena, so that receivers of this host share it.
    pub arena: Option<PathBuf>,
}

/// A version to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Publish {
    /// Number of the version.
    pub number: u64,
    /// Size of all tensors together, in bytes.
    pub bytes: u64,
    /// Seed of its content.
    pub seed: u64,
    /// Share of the elements that differ from the version before; if `None`, all are made anew.
    pub changed: Option<f64>,
}

/// A source of a fetch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Source {
    /// Name of the host.
    pub holder: String,
    /// Address of the host.
    pub addr: String,
    /// Grant for the version, in hex.
    pub grant: String,
    /// Stripes that the source serves.
    pub stripes: Vec<u32>,
    /// Stripes for which the source may stand in.
    pub fallback_for: Vec<u32>,
}

/// A version to fetch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fetch {
    /// The version.
    pub version: VersionId,
    /// Sources to fetch from.
    pub sources: Vec<Source>,
    /// Stripes that the image is cut into.
    pub stripe_count: u32,
    /// Parallel streams.
    pub streams: usize,
}

/// Name of a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionId {
    /// Epoch of the version.
    pub epoch: u32,
    /// Number of the version.
    pub number: u64,
    /// Root of the version, as 64 hex digits.
    pub root: String,
}

/// Answer of a node that serves.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listening {
    /// Addresses of the node.
    pub addrs: Vec<String>,
}

/// Answer to [`Order::Publish`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Issued {
    /// The version.
    pub version: VersionId,
    /// Size of the version's image.
    pub image_bytes: u64,
    /// Time until the tensors were copied, in milliseconds.
    pub copied_ms: f64,
    /// Time until the version was sealed, in milliseconds.
    pub sealed_ms: f64,
    /// Size of the delta, if one was made.
    pub delta_bytes: Option<u64>,
    /// Digest of all tensors, by name.
    pub digest: String,
    /// Share of the elements that really changed.
    pub changed_share: f64,
    /// Page faults of copy and seal: (minor, major).
    pub faults: (u64, u64),
}

/// Answer to [`Order::Fetch`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fetched {
    /// Duration of the fetch in milliseconds.
    pub took_ms: f64,
    /// Size of the image.
    pub bytes: u64,
    /// Bytes that did not come as chunks: they were here already, or came out of a delta.
    pub carried_bytes: u64,
    /// Bytes received of a delta.
    pub delta_bytes: u64,
    /// Bytes received, wrong and repeated chunks included.
    pub received_bytes: u64,
    /// Verified bytes by holder.
    pub bytes_by_holder: Vec<(String, u64)>,
    /// Streams and chunks that failed on the way.
    pub queue: Value,
    /// CPU time of the process during the fetch.
    pub cpu_ns: u64,
    /// Page faults during the fetch: (minor, major).
    pub faults: (u64, u64),
    /// Folder that an engine would load.
    pub dir: PathBuf,
}

/// Answer to [`Order::PublishToEngines`]. Times are milliseconds since the publication began.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Activated {
    /// Time until the trainer's tensors were copied.
    pub copied_ms: f64,
    /// Time until the version was sealed.
    pub sealed_ms: f64,
    /// Time until every engine served the version.
    pub active_ms: f64,
    /// Share of the elements that really changed.
    pub changed_share: f64,
    /// Bytes over the trainer's link; filled in by the bench.
    pub trainer_link_bytes: u64,
}

/// Answer to [`Order::RawFetch`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RawFetched {
    /// Duration in milliseconds.
    pub took_ms: f64,
    /// CPU time of the process meanwhile.
    pub cpu_ns: u64,
}

/// Counters of a node's process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Usage {
    /// CPU time of all threads.
    pub cpu_ns: u64,
    /// Minor page faults of all threads.
    pub minor_faults: u64,
    /// Major page faults of all threads.
    pub major_faults: u64,
    /// Proportional share of all mappings except shared memory.
    pub private_bytes: u64,
    /// Memory files that the process has open, by name, mapped or not.
    pub memfd_bytes: BTreeMap<String, u64>,
    /// Bytes sent to receivers, by number of the version.
    pub sent_bytes: BTreeMap<u64, u64>,
}

/// A line from the node.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    /// Number of the order.
    pub id: u64,
    /// The answer.
    pub is: Answer,
}

/// Content of a reply.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Verified bytes so far; the outcome follows.
    Progress(u64),
    /// Outcome of an order that succeeded.
    Done(Value),
    /// Reason why an order failed.
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
    /// The version as the product has it. Fails if the root is not 64 hex digits.
    pub fn version(&self) -> anyhow::Result<Version> {
        let mut root = [0; 32];
        hex::decode_to_slice(&self.root, &mut root)?;
        Ok(Version { epoch: self.epoch, number: self.number, root: Root(root) })
    }
}
