//! Plan of who fetches a version from whom. Pure: given who has it, who is getting it and who wants it, each that
//! wants it gets a parent for each stripe and an order of fallbacks. The receivers re-parent themselves.
//!
//! Chunk `i` belongs to stripe `i % stripes`. Within a stripe, nodes stand in chains, and each passes on what
//! it has verified; the stripes' chains run in different orders, so that a death costs a child one stripe.
//!
//! ```text
//!   stripe 0:  trainer ─► a ─► b ─► c ─► d          whoever comes later:  at the end of the chains,
//!   stripe 1:  trainer ─► d ─► c ─► b ─► a          or at those who have it all; never at the trainer
//! ```
//!
//! So everybody's egress is at most one copy, and the last one is done (chain length - 1) x stripes chunks
//! after the first. Slow and preemptible nodes stand at the ends, where they hold up nobody.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::SessionId;

mod above;
mod housemates;

use above::Above;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    Peer(SessionId),
    Trainer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    pub bytes: u64,
    pub chunk_bytes: u64,
    /// The trainer still serves it.
    pub at_trainer: bool,
    /// The trainer cannot be dialled: it gives only to those that it can dial.
    pub trainer_dials: bool,
}

/// A host that may receive or give: an engine's agent, or a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub id: SessionId,
    /// Measured, bytes/s; `None`: not yet, taken for the median.
    pub ingress: Option<u64>,
    pub egress: Option<u64>,
    pub preemptible: bool,
    /// True for a relay, which is there only to serve: at the heads of the chains.
    pub relay: bool,
    /// Others can fetch from it.
    pub serves: bool,
    /// The same for all that can share memory with it. `None`: nobody can.
    pub host: Option<String>,
    pub at: Place,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Complete,
    /// The peer's order is out.
    Receiving(Feed),
    /// The peer gets its order now.
    Wants,
}

/// What one receiver is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Feed {
    /// Parents by stripe: as many as there are stripes.
    pub parents: Vec<Holder>,
    /// Parents first, then fallbacks, the trainer last.
    pub sources: Vec<Source>,
    /// Chunks that may be on their way to it at once: as many more as there are delay each hop so much longer.
    pub streams: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub holder: Holder,
    /// Stripes for which the source is the planned parent.
    pub stripes: Vec<u32>,
    /// Stripes in which the source stands above the receiver, or all where it has everything.
    pub fallback_for: Vec<u32>,
}

/// A feed for each peer that wants the version; none for anybody if nobody has it.
pub fn plan(image: Image, peers: &[Peer]) -> BTreeMap<SessionId, Feed> {
    let mut forest = Forest::new(peers);
    let (chained, mute): (Vec<SessionId>, Vec<SessionId>) = forest.wanting();
    let heads = forest.heads(image, chained.len() + mute.len());
    let stripes = heads.len();
    let mut parents: BTreeMap<SessionId, Vec<Holder>> = BTreeMap::new();
    for (stripe, heads) in heads.iter().enumerate() {
        let order = forest.order(&chained, stripe, stripes);
        let placed = hang(&order, &mute, heads);
        for (id, parent) in placed {
            parents.entry(id).or_default().push(parent);
        }
    }
    forest.parents.extend(parents.clone());
    let depths = forest.depths(0);
    let longest = parents.keys().filter_map(|id| depths.get(id)).max().copied().unwrap_or(0);
    let streams = streams(image, stripes, longest);
    let wanting = peers.iter().filter(|peer| peer.at == Place::Wants);
    for guest in wanting.map(|peer| peer.id) {
        parents.extend(forest.lodge(guest).map(|at| (guest, at)));
    }
    let complete = forest.ranked(|peer| peer.at == Place::Complete && peer.serves);
    let feed = |(id, parents): (SessionId, Vec<Holder>)| {
        let reached = !image.trainer_dials || forest.peers[&id].serves;
        let sources = forest.sources(id, &complete, image.at_trainer && reached);
        let hangs = reached || !parents.contains(&Holder::Trainer);
        hangs.then_some((id, Feed { parents, sources, streams }))
    };
    parents.into_iter().filter_map(feed).collect()
}

