//! Load orders: who loads the current version now, from whom, and how far each engine is.

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_proto::{EngineId, OrderId, SampleId, SessionId, Version};
use anabranch_runtime::clock::Now;

use super::Core;
use super::timer::Timer;
use crate::action::{Action, DialOrder, Holder, LoadOrder, Notice};
use crate::event::{LoadReport, LoadStage, ProbeResult, Verdict};
use crate::fleet::{EngineState, Load};
use crate::weights::plan::Feed;
use crate::weights::rollforward::{self, Pins, Standing, Standpoint};
use crate::weights::versions::Progress;

impl Core {
    /// Orders the current version where it is missing, as the roll-forward allows.
    pub(super) fn order_loads(&mut self, now: Now) {
        let target = self.current;
        if target.is_base() || self.job.is_none() {
            return;
        }
        let pins = self.pins();
        let standings = self.standings(target, &pins);
        let keep_serving = self.job.as_ref().and_then(|job| job.rolling);
        for (session, pin) in rollforward::missing_pins(&standings, &pins) {
            self.order_pinned(now, session, pin);
        }
        let standings = self.standings(target, &pins);
        let wave = rollforward::wave(target, &standings, &pins, keep_serving);
        self.order_wave(now, &wave, target);
    }

    fn standings(&mut self, target: Version, pins: &Pins) -> Vec<Standing> {
        let mut standings = Vec::new();
        let mut outdated = Vec::new();
        for (&session, engine) in &self.engines {
            if engine.link.is_none() || engine.hello.weights_by_trainer {
                continue;
            }
            let at = match engine.state {
                EngineState::Joining | EngineState::Syncing { .. } => Standpoint::Idle,
                // Nobody waits for its tokens: it loads first.
                EngineState::Serving { at } if engine.is_relay() && at != target => {
                    Standpoint::Idle
                }
                EngineState::Serving { at } | EngineState::Updating { from: at, .. } => {
                    Standpoint::Serving(at)
                }
                _ => continue,
            };
            let mut loading = engine.load.is_some();
            if let Some(load) = &engine.load
                && load.version != target
                && !pins.contains_key(&load.version)
                && load.stage < LoadStage::Quiescing
            {
                // Still fetching something older: skip to the newest.
                outdated.push((session, load.order));
                loading = false;
            }
            loading |= self.timers.get(Timer::LoadRetry(session)).is_some();
            let to = engine.load.as_ref().filter(|_| loading).map(|load| load.version);
            standings.push(Standing { session, at, loading, to });
        }
        for (session, order) in outdated {
            if let Some(engine) = self.engines.get_mut(&session) {
                engine.load = None;
            }
            self.timers.clear(Timer::Load(session));
            self.act(Action::CancelLoad { session, order });
        }
        standings
    }

    /// Groups are pinned to a version that no engine has: one engine fetches it, or the groups are given up.
    fn order_pinned(&mut self, now: Now, session: Option<SessionId>, pin: Version) {
        let Some(session) = session else { return };
        let in_directory = self.versions.find(pin).is_some_and(|record| record.directory.is_some());
        match in_directory || !self.feeds(pin, &[session]).is_empty() {
            true => self.order_wave(now, &[session], pin),
            false => {
                let stranded: Vec<_> = self
                    .groups
                    .iter()
                    .filter(|(_, group)| group.pin == Some(pin) && !group.is_over())
                    .map(|(id, _)| *id)
                    .collect();
                for group in stranded {
                    let why =
                        format!("pinned to {pin}, which no engine and no holder has any more");
                    self.give_up_group(now, group, &why, false);
                }
            }
        }
    }

    fn pins(&self) -> Pins {
        let mut pins = Pins::new();
        if !self.pins_in_use {
            return pins;
        }
        for group in self.groups.values() {
            if let Some(pin) = group.pin {
                let open = group.open_samples();
                if open > 0 {
                    *pins.entry(pin).or_default() += open;
                }
            }
        }
        pins
    }

    /// Planned together, so that they feed each other.
    fn order_wave(&mut self, now: Now, wave: &[SessionId], version: Version) {
        let Some(record) = self.versions.find(version).filter(|_| !wave.is_empty()) else { return };
        let in_directory = record.directory.is_some();
        let mut feeds = if in_directory { BTreeMap::new() } else { self.feeds(version, wave) };
        for &session in wave {
            match feeds.remove(&session) {
                Some(feed) => self.order_load(now, session, version, feed),
                None if in_directory => self.order_load(now, session, version, Feed::default()),
                None => self.no_path(session, version),
            }
        }
    }

