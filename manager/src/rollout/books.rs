//! Books: the durable state of one work stream. Only [`Books::apply`] writes them; a journal of changes, folded
//! in order, gives the same books again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anabranch_proto::{BatchSeq, GroupId, SampleId, Step};

use super::change::{BatchBook, Change};
use super::group::{Group, GroupLive};
use super::sample::{Sample, SampleLive, SampleState};
use crate::action::ShortGroup;

/// Groups, steps, batches, and how far each shard of the trainer is.
#[derive(Default)]
pub(crate) struct Books {
    groups: BTreeMap<GroupId, Group>,
    /// Groups by the trainer's key, for idempotency; one short string a group, until the epoch ends.
    keys: BTreeMap<Arc<str>, GroupId>,
    steps: BTreeMap<Step, StepBook>,
    /// Steps that were committed whole; eight bytes a step, until the epoch ends.
    past_steps: BTreeSet<Step>,
    /// Batches that some shard has not committed.
    batches: BTreeMap<BatchSeq, BatchBook>,
    /// Marks by shard index; they survive a consumer's reconnect.
    shards: BTreeMap<u32, Marks>,
    last: BatchSeq,
    floor: BatchSeq,
    admitted_tokens: u64,
    /// Samples by state, in the order of `SampleState::NAMES`.
    counts: [u64; 5],
    illegal_moves: u64,
}

/// A training step, as far as groups and batches go.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct StepBook {
    pub is_final: bool,
    pub groups: BTreeSet<GroupId>,
    pub open_groups: u32,
    pub delivered: u64,
    pub tokens: u64,
    pub discarded_tokens: u64,
    pub max_lag: u64,
    pub short: Vec<ShortGroup>,
    pub dropped: Vec<ShortGroup>,
    pub over: bool,
}

/// How far one shard of the trainer is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Marks {
    pub acked: BatchSeq,
    pub committed: BatchSeq,
}

