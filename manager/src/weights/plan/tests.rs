use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const IMAGE: Image =
    Image { bytes: 512 * MIB, chunk_bytes: MIB, at_trainer: true, trainer_dials: false };

fn peer(id: u64, at: Place) -> Peer {
    let (preemptible, relay, serves) = (false, false, true);
    let (id, host) = (SessionId(id), None);
    Peer { id, ingress: None, egress: None, preemptible, relay, serves, host, at }
}

fn fleet(wanting: u64) -> Vec<Peer> {
    (0..wanting).map(|id| peer(id, Place::Wants)).collect()
}

/// Sessions of a stripe's chain below the trainer, in order.
fn chain(feeds: &BTreeMap<SessionId, Feed>, stripe: usize) -> Vec<u64> {
    let child = |of: Holder| feeds.iter().find(|(_, feed)| feed.parents[stripe] == of);
    let mut chain = Vec::new();
    let mut at = Holder::Trainer;
    while let Some((id, _)) = child(at) {
        chain.push(id.0);
        at = Holder::Peer(*id);
    }
    chain
}

fn holders(feed: &Feed) -> Vec<Holder> {
    feed.sources.iter().map(|source| source.holder).collect()
}

fn at(id: u64) -> Holder {
    Holder::Peer(SessionId(id))
}

/// The orders of a wave as the next wave finds them.
fn receiving(peers: &mut [Peer], feeds: &BTreeMap<SessionId, Feed>) {
    for peer in peers {
        if let Some(feed) = feeds.get(&peer.id) {
            peer.at = Place::Receiving(feed.clone());
        }
    }
}

