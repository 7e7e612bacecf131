//! Feeding: from whom each receiver gets a version. The plan's input out of the receivers, the plan's output as
//! holders with keys.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::manifest::DEFAULT_CHUNK_BYTES;
use anabranch_proto::{SessionId, Version};

use super::Weights;
use super::plan::{self, Feed, Image, Peer, Place};
use super::receivers::{Load, Receiver};
use super::versions::Sender;
use crate::action::Holder;
use crate::event::{LoadReport, LoadStage};

/// The trainer's name where holders are named.
const TRAINER: &str = "trainer";
/// Holders of a whole version that a plan chooses among, at least; more do not make it better.
const PLANNED_HOLDERS: usize = 64;

impl Weights {
    /// A feed for each of `wanting`, if anybody has the version.
    pub(super) fn feeds(
        &self,
        version: Version,
        wanting: &[SessionId],
    ) -> BTreeMap<SessionId, Feed> {
        let Some(record) = self.books.find(version) else { return BTreeMap::new() };
        let image = Image {
            bytes: record.bytes(),
            chunk_bytes: DEFAULT_CHUNK_BYTES.into(),
            at_trainer: record.at_trainer(),
            trainer_dials: record.dials(),
        };
        let wants: BTreeSet<SessionId> = wanting.iter().copied().collect();
        let mut near = wants.clone();
        near.extend(self.receivers.loading(version));
        near.extend(self.some_holders(version, wanting));
        let place = |receiver: &Receiver| match &receiver.load {
            _ if wants.contains(&receiver.session) => Some(Place::Wants),
            _ if receiver.holds.contains(&version) => Some(Place::Complete),
            Some(load) if load.version == version && load.stage < LoadStage::Staged => {
                Some(Place::Receiving(load.feed.clone()))
            }
            _ => None,
        };
        let receivers = near.into_iter().filter_map(|session| self.receivers.get(session));
        let linked = receivers.filter(|receiver| receiver.linked);
        let peers: Vec<Peer> =
            linked.filter_map(|receiver| Some(self.peer(receiver, place(receiver)?))).collect();
        plan::plan(image, &peers)
    }

    /// Holders of the version, beginning at different ones for different receivers, so that those that come
    /// one by one do not all choose the same.
    fn some_holders(&self, version: Version, wanting: &[SessionId]) -> Vec<SessionId> {
        let most = PLANNED_HOLDERS.max(4 * wanting.len());
        self.books.some_holders(version, wanting.first().copied(), most)
    }

    fn peer(&self, receiver: &Receiver, at: Place) -> Peer {
        let (ingress, egress) = self.rates(&receiver.id);
        Peer {
            id: receiver.session,
            ingress,
            egress,
            preemptible: receiver.preemptible,
            relay: receiver.is_relay,
            serves: receiver.serves(),
            host: receiver.host.clone(),
            at,
        }
    }

    /// The feed's sources, with what the wire needs to mint grants. The trainer is one for each sender.
    pub(super) fn holders(
        &self,
        receiver: SessionId,
        feed: &Feed,
        version: Version,
    ) -> Vec<Holder> {
        let host = self.receivers.get(receiver).and_then(|receiver| receiver.host.as_ref());
        let holders = |source: &plan::Source| match source.holder {
            plan::Holder::Peer(session) => {
                self.peer_holder(session, host, source).into_iter().collect()
            }
            plan::Holder::Trainer => self.trainer_holders(version, source),
        };
        feed.sources.iter().flat_map(holders).collect()
    }

    fn peer_holder(
        &self,
        session: SessionId,
        host: Option<&String>,
        source: &plan::Source,
    ) -> Option<Holder> {
        let peer = self.receivers.get(session)?;
        Some(Holder {
            name: peer.id.to_string(),
            origin: String::new(),
            publisher: None,
            addresses: peer.addresses_for(host),
            dials: false,
            serve_key: peer.serve_key,
            stripes: source.stripes.clone(),
            fallback_for: source.fallback_for.clone(),
        })
    }

    fn trainer_holders(&self, version: Version, source: &plan::Source) -> Vec<Holder> {
        let Some(record) = self.books.find(version) else { return Vec::new() };
        let several = record.of() > 1;
        let holder = |(index, sender): (&u32, &Sender)| Holder {
            name: match several {
                true => format!("{TRAINER} {}/{}", index + 1, record.of()),
                false => TRAINER.to_owned(),
            },
            origin: if several { TRAINER.to_owned() } else { String::new() },
            publisher: sender.publisher,
            addresses: sender.addresses.clone(),
            dials: sender.dials,
            serve_key: sender.serve_key,
            stripes: source.stripes.clone(),
            fallback_for: source.fallback_for.clone(),
        };
        let senders = record.live().senders.iter().filter(|(_, sender)| sender.serves());
        senders.map(holder).collect()
    }

    /// Planned parents by stripe, as people know them.
    pub fn parent_names(&self, parents: &[plan::Holder]) -> Vec<String> {
        let name = |parent: &plan::Holder| match parent {
            plan::Holder::Trainer => TRAINER.to_owned(),
            plan::Holder::Peer(session) => {
                self.receivers.get(*session).map_or_else(String::new, |peer| peer.id.to_string())
            }
        };
        parents.iter().map(name).collect()
    }

    /// Notes what a fetch that has ended showed of the links it went over.
    pub(super) fn note_rates(&mut self, session: SessionId, load: &Load, report: &LoadReport) {
        let parents: Vec<u64> = load
            .feed
            .parents
            .iter()
            .filter_map(|parent| self.got(parent.peer()?, load.version))
            .collect();
        let children = self.children(session, load.version);
        let Some(id) = self.receivers.get(session).map(|receiver| receiver.id.clone()) else {
            return;
        };
        let rates = self.rates.entry(id).or_default();
        rates.received(load.version, report.ingress, &parents);
        if let Some(children) = children {
            rates.relayed(report.egress, &children);
        }
    }

    /// Rate at which a peer got this version, or gets it now.
    fn got(&self, session: SessionId, version: Version) -> Option<u64> {
        let peer = self.receivers.get(session)?;
        let now = peer.load.as_ref().filter(|load| load.version == version);
        let now = now.map(|load| load.ingress).filter(|rate| *rate > 0);
        now.or_else(|| self.rates.get(&peer.id)?.got(version))
    }

    /// Known rates of those that get a whole copy from a peer, between them; `None`: the peer gives less.
    fn children(&self, session: SessionId, version: Version) -> Option<Vec<Option<u64>>> {
        let parent = plan::Holder::Peer(session);
        let mut given_percent = 0;
        let mut children = Vec::new();
        for child in self.receivers.children(session) {
            let Some(load) = child.load.as_ref().filter(|load| load.version == version) else {
                continue;
            };
            let stripes = load.feed.parents.iter().filter(|at| **at == parent).count();
            if stripes > 0 {
                given_percent += 100 * stripes / load.feed.parents.len();
                children.push(self.rates.get(&child.id).and_then(|rates| rates.ingress()));
            }
        }
        (given_percent >= 99).then_some(children)
    }
}
