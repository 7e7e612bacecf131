//! How fast a host receives and sends, as far as its fetches showed. Pure.
//!
//! What a receiver got is at most what its parents had: a figure that they may have set says nothing against
//! it, only for it. Else one slow node would make all behind it slow too, for good.

use anabranch_proto::Version;

/// Bytes/s, averaged over fetches, the newest counting half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rates {
    ingress: Option<u64>,
    egress: Option<u64>,
    /// Version and rate of the last fetch, as it was measured.
    last: Option<(Version, u64)>,
}

impl Rates {
    pub fn ingress(&self) -> Option<u64> {
        self.ingress
    }

    /// Only where it was shown to be less than what comes in.
    pub fn egress(&self) -> Option<u64> {
        self.egress
    }

    /// What it got in its fetch of this version.
    pub fn got(&self, version: Version) -> Option<u64> {
        self.last.filter(|(of, _)| *of == version).map(|(_, rate)| rate)
    }

    /// A fetch came in at `rate`; `parents`: what those that it came from had got.
    pub fn received(&mut self, version: Version, rate: u64, parents: &[u64]) {
        if rate == 0 {
            return;
        }
        self.last = Some((version, rate));
        let held_up = parents.iter().any(|theirs| !is_well_above(*theirs, rate));
        self.ingress = match self.ingress {
            None if held_up => None,
            Some(known) if held_up && rate <= known => Some(known),
            known => Some(average(known, rate)),
        };
    }

    /// Notes that the host sent `rate` while it relayed a whole copy to `children`, whose own rates are these.
    pub fn relayed(&mut self, rate: u64, children: &[Option<u64>]) {
        let could_take_more =
            children.iter().all(|child| child.is_some_and(|child| is_well_above(child, rate)));
        let had_more = self.last.is_some_and(|(_, got)| is_well_above(got, rate));
        if rate > 0 && could_take_more && had_more && !children.is_empty() {
            self.egress = Some(average(self.egress, rate));
        } else if self.egress.is_some_and(|known| rate > known) {
            self.egress = None;
        }
    }
}

/// True where `rate` is above `other` by more than noise.
fn is_well_above(rate: u64, other: u64) -> bool {
    rate > other.saturating_add(other / 4)
}

fn average(known: Option<u64>, rate: u64) -> u64 {
    known.map_or(rate, |known| known / 2 + rate / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: Version = Version { epoch: 0, number: 1, root: anabranch_proto::Root([0; 32]) };

    #[test]
    fn a_node_behind_a_slow_one_is_not_called_slow() {
        let mut behind = Rates::default();
        behind.received(V, 10, &[10]);
        assert_eq!((behind.ingress(), behind.got(V)), (None, Some(10)));
        behind.received(V, 100, &[]);
        behind.received(V, 10, &[11]);
        assert_eq!(behind.ingress(), Some(100));
        behind.received(V, 10, &[100, 90]);
        assert_eq!(behind.ingress(), Some(55), "its parents had more to give");
        behind.received(V, 200, &[200]);
        assert_eq!(behind.ingress(), Some(127), "what came in did come in");
    }

    #[test]
    fn an_uplink_is_slow_only_if_children_could_have_taken_more() {
        let mut relay = Rates::default();
        relay.received(V, 100, &[]);
        relay.relayed(20, &[None]);
        relay.relayed(20, &[Some(20)]);
        relay.relayed(95, &[Some(200)]);
        relay.relayed(20, &[]);
        assert_eq!(relay.egress(), None);
        relay.relayed(20, &[Some(90)]);
        assert_eq!(relay.egress(), Some(20));
        relay.relayed(90, &[Some(90)]);
        assert_eq!(relay.egress(), None, "it can after all");
    }
}