/// More would make the chains' fill longer and hurt no less: a death costs a child 1/4 of its inflow.
pub const MOST_STRIPES: usize = 4;
/// What one TCP stream cannot fill, these can; and a parent's death repeats a chunk of each.
const MOST_STREAMS: usize = 4;
/// Sources of a receiver besides the trainer.
pub const MOST_PEERS: usize = 8;
/// Nodes above a receiver that are considered as sources, in each stripe.
const MOST_ABOVE: usize = 2 * MOST_PEERS;
/// The time that chains take to fill, as a share of the transfer's, if there is more than one stripe.
const FILL_PERCENT: u64 = 3;
/// A node's egress is counted in twelfths of a copy: exact for 1 to 4 stripes.
const COPY: u32 = 12;

/// Smaller is better: nearer to the head of a chain.
type Rank = (bool, i64, bool);

/// Peers that are there, and who fetches from whom already.
struct Forest<'a> {
    peers: BTreeMap<SessionId, &'a Peer>,
    ranks: BTreeMap<SessionId, Rank>,
    parents: BTreeMap<SessionId, Vec<Holder>>,
    /// Peers that stand in no chain, with the peer at which each lodges.
    guests: BTreeMap<SessionId, SessionId>,
}

/// Chains below `heads` in the order given, dealt one by one; those who give nothing on hang at the ends.
fn hang(order: &[SessionId], mute: &[SessionId], heads: &[Holder]) -> Vec<(SessionId, Holder)> {
    let mut tips = heads.to_vec();
    let mut placed = Vec::new();
    for (index, &id) in order.iter().enumerate() {
        let at = index % tips.len();
        placed.push((id, std::mem::replace(&mut tips[at], Holder::Peer(id))));
    }
    // The ends first, then whoever stands before them: each has one child more than the rest.
    let ends = tips.iter().copied();
    let others = order.iter().rev().map(|&id| Holder::Peer(id)).filter(|at| !tips.contains(at));
    let givers: Vec<Holder> = ends.chain(others).collect();
    placed.extend(mute.iter().zip(givers.iter().cycle()).map(|(&id, &giver)| (id, giver)));
    placed
}

// === impl Forest ===

impl<'a> Forest<'a> {
    fn new(peers: &'a [Peer]) -> Self {
        let lives: BTreeMap<SessionId, &Peer> = peers.iter().map(|peer| (peer.id, peer)).collect();
        let parents = peers.iter().filter_map(|peer| match &peer.at {
            Place::Receiving(feed) if !feed.parents.is_empty() => {
                Some((peer.id, feed.parents_now(|id| lives.contains_key(&id))))
            }
            _ => None,
        });
        let guests = housemates::guests(&lives);
        Self { parents: parents.collect(), ranks: ranks(peers), peers: lives, guests }
    }

    /// Peers that stand in the chains, and their places.
    fn chained(&self) -> impl Iterator<Item = (&SessionId, &Vec<Holder>)> {
        self.parents.iter().filter(|(id, _)| !self.guests.contains_key(id))
    }

    /// Those that pass on what they get, best first, and those that do not.
    fn wanting(&self) -> (Vec<SessionId>, Vec<SessionId>) {
        let wants = self.ranked(|peer| peer.at == Place::Wants);
        wants.into_iter().partition(|id| self.peers[id].serves)
    }

    fn ranked(&self, which: impl Fn(&Peer) -> bool) -> Vec<SessionId> {
        let chained = self.peers.values().filter(|peer| !self.guests.contains_key(&peer.id));
        let mut ids: Vec<SessionId> = chained.filter(|p| which(p)).map(|p| p.id).collect();
        ids.sort_by_key(|id| (self.ranks[id], *id));
        ids
    }

    /// For each stripe, where this wave's chains begin.
    fn heads(&self, image: Image, wanting: usize) -> Vec<Vec<Holder>> {
        let somebody_has_it =
            image.at_trainer || self.peers.values().any(|peer| peer.at == Place::Complete);
        if wanting == 0 || !somebody_has_it {
            return Vec::new();
        }
        let trainer = image.at_trainer.then_some(Holder::Trainer);
        self.seeds(image, wanting)
            .or_else(|| self.tails(trainer))
            .or_else(|| trainer.map(|at| vec![vec![at]; stripes(image, wanting, wanting)]))
            .or_else(|| self.least_busy().map(|at| vec![vec![at]]))
            .unwrap_or_default()
    }

