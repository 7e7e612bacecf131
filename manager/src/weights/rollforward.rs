//! Roll-forward: which engines load now. Pure: an index of where each engine stands towards the target version.
//!
//! All at once, or rolling: then at least `keep_serving` engines go on serving while others load. An engine
//! that serves nothing yet always may load. One engine stays at a pinned version while groups need it.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::{SessionId, Version};

/// Engines that are tried for a pinned version, at most.
const MOST_CHOICES: usize = 16;

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
    /// An order is out.
    pub loading: bool,
    /// A failed order waits to be given again.
    pub retry_waits: bool,
    /// Loads that failed, one after the other: those who never succeed come last.
    pub failed: u32,
    /// Only holds versions for others: nobody waits for its tokens.
    pub relay: bool,
    /// The version being loaded.
    pub to: Option<Version>,
    /// Nobody can give the target to the engine now, whether it serves or not.
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
    /// Relays that are to load the target.
    relays: BTreeSet<SessionId>,
    stuck: BTreeSet<SessionId>,
    /// Serving something else than the target, and free to load.
    behind: BTreeSet<(u32, SessionId)>,
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

    /// True where an engine serves the target.
    pub fn is_served(&self) -> bool {
        self.free_at.contains_key(&self.target)
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
        if let Some(at) = post.at.filter(|_| !post.relay) {
            shift(&mut self.at, at, more);
        }
        if let Some(to) = post.to.filter(|_| !post.relay) {
            shift(&mut self.to, to, more);
        }
        if post.outdated.is_some() {
            set(&mut self.outdated, session, more);
        }
        if post.apart {
            shift_by_one(&mut self.apart, more);
        }
        if post.loading {
            return shift_by_one(&mut self.loading, more);
        }
        if post.stuck && post.at != Some(self.target) {
            set(&mut self.stuck, session, more);
        }
        let is_free = !post.stuck && !post.retry_waits;
        match post.at {
            None if is_free && post.relay => set(&mut self.relays, session, more),
            None if is_free => set(&mut self.idle, session, more),
            Some(at) if !post.relay => {
                shift_by_one(&mut self.serving, more);
                let free = self.free_at.entry(at).or_default();
                set(free, session, more);
                if free.is_empty() {
                    self.free_at.remove(&at);
                }
                if at != self.target && is_free {
                    set(&mut self.behind, (post.failed, session), more);
                }
            }
            _ => {}
        }
    }

    /// The wave: the engines to order to load the target now, in order.
    pub fn wave(&self, pins: &[Version], keep_serving: Option<u32>) -> Vec<SessionId> {
        let keepers = self.keepers(pins);
        let mut wave: Vec<SessionId> = self.idle.union(&self.relays).copied().collect();
        let mut serving = self.serving;
        for (_, session) in &self.behind {
            if keepers.contains(session) {
                continue;
            }
            let at_floor = keep_serving.is_some_and(|floor| serving <= floor as usize);
            // A floor of everybody must not stop the roll-out: then it goes one at a time.
            if at_floor && (!wave.is_empty() || self.loading > 0) {
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

    /// Pinned versions that no engine serves or loads, with the engines that may get each, best first: idle ones, then
    /// such as serve what nobody is pinned to. None: no engine is free to.
    pub fn missing_pins(&self, pins: &[Version]) -> Vec<(Vec<SessionId>, Version)> {
        let mut taken: BTreeSet<SessionId> = BTreeSet::new();
        let mut missing = Vec::new();
        for pin in
            pins.iter().filter(|pin| !self.at.contains_key(pin) && !self.to.contains_key(pin))
        {
            let unpinned = self.free_at.iter().filter(|(at, _)| !pins.contains(at));
            let serving: BTreeSet<SessionId> =
                unpinned.flat_map(|(_, sessions)| sessions.iter().copied()).collect();
            let idle: BTreeSet<SessionId> = self.idle.union(&self.stuck).copied().collect();
            let idle: BTreeSet<SessionId> = idle.difference(&serving).copied().collect();
            let free = idle.iter().chain(&serving).filter(|session| !taken.contains(*session));
            let choices: Vec<SessionId> = free.copied().take(MOST_CHOICES).collect();
            taken.extend(choices.first());
            missing.push((choices, *pin));
        }
        missing
    }
}

fn set<T: Ord>(sessions: &mut BTreeSet<T>, session: T, more: bool) {
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
        let (to, outdated) = (None, None);
        let (retry_waits, failed, relay, stuck) = (false, 0, false, false);
        Post { at, loading, retry_waits, failed, relay, to, stuck, outdated, apart }
    }

    fn front_of(posts: &[Post]) -> Front {
        let mut front = Front::default();
        front.clear(v(9));
        for (i, post) in posts.iter().enumerate() {
            front.replace(SessionId(i as u64), None, Some(*post));
        }
        front
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
        assert_eq!(missing(&[Some(8), None]), [(vec![SessionId(1)], v(5))]);
        assert_eq!(missing(&[Some(8)]), [(vec![], v(5))], "the only engine stays with its pin");
    }

    #[test]
    fn an_engine_that_cannot_load_holds_no_other_back() {
        let behind = post(Some(8), false, v(9));
        let stuck = Post { stuck: true, ..behind };
        assert_eq!(front_of(&[stuck, behind]).wave(&[], Some(1)), [SessionId(1)]);
        assert_eq!(front_of(&[stuck, behind]).stuck(), [SessionId(0)], "and is tried again");
        let idle_and_stuck = Post { at: None, ..stuck };
        assert_eq!(front_of(&[behind, idle_and_stuck]).wave(&[], Some(1)), [SessionId(0)]);
        let waits = Post { retry_waits: true, failed: 3, ..behind };
        assert_eq!(front_of(&[waits, behind]).wave(&[], Some(1)), [SessionId(1)]);
        let again = Post { retry_waits: false, ..waits };
        assert_eq!(front_of(&[again, behind]).wave(&[], Some(1)), [SessionId(1)]);
    }

    #[test]
    fn a_relay_loads_first_and_does_not_count_as_serving_nor_for_a_pin() {
        let (behind, there) = (post(Some(8), false, v(9)), post(Some(9), false, v(9)));
        let relay = Post { relay: true, ..there };
        assert_eq!(front_of(&[relay, behind, behind]).wave(&[], Some(1)), [SessionId(1)]);
        let relay = Post { relay: true, at: None, ..there };
        let front = front_of(&[relay, behind]);
        assert_eq!(front.wave(&[], None), [SessionId(0), SessionId(1)]);
        assert_eq!(front.missing_pins(&[v(5)]), [(vec![SessionId(1)], v(5))]);
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
