//! Which engines load now. Pure: given where each engine stands, says whom to order.
//!
//! All at once, or rolling: then at least `keep_serving` engines go on serving while others load. An engine
//! that serves nothing yet always may load. One engine stays at a pinned version while groups need it.

use std::collections::BTreeMap;

use anabranch_proto::{SessionId, Version};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub session: SessionId,
    pub at: Standpoint,
    /// A load order is on its way to it.
    pub loading: bool,
    pub to: Option<Version>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standpoint {
    /// Serves nothing: joining or syncing.
    Idle,
    Serving(Version),
}

/// Unfinished groups pinned to a version: how many samples.
pub(crate) type Pins = BTreeMap<Version, u32>;

/// The wave: whom to order to load `target` now, in order.
pub(crate) fn wave(
    target: Version,
    engines: &[Standing],
    pins: &Pins,
    keep_serving: Option<u32>,
) -> Vec<SessionId> {
    let keepers = keepers(target, engines, pins);
    let idle = engines.iter().filter(|e| e.at == Standpoint::Idle && !e.loading);
    let mut wave: Vec<SessionId> = idle.map(|engine| engine.session).collect();
    let anybody_loads = engines.iter().any(|engine| engine.loading);
    let mut serving =
        engines.iter().filter(|e| matches!(e.at, Standpoint::Serving(_)) && !e.loading).count();
    for engine in engines.iter().filter(|engine| !engine.loading) {
        let Standpoint::Serving(at) = engine.at else { continue };
        if at == target || keepers.contains(&engine.session) {
            continue;
        }
        let at_floor = keep_serving.is_some_and(|floor| serving <= floor as usize);
        // A floor of everybody must not stop the roll-out: then it goes one at a time.
        if at_floor && (!wave.is_empty() || anybody_loads) {
            break;
        }
        serving -= 1;
        wave.push(engine.session);
    }
    wave
}

/// Pinned versions that no engine serves or loads, with the engine that should get each: an idle one first.
/// `None`: no engine is free to.
pub(crate) fn missing_pins(engines: &[Standing], pins: &Pins) -> Vec<(Option<SessionId>, Version)> {
    let has = |pin: &Version| {
        engines.iter().any(|e| e.at == Standpoint::Serving(*pin) || e.to == Some(*pin))
    };
    let mut taken = Vec::new();
    let mut missing = Vec::new();
    for pin in pins.keys().filter(|pin| !has(pin)) {
        let free = |e: &&Standing| {
            let keeps = matches!(e.at, Standpoint::Serving(at) if pins.contains_key(&at));
            !e.loading && !keeps && !taken.contains(&e.session)
        };
        let choice =
            engines.iter().filter(free).min_by_key(|e| e.at != Standpoint::Idle).map(|e| e.session);
        taken.extend(choice);
        missing.push((choice, *pin));
    }
    missing
}

/// For each pinned version, the one engine that stays with it.
fn keepers(target: Version, engines: &[Standing], pins: &Pins) -> Vec<SessionId> {
    let stays = |pin: &Version| {
        engines.iter().find(|engine| engine.at == Standpoint::Serving(*pin) && !engine.loading)
    };
    pins.keys().filter(|pin| **pin != target).filter_map(stays).map(|e| e.session).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v(number: u64) -> Version {
        Version { epoch: 1, number, ..Version::default() }
    }

    fn fleet(at: &[Option<u64>], loading: &[bool]) -> Vec<Standing> {
        let stand = |(i, at): (usize, &Option<u64>)| Standing {
            session: SessionId(i as u64),
            at: at.map_or(Standpoint::Idle, |n| Standpoint::Serving(v(n))),
            loading: loading.get(i).copied().unwrap_or(false),
            to: None,
        };
        at.iter().enumerate().map(stand).collect()
    }

    fn ordered(at: &[Option<u64>], loading: &[bool], pins: &[u64], floor: Option<u32>) -> Vec<u64> {
        let pins = pins.iter().map(|&n| (v(n), 1)).collect();
        wave(v(9), &fleet(at, loading), &pins, floor).iter().map(|s| s.0).collect()
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
}
