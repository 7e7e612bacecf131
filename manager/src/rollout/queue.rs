//! Queue: waiting samples in the order of placement. Resumed samples come first (their tokens are paid for), then
//! step, priority and age decide. Suspected poison comes after everything else.
//!
//! Samples that want the same of an engine share a class, so that one sample that fits nowhere speaks for its
//! class and does not hold up the others.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::{SampleId, Step, Version};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    Resumed,
    Fresh,
    /// Ran at two engine deaths: only alone on an engine.
    Held,
}

/// Place of a sample in the order of placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub rank: Rank,
    pub step: Step,
    pub priority: Reverse<i32>,
    pub sample: SampleId,
}

/// What a sample wants of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Class {
    pub rank: Rank,
    pub pin: Option<Version>,
    /// True where no sample of the group has a token yet, so that the group may wait for a version.
    pub afresh: bool,
    /// Power of two that holds the context the sample needs.
    pub size: u32,
}

#[derive(Default)]
pub(crate) struct Queue {
    classes: BTreeMap<Class, BTreeSet<Place>>,
    places: BTreeMap<SampleId, (Class, Place)>,
}

impl Queue {
    /// Puts a sample into its place; a sample that waits already moves there.
    pub fn push(&mut self, class: Class, place: Place) {
        self.remove(place.sample);
        self.classes.entry(class).or_default().insert(place);
        self.places.insert(place.sample, (class, place));
    }

    pub fn remove(&mut self, sample: SampleId) -> bool {
        let Some((class, place)) = self.places.remove(&sample) else { return false };
        if let Some(places) = self.classes.get_mut(&class) {
            places.remove(&place);
            if places.is_empty() {
                self.classes.remove(&class);
            }
        }
        true
    }

    pub fn contains(&self, sample: SampleId) -> bool {
        self.places.contains_key(&sample)
    }

    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    pub fn count(&self, rank: Rank) -> usize {
        let of_rank = self.classes.iter().filter(|(class, _)| class.rank == rank);
        of_rank.map(|(_, places)| places.len()).sum()
    }

    pub fn classes(&self) -> impl Iterator<Item = Class> {
        self.classes.keys().copied()
    }

    /// First place of a class behind `after`.
    pub fn next(&self, class: Class, after: Option<Place>) -> Option<Place> {
        let places = self.classes.get(&class)?;
        match after {
            None => places.first().copied(),
            Some(after) => {
                use std::ops::Bound::{Excluded, Unbounded};
                places.range((Excluded(after), Unbounded)).next().copied()
            }
        }
    }
}

/// One pass over the queue in the order of placement, class by class at once.
pub(crate) struct Pass {
    heads: BTreeSet<(Place, Class)>,
    misses: BTreeMap<Class, u32>,
}

impl Pass {
    /// Misses of a class after which the rest of the class is left for another pass.
    const MAX_MISSES: u32 = 4;

    pub fn new(queue: &Queue) -> Self {
        let head = |class: Class| Some((queue.next(class, None)?, class));
        Self { heads: queue.classes().filter_map(head).collect(), misses: BTreeMap::new() }
    }

    /// Takes the first place of all classes.
    pub fn next(&mut self) -> Option<(Place, Class)> {
        self.heads.pop_first()
    }

    /// The sample was placed; the class goes on.
    pub fn placed(&mut self, queue: &Queue, place: Place, class: Class) {
        self.heads.extend(queue.next(class, Some(place)).map(|next| (next, class)));
    }

    /// No engine can take the sample now.
    pub fn missed(&mut self, queue: &Queue, place: Place, class: Class) {
        let misses = self.misses.entry(class).or_default();
        *misses += 1;
        if *misses < Self::MAX_MISSES {
            self.placed(queue, place, class);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(rank: Rank, sample: u64) -> Place {
        Place { rank, step: Step(0), priority: Reverse(0), sample: SampleId::new(sample, 0) }
    }

    fn class(rank: Rank, size: u32) -> Class {
        Class { rank, pin: None, afresh: false, size }
    }

    fn queue(samples: &[(Rank, u64, u32)]) -> Queue {
        let mut queue = Queue::default();
        for &(rank, sample, size) in samples {
            queue.push(class(rank, size), place(rank, sample));
        }
        queue
    }

    #[test]
    fn a_pass_follows_the_order_over_all_classes() {
        let queue = queue(&[
            (Rank::Held, 1, 3),
            (Rank::Fresh, 2, 9),
            (Rank::Resumed, 5, 3),
            (Rank::Fresh, 3, 3),
        ]);
        let mut pass = Pass::new(&queue);
        let mut order = Vec::new();
        while let Some((place, class)) = pass.next() {
            order.push(place.sample.group.0);
            pass.placed(&queue, place, class);
        }
        assert_eq!(order, [5, 2, 3, 1]);
    }

    #[test]
    fn long_samples_that_fit_nowhere_do_not_hold_up_short_ones() {
        let long = (0..1000).map(|sample| (Rank::Fresh, sample, 15));
        let short = (1000..1003).map(|sample| (Rank::Fresh, sample, 5));
        let queue = queue(&long.chain(short).collect::<Vec<_>>());
        let mut pass = Pass::new(&queue);
        let mut placed = Vec::new();
        while let Some((place, class)) = pass.next() {
            match class.size {
                15 => pass.missed(&queue, place, class),
                _ => {
                    placed.push(place.sample.group.0);
                    pass.placed(&queue, place, class);
                }
            }
        }
        assert_eq!(placed, [1000, 1001, 1002]);
    }

    #[test]
    fn a_sample_has_one_place() {
        let mut queue = queue(&[(Rank::Fresh, 1, 3)]);
        queue.push(class(Rank::Resumed, 4), place(Rank::Resumed, 1));
        assert_eq!((queue.len(), queue.count(Rank::Fresh), queue.count(Rank::Resumed)), (1, 0, 1));
        assert!(queue.remove(SampleId::new(1, 0)) && queue.is_empty());
    }
}
