//! Receivers: engines as the weights see them. Volatile: where each stands, its load order, what it gave as a
//! probe; with indexes by holder, parent and probe, so that no event walks over all receivers.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::{EngineId, OrderId, SessionId, Version};
use anabranch_runtime::clock::Now;

use super::plan;
use super::rollforward::{Front, Post, Stand};
use crate::event::{EngineHello, LoadStage, ProbeResult};

/// Addresses that only processes of the same host can dial begin so.
const WITHIN_HOST: &str = "shm:";

/// One session's engine, or a relay, as a receiver and holder of versions.
pub(crate) struct Receiver {
    pub id: EngineId,
    pub session: SessionId,
    pub kind: String,
    pub host: Option<String>,
    pub addresses: Vec<String>,
    pub serve_key: [u8; 32],
    pub is_relay: bool,
    /// The trainer loads this engine itself: it gets no order.
    pub by_trainer: bool,
    pub preemptible: bool,
    pub linked: bool,
    pub stand: Option<Stand>,
    pub load: Option<Load>,
    pub failed_loads: u32,
    /// Why the last load failed or could not be ordered; empty once one succeeded.
    pub load_error: String,
    /// A failed load is ordered again only after a while.
    pub retry_waits: bool,
    /// No path to a holder was found; nothing about holders has changed since.
    pub stuck: bool,
    /// Newest versions that the receiver can serve to peers, two at most.
    pub holds: BTreeSet<Version>,
    pub probe: Option<(Version, ProbeResult)>,
    pub(super) post: Option<Post>,
}

/// A load order and how far it is.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub order: OrderId,
    pub version: Version,
    pub stage: LoadStage,
    pub bytes: u64,
    pub total: u64,
    pub ordered: Now,
    pub error: String,
    pub fetched_from: BTreeMap<String, u64>,
    pub feed: plan::Feed,
    /// Highest rate of this fetch in any quarter of a second, bytes/s.
    pub ingress: u64,
    /// Bytes of this version given to peers.
    pub served: u64,
}

/// What the fleet knows of an engine and the weights need.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Standing {
    pub linked: bool,
    /// `None`: no load may be ordered, whatever the link (leaving, released, suspect).
    pub stand: Option<Stand>,
    pub preemptible: bool,
}

#[derive(Default)]
pub(crate) struct Receivers {
    all: BTreeMap<SessionId, Receiver>,
    pub(super) front: Front,
    /// Receivers with a load order, by its version.
    loading: BTreeMap<Version, BTreeSet<SessionId>>,
    /// Receivers by the planned parent of a stripe of their load.
    children: BTreeMap<SessionId, BTreeSet<SessionId>>,
    probes: BTreeMap<(String, Version), BTreeSet<SessionId>>,
}

impl Receiver {
    /// Post of the receiver towards the target; `None`: no load may be ordered.
    fn post(&self, target: Version) -> Option<Post> {
        if !self.linked || self.by_trainer {
            return None;
        }
        let stand = self.stand?;
        let at = match stand {
            Stand::Joining | Stand::Syncing => None,
            // Nobody waits for a relay's tokens: the relay loads first.
            Stand::Serving(at) if self.is_relay && at != target => None,
            Stand::Serving(at) | Stand::Updating(at) => Some(at),
        };
        let load = self.load.as_ref();
        let outdated = load
            .filter(|load| load.version != target && load.stage < LoadStage::Quiescing)
            .map(|load| load.version);
        let loading = load.is_some();
        let apart = !matches!(stand, Stand::Joining) && stand != Stand::Serving(target);
        let to = load.map(|load| load.version);
        let (retry_waits, failed) = (self.retry_waits, self.failed_loads);
        let (relay, stuck) = (self.is_relay, self.stuck);
        Some(Post { at, loading, retry_waits, failed, relay, to, stuck, outdated, apart })
    }

    /// True where others can fetch from this receiver over the network.
    pub fn serves(&self) -> bool {
        self.addresses.iter().any(|addr| !addr.starts_with(WITHIN_HOST))
    }

    /// Addresses that a receiver on `host` can dial.
    pub fn addresses_for(&self, host: Option<&String>) -> Vec<String> {
        let near = host.is_some() && self.host.as_ref() == host;
        let dialled = |addr: &&String| near || !addr.starts_with(WITHIN_HOST);
        self.addresses.iter().filter(dialled).cloned().collect()
    }
}

impl Receivers {
    pub fn get(&self, session: SessionId) -> Option<&Receiver> {
        self.all.get(&session)
    }