impl Books {
    /// Folds one change. A move that a sample's graph does not have is counted as illegal and made.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Admitted { group, spec } => self.admitted(*group, spec),
            Change::StepNamed { step, is_final } => {
                self.steps.entry(*step).or_default().is_final |= is_final;
            }
            Change::Moved { sample, to } => self.moved(*sample, to),
            Change::Made { sample, tokens } => self.made(*sample, *tokens),
            Change::Restarted { sample, lost } => self.restarted(*sample, *lost),
            Change::Shortened { group, why } => {
                if let Some(group) = self.groups.get_mut(group) {
                    group.why_short.get_or_insert_with(|| why.clone());
                }
            }
            Change::Offered { group, at } => {
                if let Some(group) = self.groups.get_mut(group) {
                    group.offered_at.get_or_insert(*at);
                }
            }
            Change::GroupEnded { group, short } => self.group_ended(*group, short.as_ref()),
            Change::GroupDropped { group, report } => {
                if let Some(step) = self.step_of(*group) {
                    step.dropped.push(report.clone());
                }
            }
            delivery => self.apply_delivery(delivery),
        }
    }

    fn apply_delivery(&mut self, change: &Change) {
        match change {
            Change::BatchCut { seq, batch } => self.batch_cut(*seq, batch),
            Change::StepOver { step } => self.steps.entry(*step).or_default().over = true,
            Change::Sharded { count } => {
                let start = self.committed();
                let marks = Marks { acked: start, committed: start };
                self.shards = (0..*count).map(|shard| (shard, marks)).collect();
            }
            Change::Acked { shard, seq } => {
                if let Some(marks) = self.shards.get_mut(shard) {
                    marks.acked = marks.acked.max(*seq);
                }
            }
            Change::Committed { shard, seq } => {
                if let Some(marks) = self.shards.get_mut(shard) {
                    marks.committed = marks.committed.max(*seq);
                    marks.acked = marks.acked.max(marks.committed);
                }
            }
            Change::Rewound { cursor } => {
                self.last = self.last.max(*cursor);
                for marks in self.shards.values_mut() {
                    *marks = Marks { acked: *cursor, committed: (*cursor).max(self.floor) };
                }
            }
            Change::BatchForgotten { seq } => self.batch_forgotten(*seq),
            Change::FloorRaised { floor } => self.floor = self.floor.max(*floor),
            Change::EpochBegun => {
                self.shards.clear();
                let groups = &self.groups;
                self.keys.retain(|_, group| groups.contains_key(group));
                self.past_steps.clear();
            }
            Change::Cleared => {
                let illegal_moves = self.illegal_moves;
                *self = Self { illegal_moves, ..Self::default() };
            }
            _ => debug_assert!(false, "apply has taken every other change"),
        }
    }

    fn admitted(&mut self, id: GroupId, spec: &Arc<super::group::GroupSpec>) {
        let seed = |index| anabranch_proto::seed::of_sample(spec.seed, &spec.key, index);
        let samples = (0..spec.n).map(|index| Sample::new(seed(index))).collect();
        self.counts[0] += u64::from(spec.n);
        self.admitted_tokens += spec.budget();
        self.keys.insert(spec.key.clone(), id);
        let step = self.steps.entry(spec.step).or_default();
        step.groups.insert(id);
        step.open_groups += 1;
        let live = GroupLive { age: u64::MAX, ..GroupLive::default() };
        let open = spec.n;
        let spec = spec.clone();
        self.groups
            .insert(id, Group { spec, samples, offered_at: None, why_short: None, open, live });
    }

    /// The one place that assigns a sample's state.
    fn moved(&mut self, id: SampleId, to: &SampleState) {
        let Some(group) = self.groups.get_mut(&id.group) else { return };
        let Some(sample) = group.samples.get_mut(id.index as usize) else { return };
        self.illegal_moves += u64::from(!sample.state.may_become(to));
        self.counts[sample.state.index()] -= 1;
        self.counts[to.index()] += 1;
        if sample.state.is_open() && !to.is_open() {
            group.open -= 1;
        }
        if let SampleState::Running { attempt, .. } = to {
            sample.attempts = attempt.0;
        }
        sample.state = to.clone();
    }

    fn made(&mut self, id: SampleId, tokens: u32) {
        let Some(group) = self.groups.get_mut(&id.group) else { return };
        let most = group.spec.sampling.max_tokens;
        let Some(sample) = group.samples.get_mut(id.index as usize) else { return };
        if sample.made.is_none() {
            let made = tokens.min(most);
            sample.made = Some(made);
            self.admitted_tokens -= u64::from(most - made);
        }
    }

    fn restarted(&mut self, id: SampleId, lost: u32) {
        if let Some(sample) = self.sample_mut(id) {
            sample.discarded += lost;
        }
        if let Some(step) = self.step_of(id.group) {
            step.discarded_tokens += u64::from(lost);
        }
    }

    fn group_ended(&mut self, id: GroupId, short: Option<&ShortGroup>) {
        let Some(step) = self.step_of(id) else { return };
        step.open_groups -= 1;
        match short {
            Some(report) if report.delivered == 0 => step.dropped.push(report.clone()),
            Some(report) => step.short.push(report.clone()),
            None => {}
        }
    }

    fn batch_cut(&mut self, seq: BatchSeq, batch: &BatchBook) {
        self.last = self.last.max(seq);
        for &id in &batch.samples {
            self.moved(id, &SampleState::Delivered { seq });
        }
        let step = self.steps.entry(batch.step).or_default();
        step.delivered += batch.samples.len() as u64;
        step.tokens += batch.tokens;
        step.max_lag = step.max_lag.max(batch.max_lag);
        self.batches.insert(seq, batch.clone());
    }

    fn batch_forgotten(&mut self, seq: BatchSeq) {
        self.floor = self.floor.max(seq);
        let Some(batch) = self.batches.remove(&seq) else { return };
        let groups: BTreeSet<GroupId> = batch.samples.iter().map(|sample| sample.group).collect();
        for id in groups {
            if self.groups.get(&id).is_some_and(|group| is_committed(group, seq)) {
                self.forget_group(id);
            }
        }
        if batch.last_of_step
            && let Some(step) = self.steps.remove(&batch.step)
        {
            self.past_steps.insert(batch.step);
            // Groups of which nothing was delivered are in no batch.
            step.groups.into_iter().for_each(|id| self.forget_group(id));
        }
    }

    fn forget_group(&mut self, id: GroupId) {
        let Some(group) = self.groups.remove(&id) else { return };
        self.admitted_tokens -= group.booked();
        for sample in &group.samples {
            self.counts[sample.state.index()] -= 1;
        }
    }

    fn step_of(&mut self, group: GroupId) -> Option<&mut StepBook> {
        self.steps.get_mut(&self.groups.get(&group)?.spec.step)
    }

    fn sample_mut(&mut self, id: SampleId) -> Option<&mut Sample> {
        self.groups.get_mut(&id.group)?.samples.get_mut(id.index as usize)
    }

    // Volatile parts

    pub fn live_mut(&mut self, group: GroupId) -> Option<&mut GroupLive> {
        Some(&mut self.groups.get_mut(&group)?.live)
    }

    pub fn sample_live_mut(&mut self, id: SampleId) -> Option<&mut SampleLive> {
        Some(&mut self.sample_mut(id)?.live)
    }

    // Views

    pub fn group(&self, id: GroupId) -> Option<&Group> {
        self.groups.get(&id)
    }

    pub fn groups(&self) -> impl Iterator<Item = (GroupId, &Group)> {
        self.groups.iter().map(|(id, group)| (*id, group))
    }

    pub fn sample(&self, id: SampleId) -> Option<&Sample> {
        self.groups.get(&id.group)?.samples.get(id.index as usize)
    }

    pub fn by_key(&self, key: &str) -> Option<GroupId> {
        self.keys.get(key).copied()
    }

    pub fn step(&self, step: Step) -> Option<&StepBook> {
        self.steps.get(&step)
    }

    pub fn steps(&self) -> impl Iterator<Item = (Step, &StepBook)> {
        self.steps.iter().map(|(step, book)| (*step, book))
    }

    /// True where the step's last batch was cut, or the step is committed whole.
    pub fn is_over(&self, step: Step) -> bool {
        self.past_steps.contains(&step) || self.steps.get(&step).is_some_and(|step| step.over)
    }

    pub fn batch(&self, seq: BatchSeq) -> Option<&BatchBook> {
        self.batches.get(&seq)
    }

    /// Retained batches up to `floor`, oldest first.
    pub fn batches_up_to(&self, floor: BatchSeq) -> Vec<BatchSeq> {
        self.batches.range(..=floor).map(|(seq, _)| *seq).collect()
    }

    pub fn retained(&self) -> usize {
        self.batches.len()
    }

    /// Number of shards that the trainer consumes in; 0 before a consumer of this epoch attached.
    pub fn shard_count(&self) -> u32 {
        self.shards.len() as u32
    }

    pub fn marks(&self, shard: u32) -> Marks {
        self.shards.get(&shard).copied().unwrap_or_default()
    }

    /// Highest batch that every shard has received.
    pub fn acked(&self) -> BatchSeq {
        self.shards.values().map(|marks| marks.acked).min().unwrap_or(self.floor)
    }

    /// Highest batch that every shard has committed.
    pub fn committed(&self) -> BatchSeq {
        self.shards.values().map(|marks| marks.committed).min().unwrap_or(self.floor)
    }

    pub fn last(&self) -> BatchSeq {
        self.last
    }

    pub fn floor(&self) -> BatchSeq {
        self.floor
    }

    pub fn admitted_tokens(&self) -> u64 {
        self.admitted_tokens
    }

    pub fn counts(&self) -> [u64; 5] {
        self.counts
    }

    pub fn illegal_moves(&self) -> u64 {
        self.illegal_moves
    }

    /// `Err` names the first part in which two books differ.
    pub fn same_books(&self, other: &Self) -> Result<(), &'static str> {
        let groups = self.groups.len() == other.groups.len()
            && self
                .groups
                .iter()
                .zip(&other.groups)
                .all(|((a, one), (b, two))| a == b && one.same_books(two));
        let parts = [
            ("groups", groups),
            ("keys", self.keys == other.keys),
            ("steps", self.steps == other.steps),
            ("past steps", self.past_steps == other.past_steps),
            ("batches", self.batches == other.batches),
            ("shards", self.shards == other.shards),
            ("cursor", (self.last, self.floor) == (other.last, other.floor)),
            ("admitted tokens", self.admitted_tokens == other.admitted_tokens),
            ("counts", self.counts == other.counts),
        ];
        match parts.iter().find(|(_, same)| !same) {
            Some((part, _)) => Err(part),
            None => Ok(()),
        }
    }
}

/// True where every sample of a group was delivered by `floor`, or given up.
pub(super) fn is_committed(group: &Group, floor: BatchSeq) -> bool {
    group.samples.iter().all(|sample| match &sample.state {
        SampleState::Delivered { seq } => *seq <= floor,
        SampleState::Abandoned { .. } => true,
        _ => false,
    })
}
