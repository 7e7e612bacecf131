//! Waiting samples in the order they will be placed: resumed first (their tokens are paid for), then by
//! step, priority and age. Suspected poison comes after everything else.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use anabranch_proto::{SampleId, Step};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Class {
    Resumed,
    Fresh,
    /// Ran at two engine deaths: only alone on an engine.
    Held,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub class: Class,
    pub step: Step,
    pub priority: Reverse<i32>,
    pub sample: SampleId,
}

#[derive(Default)]
pub(crate) struct Queue {
    places: BTreeSet<Place>,
}

impl Queue {
    pub fn push(&mut self, place: Place) {
        self.places.insert(place);
    }

    pub fn remove(&mut self, place: &Place) {
        self.places.remove(place);
    }

    pub fn iter(&self) -> impl Iterator<Item = &Place> {
        self.places.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    pub fn count(&self, class: Class) -> usize {
        self.places.iter().filter(|place| place.class == class).count()
    }
}
