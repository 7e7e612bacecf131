//! Hosts with several receivers. One of each, its landlord, stands in the chains and fetches; the others, its
//! guests, take its memory over, or copy from it within the host. So a host costs the network one copy, and
//! its memory holds one.
//!
//! ```text
//!   trainer ─► a1 ─► b1 ─► ...        a2, a3 at a1, b2 at b1: no stripe of anybody else comes from them
//! ```

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::SessionId;

use super::{Peer, Place};

/// Those that stand in no chain, and the landlord of each.
pub(super) fn guests(peers: &BTreeMap<SessionId, &Peer>) -> BTreeMap<SessionId, SessionId> {
    let mut hosts: BTreeMap<&str, Vec<&Peer>> = BTreeMap::new();
    for peer in peers.values() {
        if let Some(host) = &peer.host {
            hosts.entry(host).or_default().push(peer);
        }
    }
    let mut guests = BTreeMap::new();
    for housemates in hosts.values() {
        let best = housemates.iter().min_by_key(|peer| claim(peer, housemates, peers));
        let Some(landlord) = best.map(|peer| peer.id) else { continue };
        let others = housemates.iter().map(|peer| peer.id).filter(|id| *id != landlord);
        guests.extend(others.map(|id| (id, landlord)));
    }
    guests
}

/// Smaller is better: whoever has it, then who gets it already and not by way of a housemate that is still to
/// get it, then who can pass it on to other hosts and will stay.
fn claim(
    peer: &Peer,
    housemates: &[&Peer],
    peers: &BTreeMap<SessionId, &Peer>,
) -> (u8, bool, bool, SessionId) {
    let place = match &peer.at {
        Place::Complete => 0,
        Place::Receiving(_) if !comes_by_way_of(peer, housemates, peers) => 1,
        Place::Wants => 2,
        Place::Receiving(_) => 3,
    };
    (place, !peer.serves, peer.preemptible, peer.id)
}

/// True if it is somewhere below a housemate that does not have the version, or would be after some deaths.
fn comes_by_way_of(peer: &Peer, housemates: &[&Peer], peers: &BTreeMap<SessionId, &Peer>) -> bool {
    let is_here =
        |id: SessionId| housemates.iter().any(|mate| mate.id == id && mate.at != Place::Complete);
    let (mut seen, mut look) = (BTreeSet::from([peer.id]), vec![peer.id]);
    while let Some(at) = look.pop() {
        let Some(Place::Receiving(feed)) = peers.get(&at).map(|peer| &peer.at) else { continue };
        for id in feed.sources.iter().filter_map(|source| source.holder.peer()) {
            if is_here(id) {
                return true;
            }
            if seen.insert(id) {
                look.push(id);
            }
        }
    }
    false
}