    /// Those that have it all and whose egress has room: many short chains.
    fn seeds(&self, image: Image, wanting: usize) -> Option<Vec<Vec<Holder>>> {
        let seeds = self.ranked(|peer| peer.at == Place::Complete && peer.serves);
        let given = self.given();
        let laid_out = (1..=MOST_STRIPES).rev().find_map(|count| {
            let unit = COPY / count as u32;
            let slots = self.slots(&seeds, &given, unit);
            let chains = wanting.min(slots.len() / count);
            let depth = (chains > 0).then(|| wanting.div_ceil(chains))?;
            let useful =
                count <= seeds.len().max(depth) && (count == 1 || fits(image, count, depth));
            useful.then_some((count, slots, chains))
        });
        let (count, slots, chains) = laid_out?;
        let head = |stripe: usize| (0..chains).map(|chain| slots[chain * count + stripe]).collect();
        Some((0..count).map(head).collect())
    }

    /// Each seed once for each `unit` of its egress that is free, dealt in rounds, the least busy first.
    fn slots(
        &self,
        seeds: &[SessionId],
        given: &BTreeMap<SessionId, u32>,
        unit: u32,
    ) -> Vec<Holder> {
        let mut free: Vec<(SessionId, u32)> = seeds
            .iter()
            .map(|&id| (id, COPY.saturating_sub(given.get(&id).copied().unwrap_or(0)) / unit))
            .filter(|(_, free)| *free > 0)
            .collect();
        free.sort_by_key(|(id, free)| (self.ranks[id], std::cmp::Reverse(*free), *id));
        let rounds = free.iter().map(|(_, free)| *free).max().unwrap_or(0);
        let round = |round: u32| free.iter().filter(move |(_, free)| *free > round);
        (0..rounds).flat_map(round).map(|(id, _)| Holder::Peer(*id)).collect()
    }

    /// The ends of the chains that stand: one for each stripe.
    fn tails(&self, trainer: Option<Holder>) -> Option<Vec<Vec<Holder>>> {
        let mut by_count: BTreeMap<usize, usize> = BTreeMap::new();
        for (id, parents) in self.chained() {
            *by_count.entry(parents.len()).or_default() += usize::from(self.peers[id].serves);
        }
        let (&count, _) = by_count.iter().filter(|(_, n)| **n > 0).max_by_key(|(_, n)| **n)?;
        let tail = |stripe: usize| {
            let (busy, depths) = (self.with_child(stripe, count), self.depths(stripe));
            let free = |id: &&SessionId| {
                self.peers[*id].serves
                    && self.parents[*id].len() == count
                    && !busy.contains(id)
                    && !self.is_below_a_newcomer(**id, stripe, count)
            };
            let best = self.chained().map(|(id, _)| id).filter(free);
            let best = best.min_by_key(|id| (self.ranks[*id], depths[*id], **id));
            best.map(|id| Holder::Peer(*id)).or(trainer).or_else(|| self.least_busy())
        };
        let tails: Vec<Vec<Holder>> =
            (0..count).filter_map(|stripe| Some(vec![tail(stripe)?])).collect();
        (tails.len() == count && tails.iter().flatten().any(|at| *at != Holder::Trainer))
            .then_some(tails)
    }

    fn least_busy(&self) -> Option<Holder> {
        let seeds = self.ranked(|peer| peer.at == Place::Complete && peer.serves);
        let given = self.given();
        let busy = |id: &SessionId| given.get(id).copied().unwrap_or(0);
        seeds.into_iter().min_by_key(busy).map(Holder::Peer)
    }

    /// What peers give to those that are receiving, in twelfths of a copy. Peers that give nothing are not in it.
    fn given(&self) -> BTreeMap<SessionId, u32> {
        let mut given = BTreeMap::new();
        for (_, parents) in self.chained() {
            let mut stripes: BTreeMap<SessionId, u32> = BTreeMap::new();
            for parent in parents.iter().filter_map(|at| at.peer()) {
                *stripes.entry(parent).or_default() += 1;
            }
            for (parent, stripes) in stripes {
                *given.entry(parent).or_default() += stripes * COPY / parents.len() as u32;
            }
        }
        given
    }

    /// Peers that are parents in this stripe, one of `of`.
    fn with_child(&self, stripe: usize, of: usize) -> BTreeSet<SessionId> {
        let alike = self.chained().filter(|(_, parents)| parents.len() == of);
        alike.filter_map(|(_, parents)| parents[stripe].peer()).collect()
    }

    /// True if this stripe comes to it through one that wants the version (again), or would after some
    /// deaths: a circle.
    fn is_below_a_newcomer(&self, id: SessionId, stripe: usize, of: usize) -> bool {
        let (mut seen, mut look) = (BTreeSet::new(), vec![id]);
        while let Some(at) = look.pop() {
            match self.peers.get(&at).map(|peer| &peer.at) {
                Some(Place::Wants) => return true,
                Some(Place::Receiving(feed)) if seen.insert(at) => {
                    look.extend(feed.may_come_from(stripe, of).filter_map(Holder::peer));
                }
                Some(Place::Receiving(_) | Place::Complete) | None => {}
            }
        }
        false
    }

