//! Ages: which groups a new version would make too old, without looking at every group.
//!
//! Two indexes. `Ages` orders the groups that may age by the oldest version among their tokens. `Exposure`
//! counts, per version, the samples of such groups that run on an engine with that version: their next token
//! may be as old as the engine's weights, and may be on its way already.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::{GroupId, SessionId};

/// Groups that may age and have tokens, by the lowest version number among those tokens.
#[derive(Default)]
pub(crate) struct Ages {
    by_oldest: BTreeSet<(u64, GroupId)>,
}

impl Ages {
    /// Moves a group from its old place to a new one; `u64::MAX` is no place.
    pub fn set(&mut self, group: GroupId, from: u64, to: u64) {
        if from != u64::MAX {
            self.by_oldest.remove(&(from, group));
        }
        if to != u64::MAX {
            self.by_oldest.insert((to, group));
        }
    }

    pub fn any_below(&self, floor: u64) -> bool {
        self.by_oldest.first().is_some_and(|(oldest, _)| *oldest < floor)
    }

    /// Groups with a token below `floor`, in the order of their ids.
    pub fn below(&self, floor: u64) -> Vec<GroupId> {
        let mut groups: Vec<GroupId> =
            self.by_oldest.range(..(floor, GroupId(0))).map(|(_, group)| *group).collect();
        groups.sort_unstable();
        groups
    }
}

/// Running samples of groups that may age, by session and by the version number of the session's engine.
#[derive(Default)]
pub(crate) struct Exposure {
    by_session: BTreeMap<SessionId, u32>,
    /// Version number of each session's engine, while it has one.
    numbers: BTreeMap<SessionId, u64>,
    by_number: BTreeMap<u64, u32>,
}

impl Exposure {
    /// One more sample that may age runs on `session`, or one less.
    pub fn count(&mut self, session: SessionId, more: bool) {
        let samples = self.by_session.entry(session).or_default();
        *samples = if more { *samples + 1 } else { samples.saturating_sub(1) };
        if *samples == 0 {
            self.by_session.remove(&session);
        }
        if let Some(number) = self.numbers.get(&session) {
            shift(&mut self.by_number, *number, 1, more);
        }
    }

    /// The engine of `session` has weights of this version number now, or none that may make tokens.
    pub fn engine_at(&mut self, session: SessionId, number: Option<u64>) {
        let before = self.numbers.get(&session).copied();
        if before == number {
            return;
        }
        let samples = self.by_session.get(&session).copied().unwrap_or(0);
        if let Some(before) = before {
            shift(&mut self.by_number, before, samples, false);
        }
        match number {
            Some(number) => {
                shift(&mut self.by_number, number, samples, true);
                self.numbers.insert(session, number);
            }
            None => {
                self.numbers.remove(&session);
            }
        }
    }

    pub fn any_below(&self, floor: u64) -> bool {
        self.by_number.first_key_value().is_some_and(|(number, _)| *number < floor)
    }
}

fn shift(counts: &mut BTreeMap<u64, u32>, number: u64, by: u32, more: bool) {
    let count = counts.entry(number).or_default();
    *count = if more { *count + by } else { count.saturating_sub(by) };
    if *count == 0 {
        counts.remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_group_is_found_without_a_walk() {
        let mut ages = Ages::default();
        ages.set(GroupId(2), u64::MAX, 3);
        ages.set(GroupId(1), u64::MAX, 4);
        assert!(!ages.any_below(3) && ages.any_below(4));
        ages.set(GroupId(2), 3, u64::MAX);
        assert_eq!((ages.any_below(4), ages.below(5)), (false, vec![GroupId(1)]));
    }

    #[test]
    fn exposure_follows_samples_and_engines() {
        let mut exposure = Exposure::default();
        let (a, b) = (SessionId(1), SessionId(2));
        exposure.engine_at(a, Some(4));
        exposure.count(a, true);
        exposure.count(b, true);
        assert!(!exposure.any_below(4) && exposure.any_below(5));
        exposure.engine_at(b, Some(2));
        assert!(exposure.any_below(3));
        exposure.engine_at(b, Some(7));
        exposure.engine_at(a, None);
        assert!(exposure.any_below(8) && !exposure.any_below(7));
        exposure.count(b, false);
        assert!(!exposure.any_below(u64::MAX));
    }
}
