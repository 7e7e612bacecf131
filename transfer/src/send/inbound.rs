//! Streams that sources dialled because receivers could not reach them. They wait here until a fetch asks on
//! them. Bounded: a source's oldest stream makes room for its newest.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use crate::link::Link;

/// Idle streams per source.
const KEPT: usize = 16;
/// Sources at once: a manager grants them, so more is a fault.
const SOURCES: usize = 256;

#[derive(Default)]
pub(crate) struct Inbound {
    streams: Mutex<BTreeMap<String, VecDeque<Box<dyn Link>>>>,
    came: Condvar,
}

impl Inbound {
    pub(crate) fn put(&self, source: &str, link: Box<dyn Link>) {
        let mut streams = self.streams.lock().expect("held only to push and pop");
        if streams.len() >= SOURCES && !streams.contains_key(source) {
            tracing::warn!(source, "too many sources dialled at once; this one is not heard");
            return;
        }
        let of_source = streams.entry(source.to_owned()).or_default();
        of_source.push_back(link);
        if of_source.len() > KEPT {
            of_source.pop_front();
        }
        self.came.notify_all();
    }

    /// A living stream of `source`; waits for one to come.
    pub(crate) fn take(&self, source: &str, patience: Duration) -> Option<Box<dyn Link>> {
        let streams = self.streams.lock().expect("held only to push and pop");
        let none = |s: &mut BTreeMap<String, VecDeque<Box<dyn Link>>>| {
            // A stream that was closed meanwhile is none.
            let of_source = s.entry(source.to_owned()).or_default();
            while of_source.front_mut().is_some_and(|link| !link.is_idle()) {
                of_source.pop_front();
            }
            of_source.is_empty()
        };
        let waited = self.came.wait_timeout_while(streams, patience, none);
        let (mut streams, _) = waited.expect("held only to push and pop");
        let link = streams.get_mut(source).and_then(VecDeque::pop_front);
        streams.retain(|_, links| !links.is_empty());
        link
    }
}

impl std::fmt::Debug for Inbound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbound").finish_non_exhaustive()
    }
}
