//! Time for decision code: [`Now`] is a point on a process-local monotonic line, [`TimerTable`]
//! holds every deadline of one core. Pure: no sleeping, no runtime. Drivers read a [`Clock`],
//! simulations make their own `Now`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Add;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A point in time: the duration since the [`Clock`] of this process started. Never wall time,
/// never sent to another process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Now(pub Duration);

impl Now {
    /// The start of the clock.
    pub const ZERO: Now = Now(Duration::ZERO);

    /// The point `ms` milliseconds after the start.
    pub const fn from_millis(ms: u64) -> Now {
        Now(Duration::from_millis(ms))
    }

    /// Whole milliseconds since the start; saturates after half a billion years.
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// Duration since `earlier`; zero if `earlier` is later.
    pub fn since(self, earlier: Now) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Duration until `later`; zero if `later` has passed.
    pub fn until(self, later: Now) -> Duration {
        later.since(self)
    }
}

impl Add<Duration> for Now {
    type Output = Now;

    /// Saturates, so that "never" may be written as `now + Duration::MAX`.
    fn add(self, wait: Duration) -> Now {
        Now(self.0.saturating_add(wait))
    }
}

impl fmt::Display for Now {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "+{:.3}s", self.0.as_secs_f64())
    }
}

/// The monotonic clock of this process, read by drivers only. Copies share the same start.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// A clock whose zero is this moment.
    pub fn start() -> Clock {
        Clock { start: Instant::now() }
    }

    /// The present point in time.
    pub fn now(&self) -> Now {
        Now(self.start.elapsed())
    }

    /// Duration for which a driver sleeps before it calls its core at `at`.
    pub fn until(&self, at: Now) -> Duration {
        self.now().until(at)
    }
}

/// Wall time in seconds since 1970, for values that outlive a process: token expiry, file names.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct UnixSeconds(pub u64);

impl UnixSeconds {
    /// The present wall time; 0 on a host whose clock is before 1970.
    pub fn now() -> UnixSeconds {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        UnixSeconds(since.as_secs())
    }
}

impl Add<Duration> for UnixSeconds {
    type Output = UnixSeconds;

    fn add(self, wait: Duration) -> UnixSeconds {
        UnixSeconds(self.0.saturating_add(wait.as_secs()))
    }
}

/// All deadlines of one core, one per key. Timers due at the same instant fire in key order, so
/// that a seed reproduces.
#[derive(Clone, Debug)]
pub struct TimerTable<K> {
    by_key: BTreeMap<K, Now>,
    by_time: BTreeSet<(Now, K)>,
}

impl<K: Ord + Copy> TimerTable<K> {
    /// A table without deadlines.
    pub fn new() -> TimerTable<K> {
        TimerTable { by_key: BTreeMap::new(), by_time: BTreeSet::new() }
    }

    /// Arms `key`, replacing its earlier deadline.
    pub fn set(&mut self, key: K, at: Now) {
        self.clear(key);
        self.by_key.insert(key, at);
        self.by_time.insert((at, key));
    }

    /// Disarms `key`; false if `key` was not armed.
    pub fn clear(&mut self, key: K) -> bool {
        let Some(at) = self.by_key.remove(&key) else { return false };
        self.by_time.remove(&(at, key));
        true
    }

    /// The deadline of `key`, if armed.
    pub fn get(&self, key: K) -> Option<Now> {
        self.by_key.get(&key).copied()
    }

    /// The earliest deadline, for a core's `next_timeout()`.
    pub fn next(&self) -> Option<Now> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Disarms and returns the earliest timer that is due at `now`. Call until `None`.
    pub fn pop_due(&mut self, now: Now) -> Option<K> {
        let &(at, key) = self.by_time.first()?;
        if at > now {
            return None;
        }
        self.clear(key);
        Some(key)
    }

    /// Number of armed timers.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// True if no timer is armed.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }
}

impl<K: Ord + Copy> Default for TimerTable<K> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn timers_due_together_fire_in_key_order() {
        let mut timers = TimerTable::new();
        timers.set('b', Now::from_millis(5));
        timers.set('a', Now::from_millis(5));
        timers.set('c', Now::from_millis(1));
        let fired: Vec<char> = std::iter::from_fn(|| timers.pop_due(Now::from_millis(5))).collect();
        assert_eq!(fired, ['c', 'a', 'b']);
        assert!(timers.is_empty());
    }

    #[test]
    fn setting_a_timer_again_replaces_its_deadline() {
        let mut timers = TimerTable::new();
        timers.set(1, Now::from_millis(5));
        timers.set(1, Now::from_millis(9));
        assert_eq!(timers.pop_due(Now::from_millis(8)), None);
        assert_eq!(timers.next(), Some(Now::from_millis(9)));
        assert!(timers.clear(1));
        assert!(!timers.clear(1));
        assert_eq!(timers.next(), None);
    }

    #[test]
    fn never_does_not_overflow() {
        assert!(Now::from_millis(7) + Duration::MAX > Now::from_millis(8));
        assert_eq!(Now::ZERO.since(Now::from_millis(3)), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn table_agrees_with_a_plain_map(ops in prop::collection::vec((0u8..3, 0u8..8, 0u64..20), 0..60)) {
            let mut timers = TimerTable::new();
            let mut model: BTreeMap<u8, Now> = BTreeMap::new();
            for (op, key, at) in ops {
                let at = Now::from_millis(at);
                match op {
                    0 => { timers.set(key, at); model.insert(key, at); }
                    1 => prop_assert_eq!(timers.clear(key), model.remove(&key).is_some()),
                    _ => {
                        let due = model.iter().map(|(k, t)| (*t, *k)).filter(|(t, _)| *t <= at).min();
                        prop_assert_eq!(timers.pop_due(at), due.map(|(_, k)| k));
                        if let Some((_, k)) = due { model.remove(&k); }
                    }
                }
                prop_assert_eq!(timers.next(), model.values().min().copied());
                prop_assert_eq!(timers.len(), model.len());
            }
        }
    }
}