    /// A session begins, or its agent is back with news of itself.
    pub fn join(&mut self, session: SessionId, hello: &EngineHello, is_relay: bool, key: [u8; 32]) {
        let receiver = self.all.entry(session).or_insert_with(|| Receiver {
            id: hello.id.clone(),
            session,
            kind: String::new(),
            host: None,
            addresses: Vec::new(),
            serve_key: key,
            is_relay,
            by_trainer: false,
            preemptible: false,
            linked: false,
            stand: None,
            load: None,
            failed_loads: 0,
            load_error: String::new(),
            retry_waits: false,
            stuck: false,
            holds: BTreeSet::new(),
            probe: None,
            post: None,
        });
        receiver.kind.clone_from(&hello.kind);
        receiver.host.clone_from(&hello.host);
        receiver.addresses.clone_from(&hello.addresses);
        receiver.is_relay = is_relay;
        receiver.by_trainer = hello.weights_by_trainer;
    }

    pub fn forget(&mut self, session: SessionId) {
        self.change(session, |receiver| (receiver.load, receiver.probe) = (None, None));
        if let Some(receiver) = self.all.remove(&session) {
            self.front.replace(session, receiver.post, None);
        }
    }

    /// Changes a receiver and keeps all indexes in step.
    pub fn change<R>(
        &mut self,
        session: SessionId,
        change: impl FnOnce(&mut Receiver) -> R,
    ) -> Option<R> {
        let receiver = self.all.get_mut(&session)?;
        let load = receiver.load.as_ref().map(|load| (load.order, load.version));
        let old_parents = parents(receiver);
        let probe = receiver.probe.as_ref().map(|(at, _)| (receiver.kind.clone(), *at));
        let result = change(receiver);
        let post = receiver.post(self.front.target());
        self.front.replace(session, receiver.post, post);
        receiver.post = post;
        let now = receiver.load.as_ref().map(|load| (load.order, load.version));
        if load != now {
            let new_parents = parents(receiver);
            if let Some((_, version)) = load {
                take(&mut self.loading, &version, session);
                for parent in old_parents {
                    take(&mut self.children, &parent, session);
                }
            }
            if let Some((_, version)) = now {
                self.loading.entry(version).or_default().insert(session);
                for parent in new_parents {
                    self.children.entry(parent).or_default().insert(session);
                }
            }
        }
        let receiver = self.all.get(&session)?;
        let probe_now = receiver.probe.as_ref().map(|(at, _)| (receiver.kind.clone(), *at));
        if probe != probe_now {
            if let Some(key) = probe {
                take(&mut self.probes, &key, session);
            }
            if let Some(key) = probe_now {
                self.probes.entry(key).or_default().insert(session);
            }
        }
        Some(result)
    }

    /// Another version is the target: every receiver stands anew towards it.
    pub fn retarget(&mut self, target: Version) {
        self.front.clear(target);
        for (session, receiver) in &mut self.all {
            let post = receiver.post(target);
            self.front.replace(*session, None, post);
            receiver.post = post;
        }
    }

    /// Receivers without a path may have one now.
    pub fn unstick(&mut self) {
        for session in self.front.stuck() {
            self.change(session, |receiver| receiver.stuck = false);
        }
    }

    pub fn loading(&self, version: Version) -> impl Iterator<Item = SessionId> {
        self.loading.get(&version).into_iter().flatten().copied()
    }

    /// Receivers whose load has `parent` as a planned parent.
    pub fn children(&self, parent: SessionId) -> impl Iterator<Item = &Receiver> {
        let children = self.children.get(&parent).into_iter().flatten();
        children.filter_map(|session| self.all.get(session))
    }

    /// What another engine of the same kind gave as its probe at this version.
    pub fn reference(&self, session: SessionId, version: Version) -> Option<ProbeResult> {
        let kind = &self.all.get(&session)?.kind;
        let known = self.probes.get(&(kind.clone(), version))?;
        let replica = self.all.get(known.iter().find(|other| **other != session)?)?;
        replica.probe.as_ref().map(|(_, probe)| probe.clone())
    }
}

fn parents(receiver: &Receiver) -> Vec<SessionId> {
    let load = receiver.load.iter();
    load.flat_map(|load| &load.feed.parents).filter_map(|parent| parent.peer()).collect()
}

fn take<K: Ord>(index: &mut BTreeMap<K, BTreeSet<SessionId>>, key: &K, session: SessionId) {
    if let Some(sessions) = index.get_mut(key) {
        sessions.remove(&session);
        if sessions.is_empty() {
            index.remove(key);
        }
    }
}
