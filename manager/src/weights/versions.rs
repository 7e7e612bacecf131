//! Weight versions: which exist, who has them, and which one is current.
//!
//! ```text
//! Announced ──seal──▶ Available ──(nobody is made too old)──▶ Current ──next──▶ Superseded ──no holder──▶ Retired
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

pub use anabranch_proto::VersionState;
use anabranch_proto::{EngineId, Root, SessionId, Version};
use anabranch_runtime::clock::Now;

use crate::event::{LoadStage, PublisherId};

pub(crate) struct VersionRecord {
    pub version: Version,
    pub state: VersionState,
    /// How many processes publish it together: one, or as many as the first of them said.
    pub of: u32,
    /// Those that came, by their number. The trainer, where nothing tells them apart.
    pub senders: BTreeMap<u32, Sender>,
    pub directory: Option<String>,
    pub bytes: u64,
    pub sealed: Option<Now>,
    pub settled: bool,
    /// How each engine got on with it, since the seal.
    pub engines: BTreeMap<EngineId, Progress>,
}

/// One process that publishes a version, with all of its chunks or a part of them.
pub(crate) struct Sender {
    /// While it serves the version.
    pub publisher: Option<PublisherId>,
    /// Where it can be fetched now.
    pub addresses: Vec<String>,
    /// It cannot be dialled; told to, it dials receivers.
    pub dials: bool,
    pub part: bool,
    pub session: SessionId,
    pub serve_key: [u8; 32],
    /// Once it has sealed.
    pub root: Option<Root>,
}

impl VersionRecord {
    /// Who has no engine to get it from may get it all the same.
    pub fn is_offered(&self) -> bool {
        self.directory.is_some() || self.at_trainer()
    }

    /// What its senders serve now is all of it.
    pub fn at_trainer(&self) -> bool {
        let mut serve = self.senders.values().filter(|sender| sender.serves());
        serve.clone().any(|sender| !sender.part) || serve.by_ref().count() == self.of as usize
    }

    /// One of them gives only to those that it can dial.
    pub fn dials(&self) -> bool {
        self.senders.values().any(|sender| sender.dials)
    }

    pub fn is_served(&self) -> bool {
        self.publishers().next().is_some()
    }

    pub fn publishers(&self) -> impl Iterator<Item = PublisherId> {
        self.senders.values().filter_map(|sender| sender.publisher)
    }

    pub fn sender_of(&mut self, publisher: PublisherId) -> Option<(u32, &mut Sender)> {
        let mut senders = self.senders.iter_mut();
        let (index, sender) = senders.find(|(_, s)| s.publisher == Some(publisher))?;
        Some((*index, sender))
    }

    /// All of them came, and sealed.
    pub fn is_sealed(&self) -> bool {
        let sealed = self.senders.values().filter(|sender| sender.root.is_some());
        sealed.count() == self.of as usize
    }
}

impl Sender {
    pub fn serves(&self) -> bool {
        self.dials || !self.addresses.is_empty()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Progress {
    pub stage: LoadStage,
    pub bytes: u64,
    pub since_sealed: Duration,
    pub error: String,
    /// Planned, by stripe.
    pub parents: Vec<String>,
    pub fetched_from: BTreeMap<String, u64>,
    /// Bytes to peers.
    pub served: u64,
}

impl Progress {
    pub fn at(stage: LoadStage) -> Self {
        Self {
            stage,
            bytes: 0,
            since_sealed: Duration::ZERO,
            error: String::new(),
            parents: Vec::new(),
            fetched_from: BTreeMap::new(),
            served: 0,
        }
    }

    /// Without what the order alone knows.
    pub fn of(load: &crate::fleet::Load) -> Self {
        Self {
            bytes: load.bytes,
            error: load.error.clone(),
            fetched_from: load.fetched_from.clone(),
            served: load.served,
            ..Self::at(load.stage)
        }
    }
}

#[derive(Default)]
pub(crate) struct Versions {
    /// By number, within the job's epoch.
    records: BTreeMap<u64, VersionRecord>,
}

/// A version cannot be announced.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotNewer {
    #[error(
        "version {number} is not newer than {newest}, the newest of epoch {epoch}; publish a higher number, or \
         open the job with a higher epoch if the trainer was restarted from an older checkpoint"
    )]
    Regression { number: u64, newest: u64, epoch: u32 },
    #[error("number 0 is reserved for the weights that engines start with; begin at 1")]
    Zero,
}

/// Versions older than this many are forgotten once superseded; pinned groups keep theirs.
const KEPT: usize = 16;

impl Versions {
    pub fn check(&self, version: Version) -> Result<(), NotNewer> {
        let newest = self.records.keys().next_back().copied().unwrap_or(0);
        match version.number {
            0 => Err(NotNewer::Zero),
            number if number <= newest => {
                Err(NotNewer::Regression { number, newest, epoch: version.epoch })
            }
            _ => Ok(()),
        }
    }

    pub fn insert(&mut self, record: VersionRecord) {
        self.records.insert(record.version.number, record);
        while self.records.len() > KEPT {
            let oldest = self
                .records
                .iter()
                .find(|(_, r)| matches!(r.state, VersionState::Superseded | VersionState::Retired));
            let Some((&number, _)) = oldest else { break };
            self.records.remove(&number);
        }
    }

    pub fn get(&self, number: u64) -> Option<&VersionRecord> {
        self.records.get(&number)
    }

    /// By number and root: another epoch's version of the same number is another version.
    pub fn find(&self, version: Version) -> Option<&VersionRecord> {
        self.records.get(&version.number).filter(|record| record.version == version)
    }

    pub fn get_mut(&mut self, number: u64) -> Option<&mut VersionRecord> {
        self.records.get_mut(&number)
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &VersionRecord> {
        self.records.values()
    }

    pub fn iter_mut(&mut self) -> impl DoubleEndedIterator<Item = &mut VersionRecord> {
        self.records.values_mut()
    }

    /// If this publisher announced it.
    pub fn of_publisher(
        &mut self,
        publisher: PublisherId,
        number: u64,
    ) -> Option<&mut VersionRecord> {
        let record = self.records.get_mut(&number)?;
        record.sender_of(publisher).is_some().then_some(record)
    }

    /// The newest sealed version that is waiting to become current.
    pub fn pending(&self) -> Option<Version> {
        let waits = |r: &&VersionRecord| r.state == VersionState::Available;
        self.records.values().rev().find(waits).map(|record| record.version)
    }

    /// An announced version whose trainer went away is no version.
    pub fn remove(&mut self, number: u64) {
        self.records.remove(&number);
    }
}
