//! Roll-forward: which engines load now. Pure: an index of where each engine stands towards the target version.
//!
//! All at once, or rolling: then at least `keep_serving` engines go on serving while others load. An engine
//! that serves nothing yet always may load. One engine stays at a pinned version while groups need it.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::{SessionId, Version};

/// Stand of an engine, as the fleet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stand {
    /// Attached, and nothing to load yet.
    Joining,
    /// Serves nothing until a load has ended.
    Syncing,
    Serving(Version),
    Updating(Version),
}

/// Post of an engine towards the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Post {
    /// `None`: the engine serves nothing, or nobody waits for its tokens.
    pub at: Option<Version>,
    /// An order is out, or a failed one waits to be given again.
    pub loading: bool,
    /// The version being loaded.
    pub to: Option<Version>,
    pub stuck: bool,
    /// Fetches something else than the target, and has not begun to load it.
    pub outdated: Option<Version>,
    /// Attached, and does not serve the target.
    pub apart: bool,
}

/// Index of all posts.
#[derive(Default)]
pub(crate) struct Front {
    target: Version,
    idle: BTreeSet<SessionId>,
    stuck: BTreeSet<SessionId>,
    /// Serving something else than the target, and free to load.
    behind: BTreeSet<SessionId>,
    /// Serving, and free to load, by version.
    free_at: BTreeMap<Version, BTreeSet<SessionId>>,
    /// All that serve a version, or load one.
    at: BTreeMap<Version, u32>,
    to: BTreeMap<Version, u32>,
    outdated: BTreeSet<SessionId>,
    serving: usize,
    loading: usize,
    apart: usize,
}

impl Front {
    pub fn target(&self) -> Version {
        self.target
    }

    /// Forgets every post: the caller enters them anew for this target.
    pub(super) fn clear(&mut self, target: Version) {
        *self = Self { target, ..Self::default() };
    }

    /// True where every attached engine serves the target.
    pub fn is_settled(&self) -> bool {
        self.apart == 0
    }

    /// Engines that fetch something older than the target, and have not begun to load it.
    pub fn outdated(&self) -> Vec<SessionId> {
        self.outdated.iter().copied().collect()
    }

    pub fn stuck(&self) -> Vec<SessionId> {
        self.stuck.iter().copied().collect()
    }

    pub(super) fn replace(&mut self, session: SessionId, from: Option<Post>, to: Option<Post>) {
        if from == to {
            return;
        }
        if let Some(post) = from {
            self.count(session, post, false);
        }
        if let Some(post) = to {
            self.count(session, post, true);
        }
    }

    fn count(&mut self, session: SessionId, post: Post, more: bool) {
        if let Some(at) = post.at {
            shift(&mut self.at, at, more);
        }
        if let Some(to) = post.to {
            shift(&mut self.to, to, more);
        }
        if post.outdated.is_some() {
            set(&mut self.outdated, session, more);
        }
        if post.apart {
            shift_by_one(&mut self.apart, more);
        }
        match (post.at, post.loading) {
            (_, true) => shift_by_one(&mut self.loading, more),
            (None, _) if post.stuck => set(&mut self.stuck, session, more),
            (None, _) => set(&mut self.idle, session, more),
            (Some(at), _) => {
                shift_by_one(&mut self.serving, more);
                let free = self.free_at.entry(at).or_default();
                set(free, session, more);
                if free.is_empty() {
                    self.free_at.remove(&at);
                }
                if at != self.target {
                    set(&mut self.behind, session, more);
                }
            }
        }
    }

    /// The wave: the engines to order to load the target now, in order.
    pub fn wave(&self, pins: &[Version], keep_serving: Option<u32>) -> Vec<SessionId> {
        let keepers = self.keepers(pins);
        let mut wave: Vec<SessionId> = self.idle.iter().copied().collect();
        let mut serving = self.serving;
        for session in &self.behind {
            if keepers.contains(session) {
                continue;
            }
            let at_floor = keep_serving.is_some_and(|floor| serving <= floor as usize);
            // A floor of everybody must not stop the roll-out: then it goes one at a time.
            if at_floor && (!wave.is_empty() || !self.stuck.is_empty() || self.loading > 0) {
                break;
            }
            serving -= 1;
            wave.push(*session);
        }
        wave
    }

    /// For each pinned version, the one engine that stays with it.
    fn keepers(&self, pins: &[Version]) -> BTreeSet<SessionId> {
        let stays = |pin: &Version| self.free_at.get(pin)?.first().copied();
        pins.iter().filter(|pin| **pin != self.target).filter_map(stays).collect()
    }