    /// Told once: it is found again at every event until somebody has the version.
    fn no_path(&mut self, session: SessionId, version: Version) {
        let Some(record) = self.versions.find(version) else { return };
        let serving = record.senders.values().filter(|sender| sender.serves()).count();
        let why = match record.is_served() {
            true if !record.at_trainer() => format!(
                "of its {} senders {serving} serve it, each a part, and no attached engine has all of it",
                record.of
            ),
            true if record.dials() => {
                "the trainer can only dial, and neither this engine nor one that has the version has a listener \
                 (start an agent with --listen, or `anabranch relay`)"
                    .to_owned()
            }
            _ => "the trainer does not serve it any more, and no attached engine has it".to_owned(),
        };
        let Some(engine) = self.engines.get_mut(&session) else { return };
        let error = format!("no path to any holder of {version}: {why}");
        if engine.load_error == error {
            return;
        }
        engine.load_error.clone_from(&error);
        let id = engine.id.clone();
        self.tell(Notice::LoadStage {
            engine: id,
            version,
            stage: LoadStage::Failed,
            bytes: 0,
            ms: 0,
            error,
            fetched_from: BTreeMap::new(),
        });
    }

    fn order_load(&mut self, now: Now, session: SessionId, version: Version, feed: Feed) {
        let Some(record) = self.versions.find(version) else { return };
        let (bytes, directory) = (record.bytes, record.directory.clone());
        let sources = self.holders(session, &feed, version);
        let names =
            sources.iter().map(|source| source.name.clone()).chain(directory.clone()).collect();
        let (stripe_count, streams) = (feed.parents.len() as u32, feed.streams);
        let parents = self.parent_names(&feed.parents);
        let order = self.fresh_order();
        let deadline = Duration::from_millis(self.config.load_deadline_ms);
        let reference = self.reference_probe(session, version);
        let job = self.job.as_ref().expect("order_loads has checked it");
        let (job_name, on_running) = (job.name.clone(), job.on_running);
        for dialling in sources.iter().filter(|source| source.dials) {
            self.order_dial(session, order, version, dialling, feed.streams);
        }
        let engine = self.engines.get_mut(&session).expect("it is in the wave");
        let receiver = engine.id.clone();
        engine.load = Some(Load {
            order,
            version,
            stage: LoadStage::Ordered,
            bytes: 0,
            total: bytes,
            ordered: now,
            error: String::new(),
            fetched_from: BTreeMap::new(),
            feed,
            ingress: 0,
            served: 0,
        });
        if matches!(engine.state, EngineState::Joining | EngineState::Syncing { .. }) {
            engine.state = EngineState::Syncing { to: version };
        }
        self.timers.set(Timer::Load(session), now + deadline);
        let ordered = Progress { parents, ..Progress::at(LoadStage::Ordered) };
        self.note_progress(now, &receiver, version, ordered);
        self.tell(Notice::LoadOrdered { engine: receiver.clone(), version, sources: names });
        self.act(Action::OrderLoad(Box::new(LoadOrder {
            session,
            order,
            version,
            sources,
            stripe_count,
            streams,
            directory,
            bytes,
            on_running,
            deadline,
            reference,
            receiver,
            job: job_name,
        })));
    }

    /// The trainer offers its streams to this receiver, which asks on them.
    fn order_dial(
        &mut self,
        session: SessionId,
        nonce: OrderId,
        version: Version,
        source: &Holder,
        streams: u32,
    ) {
        let (Some(engine), Some(job)) = (self.engines.get(&session), &self.job) else { return };
        let Some(publisher) = source.publisher else { return };
        let order = DialOrder {
            publisher,
            source: source.name.clone(),
            receiver: engine.id.clone(),
            addresses: engine.hello.addresses.clone(),
            serve_key: engine.serve_key,
            job: job.name.clone(),
            version,
            nonce,
            // One more tells what the trainer has.
            streams: streams.max(1) + 1,
        };
        self.act(Action::DialReceiver(Box::new(order)));
    }

    /// What another engine's probe at this version gave, if one of the same kind has it.
    fn reference_probe(&self, session: SessionId, version: Version) -> Option<ProbeResult> {
        let kind = &self.engines.get(&session)?.hello.kind;
        let replica = self.engines.values().find(|engine| {
            engine.session != session
                && engine.hello.kind == *kind
                && engine.probe.as_ref().is_some_and(|(at, _)| *at == version)
        })?;
        replica.probe.as_ref().map(|(_, probe)| probe.clone())
    }

    pub(super) fn load_reported(&mut self, now: Now, session: SessionId, report: LoadReport) {
        self.engine_heard(now, session);
        let Some(engine) = self.engines.get_mut(&session) else { return };
        let Some(load) = engine.load.as_mut().filter(|load| load.order == report.order) else {
            return;
        };
        let changed = load.stage != report.stage;
        load.stage = report.stage;
        load.bytes = report.bytes.max(load.bytes);
        load.error.clone_from(&report.error);
        load.fetched_from.extend(report.fetched_from.clone());
        load.ingress = load.ingress.max(report.ingress);
        load.served = load.served.max(report.served);
        let load = load.clone();
        let (version, bytes, ms) =
            (load.version, load.bytes, now.since(load.ordered).as_millis() as u64);
        if report.holds {
            engine.holds.insert(version);
            while engine.holds.len() > 2 {
                engine.holds.pop_first();
            }
        }
        let id = engine.id.clone();
        self.note_progress(now, &id, version, Progress::of(&load));
        if changed && matches!(report.stage, LoadStage::Staged | LoadStage::Failed) {
            self.note_rates(session, &load, &report);
        }
        if changed {
            self.tell(Notice::LoadStage {
                engine: id,
                version,
                stage: report.stage,
                bytes,
                ms,
                error: report.error.clone(),
                fetched_from: report.fetched_from.clone(),
            });
        }
        match report.stage {
            LoadStage::Quiescing => self.begin_update(now, session, version),
            LoadStage::Active => self.load_done(now, session, version, report),
            LoadStage::Failed => self.load_failed(now, session, &report.error),
            _ => {}
        }
    }