    /// Hangs a guest at its landlord, if that one has the version or gets it.
    fn lodge(&mut self, guest: SessionId) -> Option<Vec<Holder>> {
        let landlord = *self.guests.get(&guest)?;
        let stripes = match self.parents.get(&landlord) {
            Some(parents) => parents.len(),
            None => usize::from(self.peers[&landlord].at == Place::Complete),
        };
        let parents = vec![Holder::Peer(landlord); stripes];
        self.parents.insert(guest, parents.clone());
        (stripes > 0).then_some(parents)
    }

    fn above(&self, id: SessionId, stripe: usize) -> Option<Holder> {
        let parents = self.parents.get(&id)?;
        Some(parents[stripe % parents.len()])
    }

    fn ancestors(&self, id: SessionId, stripe: usize) -> impl Iterator<Item = Holder> {
        let up = move |at: &Holder| at.peer().and_then(|peer| self.above(peer, stripe));
        // Bounded, should reports ever make a circle.
        std::iter::successors(self.above(id, stripe), up).take(self.peers.len())
    }

    /// The nodes next above a receiver, as far as they may be its sources.
    fn nearest(&self, id: SessionId, stripe: usize) -> impl Iterator<Item = Holder> {
        self.ancestors(id, stripe).take(MOST_ABOVE)
    }

    /// Number of nodes above each peer that has parents.
    fn depths(&self, stripe: usize) -> BTreeMap<SessionId, usize> {
        let mut depths: BTreeMap<SessionId, usize> = BTreeMap::new();
        for &id in self.parents.keys() {
            let up = |at: &SessionId| self.above(*at, stripe).and_then(Holder::peer);
            // Up to one whose depth is known, or whose parents are not; bounded as `ancestors` is.
            let unknown = std::iter::successors(Some(id), up).take(self.peers.len());
            let path: Vec<SessionId> = unknown.take_while(|at| !depths.contains_key(at)).collect();
            for at in path.into_iter().rev() {
                let depth = match self.above(at, stripe) {
                    None => 0,
                    Some(Holder::Trainer) => 1,
                    Some(Holder::Peer(above)) => 1 + depths.get(&above).copied().unwrap_or(0),
                };
                depths.insert(at, depth);
            }
        }
        depths
    }

    /// Best first; within a rank, in an order of this stripe's own.
    fn order(&self, ranked: &[SessionId], stripe: usize, of: usize) -> Vec<SessionId> {
        let same = |a: &SessionId, b: &SessionId| self.ranks[a] == self.ranks[b];
        ranked.chunk_by(same).flat_map(|class| stride(class, stripe, of)).collect()
    }

    /// Parents, then their parents stripe by stripe, then others that have it all, the trainer last.
    fn sources(&self, id: SessionId, complete: &[SessionId], at_trainer: bool) -> Vec<Source> {
        let parents = &self.parents[&id];
        let chains: Vec<Vec<Holder>> =
            (0..parents.len()).map(|stripe| self.nearest(id, stripe).collect()).collect();
        let deepest = chains.iter().map(Vec::len).max().unwrap_or(0);
        let upwards = (0..deepest).flat_map(|up| chains.iter().filter_map(move |c| c.get(up)));
        let mut named = BTreeSet::from([Holder::Peer(id), Holder::Trainer]);
        let peers = upwards.copied().chain(complete.iter().copied().map(Holder::Peer));
        let peers = peers.filter(|at| at.peer().is_some_and(|peer| self.reaches(id, peer)));
        let peers = peers.filter(move |at| named.insert(*at)).take(MOST_PEERS);
        let mut above: Vec<Above> = chains.iter().map(|chain| Above::parent_of(chain)).collect();
        let trainer = at_trainer.then_some(Holder::Trainer);
        peers.chain(trainer).map(|holder| self.source(holder, parents, &mut above)).collect()
    }

    /// True if the one can fetch from the other.
    fn reaches(&self, id: SessionId, holder: SessionId) -> bool {
        let host = self.peers.get(&id).and_then(|peer| peer.host.as_ref());
        let is_near = |peer: &Peer| host.is_some() && peer.host.as_ref() == host;
        self.peers.get(&holder).is_some_and(|peer| peer.serves || is_near(peer))
    }

