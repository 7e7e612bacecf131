//! Attach, re-attach, leases and beats: `impl Core` for everything between the agent and the manager.

use std::collections::BTreeSet;
use std::time::Duration;

use anabranch_proto::pb::{self, data_to_agent, from_agent, to_agent};
use anabranch_proto::{SampleId, Version, protocol};
use anabranch_runtime::Now;

use super::action::{Action, Exit};
use super::event::LinkId;
use super::timer::Timer;
use super::{AgentState, Core, MAX_UNSENT, TICK};

/// The graph is in the header of [`super`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    Down,
    Greeting { link: LinkId },
    Joined { link: LinkId, lease: Duration },
    Bound { link: LinkId, lease: Duration },
}

/// One attachment; it outlives its links.
#[derive(Debug)]
pub(super) struct Session {
    pub id: u64,
    pub manager_epoch: u64,
    /// The life of the engine that it is about.
    pub incarnation: u64,
    pub tick: Duration,
    pub beats: u64,
    /// The engine died: once the manager has the rest, a new session begins with the new incarnation.
    pub ending: bool,
}

impl Session {
    /// A manager that lost its memory may name an old session by accident.
    fn is(&self, welcome: &pb::Welcome) -> bool {
        (self.id, self.manager_epoch) == (welcome.session, welcome.manager_epoch)
    }
}

impl LinkState {
    fn id(self) -> Option<LinkId> {
        match self {
            LinkState::Down => None,
            LinkState::Greeting { link }
            | LinkState::Joined { link, .. }
            | LinkState::Bound { link, .. } => Some(link),
        }
    }

    fn lease(self) -> Option<Duration> {
        match self {
            LinkState::Down | LinkState::Greeting { .. } => None,
            LinkState::Joined { lease, .. } | LinkState::Bound { lease, .. } => Some(lease),
        }
    }
}

/// How long one dial may take until its Welcome; the driver heeds it.
pub const DIAL_PATIENCE: Duration = Duration::from_secs(10);
const FIRST_REDIAL: Duration = Duration::from_millis(100);
const MAX_REDIAL: Duration = Duration::from_secs(5);
/// How long a new incarnation waits until the manager took the rest of the former one.
const REJOIN: Duration = Duration::from_secs(2);
const MIN_LEASE: Duration = Duration::from_millis(100);

impl Core {
    pub(super) fn dial(&mut self) {
        let stopped = matches!(self.state, AgentState::Stopped);
        if stopped || self.link != LinkState::Down || self.engine.is_none() {
            return;
        }
        let link = LinkId(self.next_link);
        self.next_link += 1;
        self.dials += 1;
        self.link = LinkState::Greeting { link };
        self.timers.clear(Timer::Redial);
        let hello = Box::new(self.hello());
        self.act(Action::Dial { link, hello });
    }

