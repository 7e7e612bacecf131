//! Versions: which exist, who holds them, and which one is current. Durable; only `Books::apply` writes here,
//! but for each version's volatile part.
//!
//! ```text
//! Announced ──seal──▶ Available ──(nobody is made too old)──▶ Current ──next──▶ Superseded ──no holder──▶ Retired
//!                         └─────────────── a newer one is current ─────────────────▲
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub use anabranch_proto::VersionState;
use anabranch_proto::{EngineId, Root, SessionId, Version};
use anabranch_runtime::clock::Now;

use super::change::Change;
use crate::event::{LoadStage, PublisherId};

pub(crate) struct VersionRecord {
    version: Version,
    state: VersionState,
    of: u32,
    bytes: u64,
    directory: Option<String>,
    settled: bool,
    pub(super) live: VersionLive,
}

/// Volatile part of a version: who serves it now, and how engines get on with it.
#[derive(Default)]
pub(crate) struct VersionLive {
    /// Senders that came, by their number.
    pub senders: BTreeMap<u32, Sender>,
    pub sealed: Option<Now>,
    /// Progress of each engine, since the seal.
    pub engines: BTreeMap<EngineId, Progress>,
    /// Engines by stage.
    pub stages: BTreeMap<LoadStage, u32>,
    /// When the publishers were last told how the version stands.
    pub told: Option<Now>,
}

/// One process that publishes a version, with all of its chunks or a part of them.
pub(crate) struct Sender {
    /// The stream over which the sender serves the version; `None` once that is lost.
    pub publisher: Option<PublisherId>,
    /// Addresses from which the version can be fetched now.
    pub addresses: Vec<String>,
    /// True where the sender cannot be dialled; told to, it dials receivers.
    pub dials: bool,
    pub part: bool,
    pub session: SessionId,
    pub serve_key: [u8; 32],
    /// Set once the sender has sealed.
    pub root: Option<Root>,
}

impl VersionRecord {
    pub fn version(&self) -> Version {
        self.version
    }

    pub fn state(&self) -> VersionState {
        self.state
    }

    /// Processes that publish the version together.
    pub fn of(&self) -> u32 {
        self.of
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A directory that every engine host can read, and that has the version.
    pub fn directory(&self) -> Option<&String> {
        self.directory.as_ref()
    }

    pub fn settled(&self) -> bool {
        self.settled
    }

    pub fn live(&self) -> &VersionLive {
        &self.live
    }

    /// True where the version can be had without a peer.
    pub fn is_offered(&self) -> bool {
        self.directory.is_some() || self.at_trainer()
    }

    /// True where the senders serve all of the version now.
    pub fn at_trainer(&self) -> bool {
        let mut serve = self.live.senders.values().filter(|sender| sender.serves());
        serve.clone().any(|sender| !sender.part) || serve.by_ref().count() == self.of as usize
    }

    /// True where a sender gives only to receivers that it can dial.
    pub fn dials(&self) -> bool {
        self.live.senders.values().any(|sender| sender.dials)
    }

    pub fn is_served(&self) -> bool {
        self.publishers().next().is_some()
    }

    pub fn publishers(&self) -> impl Iterator<Item = PublisherId> {
        self.live.senders.values().filter_map(|sender| sender.publisher)
    }

    pub fn sender_of(&self, publisher: PublisherId) -> Option<u32> {
        let mut senders = self.live.senders.iter();
        senders.find(|(_, sender)| sender.publisher == Some(publisher)).map(|(index, _)| *index)
    }

    /// True once every sender came, and sealed.
    pub fn is_sealed(&self) -> bool {
        let sealed = self.live.senders.values().filter(|sender| sender.root.is_some());
        sealed.count() == self.of as usize
    }

    fn same_books(&self, other: &Self) -> bool {
        (self.version, self.state, self.of, self.bytes, &self.directory, self.settled)
            == (other.version, other.state, other.of, other.bytes, &other.directory, other.settled)
    }
}

impl Sender {
    pub fn serves(&self) -> bool {
        self.dials || !self.addresses.is_empty()
    }
}

/// How an engine gets on with a version.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    pub stage: LoadStage,
    pub bytes: u64,
    pub since_sealed: Duration,
    pub error: String,
    /// Planned parents, by stripe.
    pub parents: Vec<String>,
    pub fetched_from: BTreeMap<String, u64>,
    /// Bytes given to peers.
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
}

