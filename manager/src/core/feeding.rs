//! From whom each engine gets a version: the plan's input out of the fleet, its output as holders with keys.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::manifest::DEFAULT_CHUNK_BYTES;
use anabranch_proto::{SessionId, Version};

use super::Core;
use crate::action::Holder;
use crate::event::{LoadReport, LoadStage};
use crate::fleet::{Engine, EngineState, Load};
use crate::weights::plan::{self, Feed, Image, Peer, Place};
use crate::weights::versions::Sender;

/// Addresses that only processes of the same host can dial.
const WITHIN_HOST: &str = "shm:";
/// The trainer, where holders are named.
const TRAINER: &str = "trainer";

impl Core {
    /// For each of `wanting`, if anybody has the version.
    pub(super) fn feeds(
        &self,
        version: Version,
        wanting: &[SessionId],
    ) -> BTreeMap<SessionId, Feed> {
        let Some(record) = self.versions.find(version) else { return BTreeMap::new() };
        let image = Image {
            bytes: record.bytes,
            chunk_bytes: DEFAULT_CHUNK_BYTES.into(),
            at_trainer: record.at_trainer(),
            trainer_dials: record.dials(),
        };
        let wanting: BTreeSet<SessionId> = wanting.iter().copied().collect();
        let place = |engine: &Engine| match &engine.load {
            _ if wanting.contains(&engine.session) => Some(Place::Wants),
            _ if engine.holds.contains(&version) => Some(Place::Complete),
            Some(load) if load.version == version && load.stage < LoadStage::Staged => {
                Some(Place::Receiving(load.feed.clone()))
            }
            _ => None,
        };
        let live = self.engines.values().filter(|engine| engine.link.is_some());
        let peers: Vec<Peer> =
            live.filter_map(|engine| Some(self.peer(engine, place(engine)?))).collect();
        plan::plan(image, &peers)
    }

    fn peer(&self, engine: &Engine, at: Place) -> Peer {
        let record = self.records.get(&engine.id);
        let leaving = matches!(engine.state, EngineState::Draining { .. });
        Peer {
            id: engine.session,
            ingress: record.and_then(|record| record.rates.ingress()),
            egress: record.and_then(|record| record.rates.egress()),
            preemptible: leaving || self.is_preemptible(engine),
            relay: engine.is_relay(),
            serves: engine.hello.addresses.iter().any(|addr| !addr.starts_with(WITHIN_HOST)),
            host: engine.hello.host.clone(),
            at,
        }
    }

    pub(crate) fn is_preemptible(&self, engine: &Engine) -> bool {
        let noticed = self.records.get(&engine.id).is_some_and(|record| record.noticed);
        noticed || engine.is_labelled_preemptible()
    }

    /// The feed's sources, with what the driver needs to mint grants. The trainer is one for each sender.
    pub(super) fn holders(
        &self,
        receiver: SessionId,
        feed: &Feed,
        version: Version,
    ) -> Vec<Holder> {
        let host = self.engines.get(&receiver).and_then(|engine| engine.hello.host.as_ref());
        let holders = |source: &plan::Source| match source.holder {
            plan::Holder::Peer(session) => {
                self.peer_holder(session, host, source).into_iter().collect()
            }
            plan::Holder::Trainer => self.trainer_holders(version, source),
        };
        feed.sources.iter().flat_map(holders).collect()
    }

    /// With the addresses that a receiver on `host` can dial.
    fn peer_holder(
        &self,
        session: SessionId,
        host: Option<&String>,
        source: &plan::Source,
    ) -> Option<Holder> {
        let engine = self.engines.get(&session)?;
        let near = host.is_some() && engine.hello.host.as_ref() == host;
        let dialled = |addr: &&String| near || !addr.starts_with(WITHIN_HOST);
        Some(Holder {
            name: engine.id.to_string(),
            origin: String::new(),
            publisher: None,
            addresses: engine.hello.addresses.iter().filter(dialled).cloned().collect(),
            dials: false,
            serve_key: engine.serve_key,
            stripes: source.stripes.clone(),
            fallback_for: source.fallback_for.clone(),
        })
    }

    fn trainer_holders(&self, version: Version, source: &plan::Source) -> Vec<Holder> {
        let Some(record) = self.versions.find(version) else { return Vec::new() };
        let several = record.of > 1;
        let holder = |(index, sender): (&u32, &Sender)| Holder {
            name: match several {
                true => format!("{TRAINER} {}/{}", index + 1, record.of),
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
        record.senders.iter().filter(|(_, sender)| sender.serves()).map(holder).collect()
    }

    /// By stripe, as people know them.
    pub(crate) fn parent_names(&self, parents: &[plan::Holder]) -> Vec<String> {
        let name = |parent: &plan::Holder| match parent {
            plan::Holder::Trainer => TRAINER.to_owned(),
            plan::Holder::Peer(session) => {
                self.engines.get(session).map_or_else(String::new, |engine| engine.id.to_string())
            }
        };
        parents.iter().map(name).collect()
    }

    /// What a fetch that has ended showed of the links it went over.
    pub(super) fn note_rates(&mut self, session: SessionId, load: &Load, report: &LoadReport) {
        let parents: Vec<u64> = load
            .feed
            .parents
            .iter()
            .filter_map(|parent| self.got(parent.peer()?, load.version))
            .collect();
        let children = self.children(session, load.version);
        let Some(engine) = self.engines.get(&session) else { return };
        let Some(record) = self.records.get_mut(&engine.id) else { return };
        record.rates.received(load.version, report.ingress, &parents);
        if let Some(children) = children {
            record.rates.relayed(report.egress, &children);
        }
    }

    /// What a peer got of this version, or gets now.
    fn got(&self, session: SessionId, version: Version) -> Option<u64> {
        let engine = self.engines.get(&session)?;
        let now = engine.load.as_ref().filter(|load| load.version == version);
        let now = now.map(|load| load.ingress).filter(|rate| *rate > 0);
        now.or_else(|| self.records.get(&engine.id)?.rates.got(version))
    }

    /// The known rates of those that get a whole copy from it, between them; `None`: it gives less.
    fn children(&self, session: SessionId, version: Version) -> Option<Vec<Option<u64>>> {
        let parent = plan::Holder::Peer(session);
        let mut given_percent = 0;
        let mut children = Vec::new();
        for engine in self.engines.values() {
            let Some(load) = engine.load.as_ref().filter(|load| load.version == version) else {
                continue;
            };
            let stripes = load.feed.parents.iter().filter(|at| **at == parent).count();
            if stripes > 0 {
                given_percent += 100 * stripes / load.feed.parents.len();
                children.push(self.records.get(&engine.id).and_then(|r| r.rates.ingress()));
            }
        }
        (given_percent >= 99).then_some(children)
    }
}