    fn source(&self, holder: Holder, parents: &[Holder], above: &mut [Above]) -> Source {
        let has_all = holder.peer().is_none_or(|id| self.peers[&id].at == Place::Complete);
        let mut source = Source { holder, stripes: Vec::new(), fallback_for: Vec::new() };
        for (stripe, (parent, above)) in parents.iter().zip(above).enumerate() {
            let is_next = above.name(holder);
            if *parent == holder {
                source.stripes.push(stripe as u32);
            } else if is_next || has_all {
                source.fallback_for.push(stripe as u32);
            }
        }
        source
    }
}

/// Stripes for `wanting` in one chain, of which `orders` differ.
fn stripes(image: Image, orders: usize, wanting: usize) -> usize {
    let most = MOST_STRIPES.min(orders.max(1));
    (2..=most).rev().find(|&count| fits(image, count, wanting)).unwrap_or(1)
}

/// At least one for each stripe.
fn streams(image: Image, stripes: usize, length: usize) -> u32 {
    let more = (stripes..=MOST_STREAMS).rev().find(|&count| fits(image, count, length));
    more.unwrap_or(stripes) as u32
}

/// True if chains of this length fill quickly: each hop delays by a chunk of each stripe.
fn fits(image: Image, at_once: usize, length: usize) -> bool {
    let delay = (at_once as u64) * (length.saturating_sub(1) as u64) * image.chunk_bytes;
    delay.saturating_mul(100) <= image.bytes.saturating_mul(FILL_PERCENT)
}

/// A walk over all of `class` with a stride and a start of this stripe's own: nobody has the same neighbour
/// in two stripes, as far as the number of strides allows.
fn stride(class: &[SessionId], stripe: usize, of: usize) -> Vec<SessionId> {
    let n = class.len();
    let coprime: Vec<usize> = (1..=n / 2).filter(|&step| gcd(step, n) == 1).collect();
    let step = coprime.get(stripe / 2 % coprime.len().max(1)).copied().unwrap_or(1);
    let step = if stripe.is_multiple_of(2) { step } else { n - step };
    let start = stripe * n / of;
    (0..n).map(|i| class[(start + i * step) % n]).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Relays, then octaves of rate below the median, then whether it may be taken away.
fn ranks(peers: &[Peer]) -> BTreeMap<SessionId, Rank> {
    let rate = |peer: &Peer| [peer.ingress, peer.egress].into_iter().flatten().min();
    let mut known: Vec<u64> = peers.iter().filter_map(rate).collect();
    known.sort_unstable();
    let median = known.get(known.len() / 2).copied().unwrap_or(1).max(1);
    let octaves = |peer: &Peer| {
        // The median's own octave reaches from 2/3 to 4/3 of it: noise does not part equals.
        let scaled = u128::from(rate(peer).unwrap_or(median).max(1)) << 32;
        -i64::from((scaled * 3 / 2 / u128::from(median)).max(1).ilog2())
    };
    peers.iter().map(|peer| (peer.id, (!peer.relay, octaves(peer), peer.preemptible))).collect()
}

// === impl Feed ===

impl Feed {
    /// Sources of a stripe, one of `of`; those of all stripes if they are cut otherwise here.
    fn may_come_from(&self, stripe: usize, of: usize) -> impl Iterator<Item = Holder> {
        let (stripe, alike) = (stripe as u32, self.parents.len() == of);
        let names = move |source: &&Source| {
            !alike || source.stripes.contains(&stripe) || source.fallback_for.contains(&stripe)
        };
        self.sources.iter().filter(names).map(|source| source.holder)
    }

    /// As the receiver's queue decides: a dead parent's place is taken by the first that may stand in for it.
    fn parents_now(&self, lives: impl Fn(SessionId) -> bool) -> Vec<Holder> {
        let lives = |at: Holder| at.peer().is_none_or(&lives);
        let now = |(stripe, planned): (u32, &Holder)| {
            let spare =
                |source: &&Source| source.fallback_for.contains(&stripe) && lives(source.holder);
            let stands_in = || self.sources.iter().find(spare).map(|source| source.holder);
            if lives(*planned) { *planned } else { stands_in().unwrap_or(*planned) }
        };
        (0..).zip(&self.parents).map(now).collect()
    }
}

// === impl Holder ===

impl Holder {
    pub fn peer(self) -> Option<SessionId> {
        match self {
            Holder::Peer(id) => Some(id),
            Holder::Trainer => None,
        }
    }
}

#[cfg(test)]
mod tests;