/// Versions by number within the job's epoch, the current one, and who holds which.
#[derive(Default)]
pub(crate) struct Books {
    versions: BTreeMap<u64, VersionRecord>,
    current: Version,
    holders: BTreeMap<Version, BTreeSet<SessionId>>,
    illegal_moves: u64,
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

/// Versions kept; the oldest superseded ones beyond are forgotten. Pinned groups keep theirs.
const KEPT: usize = 16;

impl Books {
    /// Folds one change. A move that a version's graph does not have is counted as illegal and made.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Begun { epoch } => {
                self.versions.clear();
                self.current = Version::base(*epoch);
            }
            Change::Announced { version, of, bytes } => self.announced(*version, *of, *bytes),
            Change::Described { number, of, directory } => {
                if let Some(record) = self.versions.get_mut(number) {
                    record.of = *of;
                    record.directory.clone_from(directory);
                }
            }
            Change::Sealed { number, root } => {
                if let Some(record) = self.versions.get_mut(number) {
                    record.version.root = *root;
                }
                self.moved(*number, VersionState::Available);
            }
            Change::Moved { number, to } => self.moved(*number, *to),
            Change::Current { version } => {
                self.current = *version;
                self.moved(version.number, VersionState::Current);
            }
            Change::Settled { number } => {
                if let Some(record) = self.versions.get_mut(number) {
                    record.settled = true;
                }
            }
            Change::Removed { number } => {
                self.versions.remove(number);
            }
            Change::Holds { session, version } => {
                self.holders.entry(*version).or_default().insert(*session);
            }
            Change::LetGo { session, version } => {
                if let Some(holders) = self.holders.get_mut(version) {
                    holders.remove(session);
                    if holders.is_empty() {
                        self.holders.remove(version);
                    }
                }
            }
        }
    }

    /// The one place that assigns a version's state.
    fn moved(&mut self, number: u64, to: VersionState) {
        let Some(record) = self.versions.get_mut(&number) else { return };
        self.illegal_moves += u64::from(!record.state.may_become(to));
        record.state = to;
    }

    fn announced(&mut self, version: Version, of: u32, bytes: u64) {
        let state = VersionState::Announced;
        let live = VersionLive::default();
        let record =
            VersionRecord { version, state, of, bytes, directory: None, settled: false, live };
        self.versions.insert(version.number, record);
        while self.versions.len() > KEPT {
            let old = |r: &VersionRecord| {
                matches!(r.state, VersionState::Superseded | VersionState::Retired)
            };
            let oldest = self.versions.iter().find(|(_, record)| old(record));
            let Some((&number, _)) = oldest else { break };
            self.versions.remove(&number);
        }
    }

    pub fn check(&self, version: Version) -> Result<(), NotNewer> {
        let newest = self.versions.keys().next_back().copied().unwrap_or(0);
        match version.number {
            0 => Err(NotNewer::Zero),
            number if number <= newest => {
                Err(NotNewer::Regression { number, newest, epoch: version.epoch })
            }
            _ => Ok(()),
        }
    }

    pub fn current(&self) -> Version {
        self.current
    }

    pub fn get(&self, number: u64) -> Option<&VersionRecord> {
        self.versions.get(&number)
    }

    /// Finds a version by number and root: another epoch's version of the same number is another version.
    pub fn find(&self, version: Version) -> Option<&VersionRecord> {
        self.versions.get(&version.number).filter(|record| record.version == version)
    }

    pub(super) fn live_mut(&mut self, number: u64) -> Option<&mut VersionLive> {
        Some(&mut self.versions.get_mut(&number)?.live)
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &VersionRecord> {
        self.versions.values()
    }

    /// The newest sealed version that waits to become current.
    pub fn pending(&self) -> Option<Version> {
        let waits = |record: &&VersionRecord| record.state == VersionState::Available;
        self.versions.values().rev().find(waits).map(|record| record.version)
    }

    /// Sessions whose engines can serve a version to peers.
    pub fn holders(&self, version: Version) -> impl Iterator<Item = SessionId> {
        self.holders.get(&version).into_iter().flatten().copied()
    }

    /// At most `most` holders, beginning behind `after`.
    pub fn some_holders(
        &self,
        version: Version,
        after: Option<SessionId>,
        most: usize,
    ) -> Vec<SessionId> {
        let Some(holders) = self.holders.get(&version) else { return Vec::new() };
        let after = after.unwrap_or(SessionId(0));
        holders.range(after..).chain(holders.range(..after)).take(most).copied().collect()
    }

    pub fn is_held(&self, version: Version) -> bool {
        self.holders.contains_key(&version)
    }

    pub fn illegal_moves(&self) -> u64 {
        self.illegal_moves
    }

    /// `Err` names the first part in which two books differ.
    pub fn same_books(&self, other: &Self) -> Result<(), &'static str> {
        let same = |((a, one), (b, two)): ((&u64, &VersionRecord), (&u64, &VersionRecord))| {
            a == b && one.same_books(two)
        };
        let versions = self.versions.len() == other.versions.len()
            && self.versions.iter().zip(&other.versions).all(same);
        let parts = [
            ("versions", versions),
            ("current", self.current == other.current),
            ("holders", self.holders == other.holders),
        ];
        match parts.iter().find(|(_, same)| !same) {
            Some((part, _)) => Err(part),
            None => Ok(()),
        }
    }
}
