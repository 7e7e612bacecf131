//! Stripes: chunk i belongs to stripe i modulo their number, and one origin (a source, or several that have
//! parts of one whole) is in charge of each.
//!
//! ```text
//!   stripe:  Planned parent ── not live, or stuck ──► next of the list ── parent is well again ──► Planned
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::SourceId;
use super::origin::{OriginId, Origins};

/// The planned parents of the stripes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StripePlan {
    /// 0: no plan, any source is as good.
    pub stripe_count: u32,
    /// Stripes of which each source is the planned parent.
    pub stripes: Vec<Vec<u32>>,
    /// Stripes for which each source may stand in; it gets others only when no other source is left.
    pub fallbacks: Vec<Vec<u32>>,
    /// Origin of each source: sources of one name have the version between them. Empty for a source on its own.
    pub origins: Vec<String>,
}

#[derive(Debug)]
pub(super) struct Stripe {
    /// The planned parent, those that may stand in for it, all others.
    order: Vec<OriginId>,
    pub(super) charge: Option<OriginId>,
    /// Chunks of it that are not verified.
    pub(super) left: u32,
    /// When it last got a chunk, or another source.
    moved: Instant,
    /// Sources that were stuck with the stripe, and when they may have another try.
    stuck: BTreeMap<OriginId, Instant>,
}

// === impl StripePlan ===

impl StripePlan {
    /// The stripes, at most `chunks` of them, each with its planned parent in charge.
    pub(super) fn stripes(
        &self,
        chunks: u32,
        sources: usize,
        origins: &Origins,
        now: Instant,
    ) -> Vec<Stripe> {
        let stripe = |stripe: u32| {
            let order = self.order(stripe, sources, origins);
            let planned = self.stripes.iter().take(sources).any(|s| s.contains(&stripe));
            let charge = order.first().copied().filter(|_| planned);
            Stripe { order, charge, left: 0, moved: now, stuck: BTreeMap::new() }
        };
        (0..self.stripe_count.min(chunks)).map(stripe).collect()
    }

    fn order(&self, stripe: u32, sources: usize, origins: &Origins) -> Vec<OriginId> {
        let named =
            |list: &[Vec<u32>], ix: usize| list.get(ix).is_some_and(|s| s.contains(&stripe));
        let tier = |ix: &usize| match named(&self.stripes, *ix) {
            true => 0,
            false => 2 - u8::from(named(&self.fallbacks, *ix)),
        };
        let mut order: Vec<SourceId> = (0..sources).collect();
        order.sort_by_key(tier);
        let mut seen = BTreeSet::new();
        order.into_iter().map(|ix| origins.of(ix)).filter(|origin| seen.insert(*origin)).collect()
    }
}

// === impl Stripe ===

impl Stripe {
    pub(super) fn note_verified(&mut self, now: Instant) {
        self.left -= 1;
        self.moved = now;
    }

    /// Gives it the best there is for it now.
    pub(super) fn review(
        &mut self,
        is_live: impl Fn(OriginId) -> bool,
        stuck_after: Duration,
        now: Instant,
    ) {
        self.stuck.retain(|_, until| *until > now);
        if let Some(origin) = self.charge
            && now.saturating_duration_since(self.moved) >= stuck_after
        {
            self.stuck.insert(origin, now + 2 * stuck_after);
        }
        let in_order = || self.order.iter().copied().filter(|origin| is_live(*origin));
        let well = in_order().find(|ix| !self.stuck.contains_key(ix));
        // Where all are stuck, the one that was so longest ago.
        let charge = well.or_else(|| in_order().min_by_key(|ix| self.stuck.get(ix)));
        if charge.is_some() && charge != self.charge {
            (self.charge, self.moved) = (charge, now);
        }
    }
}
