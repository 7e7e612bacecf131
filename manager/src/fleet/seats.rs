//! Seats: engines that can take samples, ordered so that the best one for a sample is found without a walk.
//!
//! Engines with the same version and context limit share a bucket. A bucket orders its engines by pressure (the
//! cheapest first), by room (to know at once that no engine has any), and by running samples.
//!
//! Group affinity: the leader's engine has the prompt's KV cached, so siblings (and a resumed sample) go there
//! unless that engine is clearly fuller than the emptiest one.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::{SessionId, Version};

use crate::need::{Allowed, Need};

/// Tokens by which an affine engine may be fuller than the emptiest and is still taken: about what a prefill
/// saves, in units of decode.
const AFFINITY_SLACK_TOKENS: u64 = 4096;
/// Engines of a bucket that are tried in order of pressure before the one with most room is taken.
const PROBES: usize = 8;

/// Place of an engine in the index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Seat {
    bucket: Bucket,
    pressure: u64,
    running: usize,
    /// Free tokens of context; `None`: no new sample now (full, resting or reserved).
    room: Option<u64>,
    reserved: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Bucket {
    at: Version,
    context: u32,
}

#[derive(Default)]
struct Members {
    /// Pressure, running samples and session, with the room.
    by_pressure: BTreeMap<(u64, usize, SessionId), u64>,
    /// Room (most first) and session, with pressure and running samples.
    by_room: BTreeMap<(Reverse<u64>, SessionId), (u64, usize)>,
    /// Unreserved engines, full and resting ones too.
    by_running: BTreeSet<(usize, SessionId)>,
    all: usize,
}

#[derive(Default)]
pub(super) struct Seats {
    buckets: BTreeMap<Bucket, Members>,
}

impl Seat {
    /// Seat of an engine that serves `at`, runs `running` samples, and has room for a context of `context` tokens.
    pub fn new(at: Version, context: u32, pressure: u64, running: usize) -> Self {
        let bucket = Bucket { at, context };
        Self { bucket, pressure, running, room: None, reserved: false }
    }

    /// `room`: free tokens of context, `None` where no new sample may come now.
    pub fn with(self, room: Option<u64>, reserved: bool) -> Self {
        Self { room, reserved, ..self }
    }
}

impl Seats {
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }

    pub fn replace(&mut self, session: SessionId, from: Option<Seat>, to: Option<Seat>) {
        if from == to {
            return;
        }
        if let Some(seat) = from
            && let Some(members) = self.buckets.get_mut(&seat.bucket)
        {
            members.remove(session, seat);
            if members.all == 0 {
                self.buckets.remove(&seat.bucket);
            }
        }
        if let Some(seat) = to {
            self.buckets.entry(seat.bucket).or_default().insert(session, seat);
        }
    }

    /// The cheapest engine that can take the sample now. `warm`: the seat of the engine that has its prefix.
    /// Gives the number of engines looked at, too.
    pub fn choose(
        &self,
        need: &Need,
        allowed: Allowed,
        warm: Option<(SessionId, Seat)>,
    ) -> (Option<SessionId>, usize) {
        let weight = need.weight();
        let slack = u64::from(need.prefill).min(AFFINITY_SLACK_TOKENS);
        let mut looked = 0;
        let affine = warm.filter(|(_, seat)| {
            need.suits(allowed, seat.bucket.at, seat.bucket.context)
                && seat.room.is_some_and(|room| weight <= room)
        });
        let mut best = affine.map(|(session, seat)| (seat.pressure, seat.running, session));
        for (bucket, members) in &self.buckets {
            if !need.suits(allowed, bucket.at, bucket.context) || !members.any_with(weight) {
                continue;
            }
            let found = members.cheapest(weight, &mut looked);
            let cost = |(pressure, running, session)| (pressure + slack, running, session);
            best = [best, found.map(cost)].into_iter().flatten().min();
        }
        (best.map(|(_, _, session)| session), looked + usize::from(warm.is_some()))
    }

    /// The unreserved engine with the fewest samples that suits, to be kept free for one sample.
    pub fn emptiest(&self, need: &Need, allowed: Allowed) -> Option<SessionId> {
        let suits =
            |(bucket, _): &(&Bucket, &Members)| need.suits(allowed, bucket.at, bucket.context);
        let first = |(_, members): (&Bucket, &Members)| members.by_running.first().copied();
        let emptiest = self.buckets.iter().filter(suits).filter_map(first).min();
        emptiest.map(|(_, session)| session)
    }
}

impl Members {
    fn insert(&mut self, session: SessionId, seat: Seat) {
        self.all += 1;
        if let Some(room) = seat.room {
            self.by_pressure.insert((seat.pressure, seat.running, session), room);
            self.by_room.insert((Reverse(room), session), (seat.pressure, seat.running));
        }
        if !seat.reserved {
            self.by_running.insert((seat.running, session));
        }
    }

    fn remove(&mut self, session: SessionId, seat: Seat) {
        self.all -= 1;
        if let Some(room) = seat.room {
            self.by_pressure.remove(&(seat.pressure, seat.running, session));
            self.by_room.remove(&(Reverse(room), session));
        }
        if !seat.reserved {
            self.by_running.remove(&(seat.running, session));
        }
    }

    fn any_with(&self, weight: u64) -> bool {
        self.by_room.first_key_value().is_some_and(|((Reverse(room), _), _)| weight <= *room)
    }

    /// The first engine by pressure with room, among a few; else the engine with most room.
    fn cheapest(&self, weight: u64, looked: &mut usize) -> Option<(u64, usize, SessionId)> {
        for (place, room) in self.by_pressure.iter().take(PROBES) {
            *looked += 1;
            if weight <= *room {
                return Some(*place);
            }
        }
        let ((Reverse(room), session), (pressure, running)) = self.by_room.first_key_value()?;
        *looked += 1;
        (weight <= *room).then_some((*pressure, *running, *session))
    }
}
