//! Packs a step's finished samples into micro-batches: at least `min`, a multiple of `multiple_of` with the
//! rest carried over, whole groups when asked, early after `max_wait`, an explicit last one per step.
//! Pure; knows sample ids and nothing else.

use std::collections::{BTreeMap, VecDeque};

use anabranch_proto::{GroupId, SampleId};

use crate::event::Pack;

/// One step's samples that are ready and not yet in a batch.
#[derive(Default)]
pub(crate) struct Pool {
    ready: VecDeque<SampleId>,
    /// Whole-group packing: samples of groups that are not over.
    partial: BTreeMap<GroupId, Vec<SampleId>>,
    /// True where a sample became ready since `take_news`.
    news: bool,
}

/// Why a batch may be cut now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Enough has come.
    Full,
    /// `max_wait` is over, or a new version waits: what is there, but still a multiple.
    Flush,
    /// The step is over: everything.
    Last,
}

impl Pool {
    /// A sample finished.
    pub fn add(&mut self, sample: SampleId, pack: Option<Pack>) {
        if pack.is_some_and(|pack| pack.whole_groups) {
            self.partial.entry(sample.group).or_default().push(sample);
        } else {
            self.ready.push_back(sample);
            self.news = true;
        }
    }

    /// All samples of a group have ended.
    pub fn complete(&mut self, group: GroupId) {
        let Some(samples) = self.partial.remove(&group) else { return };
        self.ready.extend(samples);
        self.news = true;
    }

    /// True where something became ready since the last call.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// The group is dropped: what was ready of it and in no batch.
    pub fn drop_group(&mut self, group: GroupId) -> Vec<SampleId> {
        let mut dropped = self.partial.remove(&group).unwrap_or_default();
        self.ready.retain(|sample| {
            let keep = sample.group != group;
            if !keep {
                dropped.push(*sample);
            }
            keep
        });
        dropped
    }

    pub fn len(&self) -> usize {
        self.ready.len() + self.partial.values().map(Vec::len).sum::<usize>()
    }

    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The next batch, if one may be cut. `Last` always gives one, be it empty.
    pub fn cut(&mut self, pack: Pack, cut: Cut) -> Option<Vec<SampleId>> {
        let multiple = pack.multiple_of.max(1) as usize;
        let whole = self.ready.len() / multiple * multiple;
        let take = match cut {
            Cut::Last => self.ready.len(),
            Cut::Flush => whole,
            Cut::Full if self.ready.len() >= pack.min.max(1) as usize => whole,
            Cut::Full => 0,
        };
        let groups = if pack.whole_groups && cut != Cut::Last {
            self.whole_groups(take, multiple)
        } else {
            take
        };
        (groups > 0 || cut == Cut::Last).then(|| self.ready.drain(..groups).collect())
    }

    /// The longest prefix of at most `take` that cuts no group in two and is a multiple; all of it if there
    /// is no such prefix but a multiple of whole groups is not to be had (n does not divide).
    fn whole_groups(&self, take: usize, multiple: usize) -> usize {
        let boundary =
            |at: usize| at == self.ready.len() || self.ready[at - 1].group != self.ready[at].group;
        (1..=take).rev().find(|&at| at.is_multiple_of(multiple) && boundary(at)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(min: u32, multiple_of: u32, whole_groups: bool) -> Pack {
        Pack { min, multiple_of, whole_groups, max_wait: None }
    }

    fn pool(pack: Pack, samples: &[(u64, u32)]) -> Pool {
        let mut pool = Pool::default();
        for &(group, index) in samples {
            pool.add(SampleId::new(group, index), Some(pack));
        }
        pool
    }

    fn sizes(pool: &mut Pool, pack: Pack, cut: Cut) -> Vec<usize> {
        std::iter::from_fn(|| pool.cut(pack, cut).map(|b| b.len()).filter(|n| *n > 0)).collect()
    }

    #[test]
    fn a_batch_waits_for_min_and_carries_the_rest_over() {
        let p = pack(4, 2, false);
        let mut pool = pool(p, &[(1, 0), (1, 1), (2, 0)]);
        assert_eq!(pool.cut(p, Cut::Full), None);
        pool.add(SampleId::new(2, 1), Some(p));
        pool.add(SampleId::new(3, 0), Some(p));
        assert_eq!(pool.cut(p, Cut::Full).expect("five are there").len(), 4);
        assert_eq!(pool.len(), 1);
        assert_eq!(pool.cut(p, Cut::Flush), None, "one is no multiple of two");
        assert_eq!(pool.cut(p, Cut::Last).expect("the last takes all").len(), 1);
        assert_eq!(pool.cut(p, Cut::Last), Some(vec![]), "and may be empty");
    }

    #[test]
    fn whole_groups_are_not_cut_in_two() {
        let p = pack(2, 2, true);
        let mut pool = pool(p, &[(1, 0), (2, 0), (1, 1), (2, 1), (3, 0)]);
        assert_eq!(pool.cut(p, Cut::Full), None, "no group is complete");
        pool.complete(GroupId(1));
        pool.complete(GroupId(2));
        let batch = pool.cut(pack(4, 4, true), Cut::Full).expect("two whole groups");
        assert_eq!(batch.iter().map(|s| s.group.0).collect::<Vec<_>>(), [1, 1, 2, 2]);
        assert_eq!(pool.len(), 1);
    }

    #[test]
    fn what_is_full_is_cut_at_once_and_once() {
        let p = pack(3, 1, false);
        let mut pool = pool(p, &[(1, 0), (1, 1), (1, 2), (1, 3)]);
        assert_eq!(sizes(&mut pool, p, Cut::Full), [4]);
    }

    #[test]
    fn a_dropped_group_leaves_nothing_behind() {
        let p = pack(1, 1, false);
        let mut pool = pool(p, &[(1, 0), (2, 0), (1, 1)]);
        assert_eq!(pool.drop_group(GroupId(1)).len(), 2);
        assert_eq!(pool.len(), 1);
    }
}
