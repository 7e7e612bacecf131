//! Rollout: one stream of work, from admitted groups through the queue to micro-batches that the trainer commits.
//!
//! Owns groups, samples, the queue, pools of finished samples, and delivery. Does not know engines beyond the
//! session a sample runs on, nor weights beyond version numbers. Durable state is in `books`; the queue, pools,
//! consumers and indexes are volatile and follow from the books and from what engines and trainers say.

mod ages;
mod books;
mod change;
mod commit;
mod delivery;
mod egress;
mod ended;
mod group;
mod intake;
mod microbatch;
mod placed;
mod progress;
mod queue;
mod sample;

pub(crate) mod admission;
pub mod replay;

use std::collections::BTreeMap;

use anabranch_proto::{GroupId, SampleId, SessionId, Step, Version};
use anabranch_runtime::clock::Now;

use crate::action::Action;
use crate::event::Pack;
use crate::outbox::Outbox;
use ages::{Ages, Exposure};
use egress::Egress;
use microbatch::Pool;
use queue::Queue;

pub(crate) use books::{Books, StepBook};
pub(crate) use change::Change;
pub(crate) use group::{Group, GroupSpec};
pub(crate) use progress::{Grown, POISON_DEATHS, SUSPICIOUS_DEATHS};
pub(crate) use queue::{Pass, Rank};
pub(crate) use sample::{Sample, SampleState};

/// Number of a work stream of a job: its steps, batches and commits are its own. Today every job has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StreamId(pub u32);

/// The instant of a turn, and the version that is current in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub now: Now,
    pub current: Version,
}

/// Groups, samples, queue and delivery of one work stream.
#[derive(Default)]
pub(crate) struct Rollout {
    pub stream: StreamId,
    books: Books,
    log: Vec<Change>,
    // Volatile
    queue: Queue,
    pools: BTreeMap<Step, Pool>,
    egress: Egress,
    pack: Option<Pack>,
    ages: Ages,
    exposure: Exposure,
    pins: BTreeMap<Version, Pinned>,
    /// True where `pins` has gained or lost a version.
    pins_changed: bool,
}

/// Groups that wait for tokens of one version.
#[derive(Default)]
struct Pinned {
    open_samples: u32,
    groups: std::collections::BTreeSet<GroupId>,
}

impl Rollout {
    /// The one way to durable state: folds a change and notes it for the journal.
    fn commit_change(&mut self, change: Change) {
        self.books.apply(&change);
        self.log.push(change);
    }

    /// Changes since the last call, in order.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.log)
    }

    pub fn books(&self) -> &Books {
        &self.books
    }

    pub fn group(&self, id: GroupId) -> Option<&Group> {
        self.books.group(id)
    }

    pub fn sample(&self, id: SampleId) -> Option<&Sample> {
        self.books.sample(id)
    }

    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    pub fn egress(&self) -> &Egress {
        &self.egress
    }

    /// Versions that open groups are pinned to.
    pub fn pins(&self) -> Vec<Version> {
        self.pins.keys().copied().collect()
    }

    /// True where the pinned versions have changed since the last call.
    pub fn take_pins_changed(&mut self) -> bool {
        std::mem::take(&mut self.pins_changed)
    }

    /// Open groups that are pinned to a version.
    pub fn pinned_to(&self, pin: Version) -> Vec<GroupId> {
        self.pins
            .get(&pin)
            .map(|pinned| pinned.groups.iter().copied().collect())
            .unwrap_or_default()
    }

    /// Samples of a step that are ready and in no batch.
    pub fn pooled(&self, step: Step) -> usize {
        self.pools.get(&step).map_or(0, Pool::len)
    }

    pub fn samples_of(&self, group: GroupId) -> Vec<SampleId> {
        self.books.group(group).map(|record| record.ids(group).collect()).unwrap_or_default()
    }

    pub fn open_groups(&self) -> Vec<GroupId> {
        self.books.groups().filter(|(_, group)| !group.is_over()).map(|(id, _)| id).collect()
    }

    /// True where a group with a token below `floor` is not offered yet.
    pub fn has_older_than(&self, floor: u64) -> bool {
        self.ages.any_below(floor)
    }

    /// Groups that are not offered yet and have a token below `floor`.
    pub fn older_than(&self, floor: u64) -> Vec<GroupId> {
        self.ages.below(floor)
    }

    /// True where a sample of a group that is not offered yet runs on an engine with weights below `floor`.
    pub fn may_get_older_than(&self, floor: u64) -> bool {
        self.exposure.any_below(floor)
    }

    /// Says which version number an engine's weights have, `None` while it makes no tokens.
    pub fn engine_at(&mut self, session: SessionId, number: Option<u64>) {
        self.exposure.engine_at(session, number);
    }

    /// Forgets everything: another job took over. The log goes on.
    pub fn clear(&mut self) {
        self.commit_change(Change::Cleared);
        let (books, log) = (std::mem::take(&mut self.books), std::mem::take(&mut self.log));
        let (exposure, stream) = (std::mem::take(&mut self.exposure), self.stream);
        *self = Self { stream, books, log, exposure, ..Self::default() };
    }

    /// A new epoch begins: undelivered work of the same job goes on, the consumers of the old epoch are over.
    pub fn begin_epoch(&mut self, out: &mut Outbox) {
        for consumer in self.egress.detach_all() {
            let why = "another epoch of the job has begun: this trainer is fenced off".to_owned();
            out.act(Action::CloseConsumer { consumer, why });
        }
        self.commit_change(Change::EpochBegun);
    }
}