    fn begin_update(&mut self, now: Now, session: SessionId, to: Version) {
        let Some(engine) = self.engines.get(&session) else { return };
        let pinned = |id: &&SampleId| {
            self.groups.get(&id.group).and_then(|group| group.pin).is_some_and(|pin| pin != to)
        };
        let leave: Vec<SampleId> = engine.running.keys().filter(pinned).copied().collect();
        for sample in leave {
            self.take_off(now, sample, "pinned to the version that goes");
            self.requeue(now, sample);
        }
        let Some(engine) = self.engines.get_mut(&session) else { return };
        if let EngineState::Serving { at } = engine.state {
            engine.state = EngineState::Updating { from: at, to };
        }
    }

    fn load_done(&mut self, now: Now, session: SessionId, version: Version, report: LoadReport) {
        let Some(engine) = self.engines.get_mut(&session) else { return };
        if report.version != version {
            let what = format!("was ordered {version}, reports {} active", report.version);
            let engine = engine.id.clone();
            self.tell(Notice::PeerMisbehaved { engine, what: what.clone() });
            return self.load_failed(now, session, &what);
        }
        engine.load = None;
        engine.failed_loads = 0;
        engine.load_error.clear();
        engine.hello.loaded = version;
        let verdict = report.probe.as_ref().map(|probe| probe.verdict);
        engine.probe = report.probe.map(|probe| (version, probe));
        self.timers.clear(Timer::Load(session));
        self.serve(now, session, version, verdict);
        self.check_settled(now, version);
    }

    pub(super) fn set_serving(&mut self, now: Now, session: SessionId, version: Version) {
        self.serve(now, session, version, None);
    }

    fn serve(&mut self, _now: Now, session: SessionId, version: Version, probe: Option<Verdict>) {
        let Some(engine) = self.engines.get_mut(&session) else { return };
        let live = matches!(
            engine.state,
            EngineState::Joining
                | EngineState::Syncing { .. }
                | EngineState::Updating { .. }
                | EngineState::Serving { .. }
                | EngineState::Suspect { .. }
        );
        if !live {
            return;
        }
        engine.state = EngineState::Serving { at: version };
        let engine = engine.id.clone();
        self.placeable = true;
        self.tell(Notice::EngineServing { engine, version, probe });
    }

    /// The old version keeps serving, and the load is ordered again after a while.
    fn load_failed(&mut self, now: Now, session: SessionId, why: &str) {
        let base = self.config.load_retry_ms;
        let Some(engine) = self.engines.get_mut(&session) else { return };
        engine.load = None;
        engine.failed_loads += 1;
        engine.load_error = why.to_owned();
        if let EngineState::Updating { from, .. } = engine.state {
            engine.state = EngineState::Serving { at: from };
        }
        let wait = Duration::from_millis(base << engine.failed_loads.saturating_sub(1).min(5));
        self.timers.clear(Timer::Load(session));
        self.timers.set(Timer::LoadRetry(session), now + wait);
        self.placeable = true;
    }

    pub(super) fn load_overdue(&mut self, now: Now, session: SessionId) {
        let Some(engine) = self.engines.get(&session) else { return };
        let Some(load) = engine.load.clone() else { return };
        let id = engine.id.clone();
        self.act(Action::CancelLoad { session, order: load.order });
        let error = format!("not done within {} ms", self.config.load_deadline_ms);
        let failed = Load { stage: LoadStage::Failed, error: error.clone(), ..load };
        self.note_progress(now, &id, failed.version, Progress::of(&failed));
        self.load_failed(now, session, &error);
    }

    fn note_progress(&mut self, now: Now, engine: &EngineId, version: Version, news: Progress) {
        let Some(record) = self.versions.get_mut(version.number) else { return };
        let since_sealed = record.sealed.map_or(Duration::ZERO, |sealed| now.since(sealed));
        let parents = match record.engines.get(engine) {
            Some(before) if news.stage != LoadStage::Ordered => before.parents.clone(),
            _ => news.parents.clone(),
        };
        let progress = Progress { since_sealed, parents, ..news };
        record.engines.insert(engine.clone(), progress);
        self.tell_publisher(version);
    }
}