    fn hello(&self) -> pb::Hello {
        let info = self.known.as_ref();
        let session = self.session.as_ref();
        let mut caps = info.map(|info| info.caps.clone()).unwrap_or_default();
        caps.weights_by_trainer = self.config.weights_by_trainer;
        pb::Hello {
            proto_min: *protocol::SUPPORTED.start(),
            proto_max: *protocol::SUPPORTED.end(),
            token: self.config.token.clone(),
            engine: Some(pb::Engine {
                id: self.config.id.clone(),
                incarnation: session.map_or(self.incarnation, |session| session.incarnation),
                member: 0,
                members: 1,
            }),
            model: info.map(|info| info.model.clone()),
            caps: Some(caps),
            kv_tokens: info.map_or(0, |info| info.kv_tokens),
            max_running: info.map_or(0, |info| info.max_running),
            gpus: self.config.gpus,
            labels: self.config.labels.clone().into_iter().collect(),
            addresses: self.config.addresses.clone(),
            held: session.map(|_| self.held()).unwrap_or_default(),
            loaded: self.loader.serving().map(|version| version.into()),
            resume_session: session.map_or(0, |session| session.id),
            engine_kind: info.map(|info| info.kind.clone()).unwrap_or_default(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            host: self.config.host.clone(),
        }
    }

    /// Samples whose fate the manager may not know: they run, or their end is not acknowledged.
    fn held(&self) -> Vec<pb::Held> {
        let running = self.runs.held();
        let ended = self.outbox.ends().map(|end| pb::Held {
            sample: end.sample,
            attempt: end.attempt,
            upto: end.at,
        });
        running.chain(ended).collect()
    }

    pub(super) fn manager_said(&mut self, now: Now, link: LinkId, kind: to_agent::Kind) {
        if self.link.id() != Some(link) {
            return;
        }
        self.heard(now);
        match kind {
            to_agent::Kind::Welcome(welcome) => self.welcomed(now, link, welcome),
            to_agent::Kind::Refused(refused) => self.refused(now, link, refused),
            to_agent::Kind::Load(load) => self.load_ordered(now, load),
            to_agent::Kind::Mode(mode) => self.mode_ordered(now, mode),
            to_agent::Kind::BeatAck(_) => {}
        }
    }

    pub(super) fn data_came(&mut self, now: Now, link: LinkId, kind: data_to_agent::Kind) {
        if self.link.id() != Some(link) {
            return;
        }
        self.heard(now);
        match kind {
            data_to_agent::Kind::Prompt(part) => {
                if let Err(error) = self.prompts.add(&part) {
                    tracing::warn!(%error, "dropped a part of a prompt");
                }
            }
            data_to_agent::Kind::Forget(forget) => self.prompts.forget(forget.digest),
            data_to_agent::Kind::Start(start) => self.start(now, start),
            data_to_agent::Kind::Stop(stop) => self.stop(now, stop),
            data_to_agent::Kind::Ack(ack) => {
                if !self.outbox.ack(ack.seq) {
                    tracing::warn!(seq = ack.seq, "the manager acknowledged a tick never sent");
                }
            }
        }
    }

    /// Any byte from the manager keeps the link.
    fn heard(&mut self, now: Now) {
        if let Some(lease) = self.link.lease() {
            self.timers.set(Timer::LinkSilent, now + lease);
        }
    }

    fn welcomed(&mut self, now: Now, link: LinkId, welcome: pb::Welcome) {
        if !matches!(self.link, LinkState::Greeting { .. }) {
            tracing::warn!("a second Welcome on one link: ignored");
            return;
        }
        if !self.convention_fits(&welcome) {
            return;
        }
        let lease = Duration::from_millis(welcome.lease_ms.into()).max(MIN_LEASE);
        self.link = LinkState::Joined { link, lease };
        self.dials = 0;
        self.heard(now);
        self.timers.set(Timer::Beat, now + lease / 3);
        match self.session.as_ref() {
            Some(session) if session.is(&welcome) => self.re_attached(now, &welcome),
            former => {
                let former = former.map(|session| session.id);
                self.attached_anew(now, &welcome, former);
            }
        }
        self.act(Action::ServePeers { job: welcome.job.clone(), key: welcome.serve_key.clone() });
        self.act(Action::Bind { link, session: welcome.session });
    }

    fn convention_fits(&mut self, welcome: &pb::Welcome) -> bool {
        let Some(engine) = &self.engine else { return true };
        let offered = &engine.caps.logprob_conventions;
        if welcome.convention == 0 || offered.contains(&welcome.convention) {
            return true;
        }
        let name = |value: i32| {
            pb::Convention::try_from(value).map_or("unknown", |c| c.as_str_name()).to_owned()
        };
        let offered = offered.iter().map(|value| name(*value)).collect::<Vec<_>>().join(", ");
        self.exit(Exit::Convention { wanted: name(welcome.convention), offered });
        false
    }

    /// Exactly what the manager keeps goes on; the rest is dropped without a word.
    fn re_attached(&mut self, now: Now, welcome: &pb::Welcome) {
        let keep: BTreeSet<(SampleId, u32)> = welcome
            .keep
            .iter()
            .filter_map(|held| Some((SampleId::from(held.sample?), held.attempt)))
            .collect();
        let dropped = self.discard_runs(|sample, attempt| !keep.contains(&(sample, attempt.0)));
        self.outbox.ack(welcome.acked_tick);
        self.outbox.resend_all();
        let (kept, bytes) = (self.runs.live(), self.outbox.bytes());
        tracing::info!(
            session = welcome.session,
            kept,
            dropped,
            resent_bytes = bytes,
            "re-attached"
        );
        self.resend_outcomes();
        let old_life = self.session.as_ref().is_some_and(|s| s.incarnation != self.incarnation);
        if self.engine.is_none() || old_life {
            self.begin_rejoin(now);
        }
    }

    fn attached_anew(&mut self, now: Now, welcome: &pb::Welcome, former: Option<u64>) {
        let dropped = self.discard_runs(|_, _| true);
        self.outbox.clear();
        self.prompts.clear();
        self.unsent.clear();
        self.forget_orders(now);
        let tick = match welcome.tick_ms {
            0 => TICK,
            ms => Duration::from_millis(ms.into()),
        };
        self.session = Some(Session {
            id: welcome.session,
            manager_epoch: welcome.manager_epoch,
            incarnation: self.incarnation,
            tick,
            beats: 0,
            ending: false,
        });
        let (session, incarnation) = (welcome.session, self.incarnation);
        match former {
            None => tracing::info!(session, incarnation, job = welcome.job, "attached"),
            Some(former) => tracing::info!(
                session,
                former,
                incarnation,
                dropped,
                manager_epoch = welcome.manager_epoch,
                "attached as new"
            ),
        }
    }

    fn refused(&mut self, now: Now, link: LinkId, refused: pb::Refused) {
        if !refused.retry {
            self.exit(Exit::Refused { why: refused.why });
            return;
        }
        tracing::warn!(why = refused.why, "the manager does not take this engine now");
        self.act(Action::HangUp { link });
        self.link_down(now, Duration::from_millis(refused.retry_after_ms.into()));
    }

    pub(super) fn bound(&mut self, link: LinkId) {
        match self.link {
            LinkState::Joined { link: joined, lease } if joined == link => {
                self.link = LinkState::Bound { link, lease };
            }
            _ => {}
        }
    }

    pub(super) fn link_lost(&mut self, now: Now, link: LinkId, why: &str, fatal: bool) {
        if self.link.id() != Some(link) {
            return;
        }
        if fatal {
            self.exit(Exit::Refused { why: why.to_owned() });
            return;
        }
        let running = self.runs.live();
        // Every further failed dial is the same story.
        match self.dials {
            0 | 1 => tracing::warn!(why, running, "lost the link to the manager; dialling again"),
            dials => tracing::debug!(why, dials, "no link to the manager yet"),
        }
        self.link_down(now, Duration::ZERO);
    }

    pub(super) fn link_silent(&mut self, now: Now) {
        let Some(link) = self.link.id() else { return };
        self.act(Action::HangUp { link });
        self.link_lost(now, link, "the manager said nothing for a whole lease", false);
    }

    fn link_down(&mut self, now: Now, at_least: Duration) {
        self.link = LinkState::Down;
        self.timers.clear(Timer::LinkSilent);
        self.timers.clear(Timer::Beat);
        if self.session.as_ref().is_some_and(|session| session.ending) {
            // It was about a dead engine, and the manager knows.
            self.session = None;
            self.outbox.clear();
        }
        let backoff = FIRST_REDIAL.saturating_mul(1 << self.dials.min(10)).min(MAX_REDIAL);
        self.timers.set(Timer::Redial, now + backoff.max(at_least));
    }

    pub(super) fn beat(&mut self, now: Now) {
        let Some(lease) = self.link.lease() else { return };
        self.timers.set(Timer::Beat, now + lease / 3);
        let (running, held) = (self.runs.at_engine(), self.runs.waiting());
        let phase = match () {
            () if self.loader.is_loading() => pb::beat::Phase::Loading,
            () if self.paused => pb::beat::Phase::Paused,
            () => pb::beat::Phase::Serving,
        };
        let buffered_bytes = self.outbox.bytes() as u64;
        let (loads, engine_tokens) = (self.loads, self.engine_tokens);
        let Some(session) = self.session.as_mut() else { return };
        session.beats += 1;
        let beat = pb::Beat {
            seq: session.beats,
            running: u32::try_from(running).unwrap_or(u32::MAX),
            waiting: loads.waiting.saturating_add(u32::try_from(held).unwrap_or(u32::MAX)),
            kv_used: loads.kv_used,
            phase: phase.into(),
            buffered_bytes,
            engine_tokens,
        };
        self.act(Action::SendControl(Box::new(from_agent::Kind::Beat(beat))));
    }

    pub(super) fn send_ticks(&mut self, now: Now) {
        if !matches!(self.link, LinkState::Bound { .. }) {
            return;
        }
        while let Some(tick) = self.outbox.next_to_send(now) {
            self.act(Action::SendTick(Box::new(tick)));
        }
    }

    /// An outcome that the manager must learn, now or after the next re-attach.
    pub(super) fn tell(&mut self, kind: from_agent::Kind) {
        match self.link {
            LinkState::Joined { .. } | LinkState::Bound { .. } => {
                self.act(Action::SendControl(Box::new(kind)));
            }
            LinkState::Down | LinkState::Greeting { .. } => {
                if self.unsent.len() == MAX_UNSENT {
                    self.unsent.pop_front();
                }
                self.unsent.push_back(kind);
            }
        }
    }

    /// What the link swallowed cannot be known, so the last word on the load is repeated.
    fn resend_outcomes(&mut self) {
        let last = self.loader.last_report().cloned();
        if let Some(report) = last.filter(|_| self.unsent.is_empty()) {
            self.unsent.push_back(from_agent::Kind::LoadState(report));
        }
        for kind in std::mem::take(&mut self.unsent) {
            self.act(Action::SendControl(Box::new(kind)));
        }
    }

    /// Its samples are lost; with the link up the manager ends the session over it.
    pub(super) fn tell_engine_down(&mut self, why: &str, will_restart: bool) {
        let up = matches!(self.link, LinkState::Joined { .. } | LinkState::Bound { .. });
        if let Some(session) = self.session.as_mut() {
            session.ending |= up;
        }
        let why = why.to_owned();
        self.tell(from_agent::Kind::EngineDown(pb::EngineDown { why, will_restart }));
    }

    /// A new life of the engine is a new session, once the manager has the rest of the old one.
    pub(super) fn begin_rejoin(&mut self, now: Now) {
        let Some(session) = self.session.as_mut() else { return };
        if matches!(self.link, LinkState::Joined { .. } | LinkState::Bound { .. }) {
            session.ending = true;
            self.timers.set(Timer::Rejoin, now + REJOIN);
        }
    }

    /// The manager has everything of the engine's former life: begin the new one.
    pub(super) fn settle_rejoin(&mut self) {
        let ending = self.session.as_ref().is_some_and(|session| session.ending);
        if ending && self.engine.is_some() && self.outbox.is_empty() {
            self.rejoin();
        }
    }

    pub(super) fn rejoin(&mut self) {
        let ending = self.session.as_ref().is_some_and(|session| session.ending);
        if !ending || self.engine.is_none() {
            return;
        }
        self.session = None;
        self.timers.clear(Timer::Rejoin);
        self.outbox.clear();
        if let Some(link) = self.link.id() {
            self.act(Action::HangUp { link });
        }
        self.link = LinkState::Down;
        self.timers.clear(Timer::LinkSilent);
        self.timers.clear(Timer::Beat);
        self.dial();
    }

    pub(super) fn exit(&mut self, exit: Exit) {
        if matches!(self.state, AgentState::Stopped) {
            return;
        }
        self.state = AgentState::Stopped;
        self.timers = anabranch_runtime::TimerTable::new();
        self.act(Action::Exit(exit));
    }

    /// The start-up weights belong to every epoch.
    pub(super) fn serving_version(&self) -> Version {
        self.loader.serving().unwrap_or_else(|| Version::base(0))
    }
}