#[test]
fn eight_receivers_stand_in_two_chains_of_which_the_trainer_feeds_the_heads() {
    let feeds = plan(IMAGE, &fleet(8));
    assert_eq!(chain(&feeds, 0), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(chain(&feeds, 1), [4, 3, 2, 1, 0, 7, 6, 5]);
    let third = &feeds[&SessionId(2)];
    assert_eq!(third.parents, [at(1), at(3)]);
    // Parents, their parents, and so on up; the trainer at the end.
    assert_eq!(holders(third), [at(1), at(3), at(0), at(4), Holder::Trainer]);
    assert_eq!(third.sources[0].stripes, [0]);
    assert_eq!(third.sources[1].stripes, [1]);
    // Who stands above it in one stripe may stand below it in the other.
    let spare: Vec<&[u32]> = third.sources.iter().map(|source| &source.fallback_for[..]).collect();
    assert_eq!(spare, [&[][..], &[], &[0], &[1], &[0, 1]]);
    assert!(third.sources[2..].iter().all(|source| source.stripes.is_empty()));
}

#[test]
fn there_are_as_many_stripes_as_the_fill_of_the_chains_allows() {
    let stripes = |receivers| plan(IMAGE, &fleet(receivers))[&SessionId(0)].parents.len();
    assert_eq!([1, 2, 4, 8, 16, 32].map(stripes), [1, 2, 4, 2, 1, 1]);
    let streams = |receivers| plan(IMAGE, &fleet(receivers))[&SessionId(0)].streams;
    assert_eq!([1, 2, 4, 8, 16, 32].map(streams), [4, 4, 4, 2, 1, 1]);
}

#[test]
fn no_child_loses_two_parents_with_one_death() {
    let feeds = plan(Image { bytes: 1 << 40, ..IMAGE }, &fleet(8));
    for feed in feeds.values() {
        assert_eq!(feed.parents.len(), 4);
        let peers: Vec<_> = feed.parents.iter().filter(|at| **at != Holder::Trainer).collect();
        let distinct: BTreeSet<_> = peers.iter().collect();
        assert_eq!(peers.len(), distinct.len(), "{feeds:?}");
    }
}

#[test]
fn slow_and_preemptible_nodes_stand_at_the_ends_of_every_chain() {
    let mut peers = fleet(6);
    for peer in &mut peers {
        peer.ingress = Some(100);
    }
    peers[0].ingress = Some(10);
    peers[1].preemptible = true;
    peers[2].ingress = Some(1_000);
    peers[3].ingress = None;
    let feeds = plan(IMAGE, &peers);
    for stripe in 0..feeds[&SessionId(0)].parents.len() {
        let chain = chain(&feeds, stripe);
        assert_eq!((chain[0], &chain[4..]), (2, &[1, 0][..]), "the fast one first: {chain:?}");
    }
}

/// `count` engines on each of two hosts.
fn two_hosts(count: u64) -> Vec<Peer> {
    let host = |id: u64| Some(if id < count { "a" } else { "b" }.to_owned());
    (0..2 * count).map(|id| Peer { host: host(id), ..peer(id, Place::Wants) }).collect()
}

#[test]
fn one_of_each_host_fetches_and_the_others_take_it_from_there() {
    let feeds = plan(IMAGE, &two_hosts(4));
    assert_eq!(feeds.len(), 8);
    let of_landlord = |id: u64| &feeds[&SessionId(id)].parents;
    assert!(of_landlord(0).contains(&Holder::Trainer) && of_landlord(4).contains(&at(0)));
    for (id, feed) in &feeds {
        let landlord = id.0 / 4 * 4;
        let within = feed.parents.iter().all(|parent| *parent == at(landlord));
        assert_eq!(within, id.0 != landlord, "{feeds:?}");
    }
    let guest = &feeds[&SessionId(5)];
    assert_eq!(guest.sources[0].holder, at(4));
    assert_eq!(guest.sources[0].stripes.len(), guest.parents.len());
    assert_eq!(guest.sources.last().map(|s| s.holder), Some(Holder::Trainer), "should it die");
}

#[test]
fn guests_are_parents_of_nobody_and_take_no_place_in_a_chain() {
    let mut peers = two_hosts(3);
    let feeds = plan(IMAGE, &peers);
    receiving(&mut peers, &feeds);
    peers.push(peer(9, Place::Wants));
    let late = &plan(IMAGE, &peers)[&SessionId(9)];
    let landlords = [at(0), at(3), Holder::Trainer];
    assert!(late.sources.iter().all(|source| landlords.contains(&source.holder)), "{late:?}");
    assert!(late.parents.iter().any(|parent| *parent != Holder::Trainer), "{late:?}");
}

#[test]
fn a_late_guest_goes_to_the_housemate_that_has_it() {
    let mut peers = two_hosts(2);
    (peers[1].at, peers[3].at) = (Place::Complete, Place::Complete);
    peers[2].host = None;
    let feeds = plan(IMAGE, &peers);
    assert_eq!(feeds[&SessionId(0)].parents, [at(1)]);
    assert_ne!(feeds[&SessionId(2)].parents, [at(1)], "it shares no memory with anybody");
}

#[test]
fn a_guest_whose_landlord_died_fetches_from_elsewhere_and_is_the_next_landlord() {
    let mut peers = two_hosts(3);
    let feeds = plan(IMAGE, &peers);
    receiving(&mut peers, &feeds);
    peers.remove(0);
    peers[0].at = Place::Wants;
    let again = plan(IMAGE, &peers);
    assert!(again[&SessionId(1)].parents.iter().all(|parent| *parent == at(2)), "{again:?}");
    let lives = |id| peers.iter().any(|peer| peer.id == id);
    let now = feeds[&SessionId(2)].parents_now(lives);
    assert!(now.iter().all(|parent| [at(3), Holder::Trainer].contains(parent)), "{now:?}");
}

#[test]
fn a_relay_stands_between_the_trainer_and_everybody_else() {
    let mut peers = fleet(5);
    peers[3].relay = true;
    let feeds = plan(IMAGE, &peers);
    for stripe in 0..feeds[&SessionId(0)].parents.len() {
        assert_eq!(chain(&feeds, stripe)[0], 3);
    }
}

#[test]
fn rates_that_differ_by_noise_do_not_order_the_chains() {
    let mut peers = fleet(8);
    for (peer, rate) in peers.iter_mut().zip([80, 90, 100, 110, 120, 95, 105, 101]) {
        peer.ingress = Some(rate);
    }
    assert_eq!(plan(IMAGE, &peers), plan(IMAGE, &fleet(8)));
}

#[test]
fn a_late_joiner_takes_each_stripe_from_another_peer_and_the_trainer_is_its_last_resort() {
    let mut peers: Vec<Peer> = (0..10).map(|id| peer(id, Place::Complete)).collect();
    peers.push(peer(99, Place::Wants));
    let feeds = plan(IMAGE, &peers);
    let feed = &feeds[&SessionId(99)];
    assert_eq!(feed.parents, [at(0), at(1), at(2), at(3)]);
    assert_eq!(holders(feed).len(), MOST_PEERS + 1);
    assert_eq!(holders(feed).last(), Some(&Holder::Trainer));
    assert_eq!(feed.sources.last().map(|trainer| trainer.stripes.len()), Some(0));
}

#[test]
fn many_late_joiners_spread_over_all_that_have_it() {
    let mut peers: Vec<Peer> = (0..4).map(|id| peer(id, Place::Complete)).collect();
    peers.extend((10..18).map(|id| peer(id, Place::Wants)));
    let feeds = plan(IMAGE, &peers);
    assert_eq!(feeds.len(), 8);
    for seed in 0..4 {
        let fed: u32 = feeds.values().map(|feed| share(feed, at(seed))).sum();
        assert_eq!(fed, COPY, "each gives exactly one copy");
    }
    // And the next one alone, while all that is going on, stands at the ends of the chains.
    receiving(&mut peers, &feeds);
    peers.push(peer(20, Place::Wants));
    let feed = &plan(IMAGE, &peers)[&SessionId(20)];
    assert!(feed.parents.iter().all(|at| at.peer().is_some_and(|id| id.0 >= 10)), "{feed:?}");
}

fn share(feed: &Feed, of: Holder) -> u32 {
    let stripes = feed.parents.iter().filter(|parent| **parent == of).count();
    stripes as u32 * COPY / feed.parents.len() as u32
}

#[test]
fn a_second_wave_attaches_to_the_tail_ends_while_nobody_is_complete() {
    let mut peers = fleet(8);
    let feeds = plan(IMAGE, &peers);
    receiving(&mut peers, &feeds);
    peers.push(peer(8, Place::Wants));
    let second = plan(IMAGE, &peers);
    assert_eq!(second.len(), 1, "those that have their orders keep them");
    assert_eq!(second[&SessionId(8)].parents, [at(7), at(5)]);
}

#[test]
fn one_that_comes_back_is_not_hung_below_its_own_children() {
    let mut peers = fleet(3);
    let feeds = plan(Image { chunk_bytes: 100 * MIB, ..IMAGE }, &peers);
    assert_eq!(chain(&feeds, 0), [0, 1, 2]);
    receiving(&mut peers, &feeds);
    peers[1].at = Place::Wants;
    assert_eq!(plan(IMAGE, &peers)[&SessionId(1)].parents, [at(0)], "where it stood");
    peers.remove(0);
    assert_eq!(plan(IMAGE, &peers)[&SessionId(1)].parents, [Holder::Trainer; 1]);
}

#[test]
fn the_place_below_one_whose_child_died_is_taken_by_its_grandchild() {
    let mut peers = fleet(16);
    let feeds = plan(IMAGE, &peers);
    assert_eq!(feeds[&SessionId(9)].parents, [at(8)]);
    receiving(&mut peers, &feeds);
    peers.remove(8);
    peers.push(peer(20, Place::Wants));
    let feed = &plan(IMAGE, &peers)[&SessionId(20)];
    assert_eq!(feed.parents, [at(15)], "9 takes from 7 now: the chain's end is free, 7 is not");
}

#[test]
fn the_nearest_above_stands_in_first_in_each_stripe() {
    let feeds = plan(IMAGE, &fleet(8));
    for (id, feed) in &feeds {
        for stripe in 0..2 {
            let chain = chain(&feeds, stripe);
            let place = chain.iter().position(|at| *at == id.0).expect("in the chain");
            let above = chain[..place].iter().rev().skip(1).map(|id| at(*id));
            let spare = feed.sources.iter().filter(|s| s.fallback_for.contains(&(stripe as u32)));
            let spare: Vec<Holder> = spare.map(|source| source.holder).collect();
            let expected: Vec<Holder> = above.chain([Holder::Trainer]).take(2).collect();
            let expected = if place == 0 { Vec::new() } else { expected };
            assert!(spare.starts_with(&expected), "{id:?}, stripe {stripe}: {spare:?}");
        }
    }
}

#[test]
fn a_dead_parent_is_not_named_again() {
    let mut peers = fleet(4);
    let feeds = plan(IMAGE, &peers);
    receiving(&mut peers, &feeds);
    let dead = peers.remove(3).id;
    peers.push(peer(9, Place::Wants));
    let feed = &plan(IMAGE, &peers)[&SessionId(9)];
    assert!(!holders(feed).contains(&Holder::Peer(dead)), "{feed:?}");
}

#[test]
fn those_who_cannot_serve_hang_below_those_who_can() {
    let mut peers = fleet(4);
    peers[0].serves = false;
    peers[1].serves = false;
    let feeds = plan(IMAGE, &peers);
    for feed in feeds.values() {
        assert!(feed.parents.iter().all(|parent| ![at(0), at(1)].contains(parent)), "{feeds:?}");
    }
    assert!(!feeds[&SessionId(0)].parents.contains(&Holder::Trainer));
    let alone = plan(IMAGE, &peers[..2]);
    assert!(alone.values().all(|feed| feed.parents.iter().all(|at| *at == Holder::Trainer)));
}

#[test]
fn nobody_is_fed_what_nobody_has() {
    let image = Image { at_trainer: false, ..IMAGE };
    assert!(plan(image, &fleet(3)).is_empty());
    let mut peers = fleet(3);
    peers[0].at = Place::Complete;
    let feeds = plan(image, &peers);
    let feed = &feeds[&SessionId(1)];
    assert_eq!((feed.parents.as_slice(), holders(feed)), (&[at(0), at(2)][..], vec![at(0), at(2)]));
}

/// Nodes: fate, whether preemptible, and the rate where it is known.
type Wave = Vec<(u8, bool, bool, u64)>;

/// A fleet built in waves, some of which end, die or come back between.
fn history() -> impl Strategy<Value = (u64, Vec<Wave>)> {
    let node = (any::<u8>(), any::<bool>(), any::<bool>(), 1u64..1000);
    (1u64..2000, prop::collection::vec(prop::collection::vec(node, 1..12), 1..5))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn plans_are_acyclic_feed_everybody_and_cost_each_one_copy(
        (mib, waves) in history(),
        mute in any::<bool>(),
        hosts in any::<bool>(),
    ) {
        let image = Image { bytes: mib * MIB, ..IMAGE };
        let mut peers: Vec<Peer> = Vec::new();
        let mut next = 0;
        for wave in waves {
            for (fate, preemptible, measured, rate) in wave {
                let many = peers.len().max(1);
                match fate % 8 {
                    0 if !peers.is_empty() => { peers.remove(fate as usize % many); }
                    1 if !peers.is_empty() => peers[fate as usize % many].at = Place::Complete,
                    2 if !peers.is_empty() => peers[fate as usize % many].at = Place::Wants,
                    _ => {
                        let ingress = measured.then_some(rate);
                        let serves = !(mute && fate % 5 == 0);
                        let host = hosts.then(|| (next % 4).to_string());
                        let fresh = peer(next, Place::Wants);
                        peers.push(Peer { ingress, preemptible, serves, host, ..fresh });
                        next += 1;
                    }
                }
            }
            let wanted: Vec<SessionId> =
                peers.iter().filter(|p| p.at == Place::Wants).map(|p| p.id).collect();
            let fresh = wanted.len() == peers.len() && !peers.is_empty();
            let feeds = plan(image, &peers);
            prop_assert_eq!(feeds.keys().copied().collect::<Vec<_>>(), wanted);
            receiving(&mut peers, &feeds);
            check(image, &peers, &feeds, fresh && !mute && !hosts)?;
        }
    }
}

fn check(
    image: Image,
    peers: &[Peer],
    feeds: &BTreeMap<SessionId, Feed>,
    fresh: bool,
) -> Result<(), TestCaseError> {
    let forest = Forest::new(peers);
    for (id, feed) in feeds {
        let count = feed.parents.len();
        prop_assert!((1..=MOST_STRIPES).contains(&count));
        // Every stripe has its parent, and only that one.
        let mut stripes: Vec<u32> =
            feed.sources.iter().flat_map(|source| source.stripes.clone()).collect();
        stripes.sort_unstable();
        prop_assert_eq!(stripes, (0..count as u32).collect::<Vec<_>>());
        let named: BTreeSet<Holder> = holders(feed).into_iter().collect();
        prop_assert_eq!(named.len(), feed.sources.len());
        prop_assert!(!named.contains(&Holder::Peer(*id)) && named.len() <= MOST_PEERS + 1);
        prop_assert_eq!(feed.sources.last().map(|s| s.holder), Some(Holder::Trainer));
        for source in &feed.sources {
            let host = peers.iter().find(|p| p.id == *id).and_then(|p| p.host.as_ref());
            let serves = |id| {
                let is_near = |p: &Peer| host.is_some() && p.host.as_ref() == host;
                peers.iter().any(|p: &Peer| p.id == id && (p.serves || is_near(p)))
            };
            prop_assert!(source.holder.peer().is_none_or(serves));
        }
        for (stripe, parent) in feed.parents.iter().enumerate() {
            let lives = |at: &Holder| at.peer().is_none_or(|id| forest.peers.contains_key(&id));
            let mut above = forest.ancestors(*id, stripe).skip(1).take(1).filter(lives);
            let spare = |at: &Holder| {
                feed.sources.iter().any(|source| {
                    source.holder == *at && source.fallback_for.contains(&(stripe as u32))
                })
            };
            prop_assert!(above.all(|at| at == *parent || spare(&at)));
            let top = forest.ancestors(*id, stripe).take(peers.len()).last();
            let ends = top.is_some_and(|top| match top {
                Holder::Trainer => true,
                Holder::Peer(id) => forest.above(id, stripe).is_none(),
            });
            prop_assert!(ends, "{id:?} hangs in a circle in stripe {stripe}: {peers:?}");
        }
    }
    if fresh {
        for holder in peers.iter().map(|peer| Holder::Peer(peer.id)).chain([Holder::Trainer]) {
            let given: u32 = feeds.values().map(|feed| share(feed, holder)).sum();
            prop_assert!(given <= COPY, "{holder:?} gives {given}/12");
            if holder == Holder::Trainer && image.at_trainer {
                prop_assert_eq!(given, COPY, "the trainer sends it once");
            }
        }
    }
    Ok(())
}

#[test]
fn a_trainer_that_dials_gives_only_to_those_that_listen_and_they_pass_it_on() {
    let image = Image { trainer_dials: true, ..IMAGE };
    let mut peers = fleet(3);
    peers[0].serves = false;
    let feeds = plan(image, &peers);
    let mute = &feeds[&SessionId(0)];
    assert!(!holders(mute).contains(&Holder::Trainer), "{mute:?}");
    assert!(!mute.parents.contains(&Holder::Trainer));
    assert_eq!(holders(&feeds[&SessionId(1)]).last(), Some(&Holder::Trainer));
    peers.iter_mut().for_each(|peer| peer.serves = false);
    assert!(plan(image, &peers).is_empty(), "nobody can be reached");
}