    /// Pinned versions that no engine serves or loads, with the engine that should get each: an idle one first.
    /// `None`: no engine is free to.
    pub fn missing_pins(&self, pins: &[Version]) -> Vec<(Option<SessionId>, Version)> {
        let mut taken = BTreeSet::new();
        let mut missing = Vec::new();
        for pin in
            pins.iter().filter(|pin| !self.at.contains_key(pin) && !self.to.contains_key(pin))
        {
            let free = |sessions: &BTreeSet<SessionId>| {
                sessions.iter().find(|session| !taken.contains(*session)).copied()
            };
            let idle = [free(&self.idle), free(&self.stuck)].into_iter().flatten().min();
            let serving = || {
                let unpinned = self.free_at.iter().filter(|(at, _)| !pins.contains(at));
                unpinned.filter_map(|(_, sessions)| free(sessions)).min()
            };
            let choice = idle.or_else(serving);
            taken.extend(choice);
            missing.push((choice, *pin));
        }
        missing
    }
}

fn set(sessions: &mut BTreeSet<SessionId>, session: SessionId, more: bool) {
    if more {
        sessions.insert(session);
    } else {
        sessions.remove(&session);
    }
}

fn shift(counts: &mut BTreeMap<Version, u32>, version: Version, more: bool) {
    let count = counts.entry(version).or_default();
    *count = if more { *count + 1 } else { count.saturating_sub(1) };
    if *count == 0 {
        counts.remove(&version);
    }
}

fn shift_by_one(count: &mut usize, more: bool) {
    *count = if more { *count + 1 } else { count.saturating_sub(1) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v(number: u64) -> Version {
        Version { epoch: 1, number, ..Version::default() }
    }

    fn post(at: Option<u64>, loading: bool, target: Version) -> Post {
        let at = at.map(v);
        let apart = at != Some(target);
        Post { at, loading, to: None, stuck: false, outdated: None, apart }
    }

    fn front(at: &[Option<u64>], loading: &[bool]) -> Front {
        let mut front = Front::default();
        front.clear(v(9));
        for (i, at) in at.iter().enumerate() {
            let loads = loading.get(i).copied().unwrap_or(false);
            front.replace(SessionId(i as u64), None, Some(post(*at, loads, v(9))));
        }
        front
    }

    fn ordered(at: &[Option<u64>], loading: &[bool], pins: &[u64], floor: Option<u32>) -> Vec<u64> {
        let pins: Vec<Version> = pins.iter().map(|n| v(*n)).collect();
        front(at, loading).wave(&pins, floor).iter().map(|s| s.0).collect()
    }

    #[test]
    fn all_at_once_orders_everybody_who_is_behind() {
        assert_eq!(ordered(&[Some(8), None, Some(9), Some(7)], &[], &[], None), [1, 0, 3]);
    }

    #[test]
    fn rolling_keeps_the_floor_serving() {
        assert_eq!(ordered(&[Some(8); 4], &[], &[], Some(3)), [0]);
        assert_eq!(ordered(&[Some(8); 4], &[true], &[], Some(3)), [] as [u64; 0]);
        assert_eq!(ordered(&[Some(8); 4], &[], &[], Some(2)), [0, 1]);
    }

    #[test]
    fn rolling_with_a_floor_of_everybody_still_moves_one_at_a_time() {
        assert_eq!(ordered(&[Some(8), Some(8)], &[], &[], Some(2)), [0]);
        assert_eq!(ordered(&[Some(8), Some(8)], &[true, false], &[], Some(2)), [] as [u64; 0]);
    }

    #[test]
    fn an_engine_that_serves_nothing_loads_whatever_the_floor() {
        assert_eq!(ordered(&[None, Some(8)], &[], &[], Some(1)), [0]);
    }

    #[test]
    fn one_engine_stays_at_a_pinned_version() {
        assert_eq!(ordered(&[Some(8), Some(8), Some(8)], &[], &[8], None), [1, 2]);
        assert_eq!(ordered(&[Some(8)], &[], &[8], None), [] as [u64; 0]);
    }

    #[test]
    fn a_pin_that_nobody_has_goes_to_an_idle_engine_first() {
        let missing = |at: &[Option<u64>]| front(at, &[]).missing_pins(&[v(5), v(8)]);
        assert_eq!(missing(&[Some(8), None]), [(Some(SessionId(1)), v(5))]);
        assert_eq!(missing(&[Some(8)]), [(None, v(5))], "the only engine stays with its pin");
    }

    #[test]
    fn what_leaves_the_index_leaves_nothing_behind() {
        let mut front = front(&[Some(8), None, Some(9)], &[false, false, true]);
        assert!(!front.is_settled());
        for (i, at) in [Some(8), None, Some(9)].into_iter().enumerate() {
            front.replace(SessionId(i as u64), Some(post(at, i == 2, v(9))), None);
        }
        assert!(front.is_settled() && front.wave(&[], None).is_empty());
        assert_eq!((front.serving, front.loading, front.free_at.len()), (0, 0, 0));
    }
}
