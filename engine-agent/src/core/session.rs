//! Sessions with the manager: `impl Core` for attach, re-attach and the end of a session.

use std::collections::BTreeSet;
use std::time::Duration;

use anabranch_proto::pb::{self, from_agent};
use anabranch_proto::{LogprobsMode, SampleId, protocol};
use anabranch_runtime::Now;

use super::action::{Action, ExitReason};
use super::event::LinkId;
use super::link::LinkState;
use super::timer::Timer;
use super::{Core, TICK};

/// One attachment to a manager. A session outlives its links.
#[derive(Debug)]
pub(super) struct Session {
    pub id: u64,
    pub manager_epoch: u64,
    /// Incarnation of the engine that the session is about.
    pub incarnation: u64,
    pub tick: Duration,
    pub beats: u64,
    /// True after the engine died: once the manager has the rest, a new session with the new
    /// incarnation begins.
    pub ending: bool,
}

impl Session {
    /// True if `welcome` continues this session. The epoch is compared too: a manager that lost its
    /// memory may reuse an id.
    fn is(&self, welcome: &pb::Welcome) -> bool {
        (self.id, self.manager_epoch) == (welcome.session, welcome.manager_epoch)
    }
}

/// Longest wait of a new incarnation until the manager took the rest of the former one.
const REJOIN: Duration = Duration::from_secs(2);
const MIN_LEASE: Duration = Duration::from_millis(100);

impl Core {
    pub(super) fn hello(&self) -> pb::Hello {
        let info = self.known.as_ref();
        let session = self.session.as_ref();
        let mut caps = info.map(|info| pb::Caps::from(info.caps.clone())).unwrap_or_default();
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
            model: info.map(|info| info.model.clone().into()),
            caps: Some(caps),
            kv_tokens: info.map_or(0, |info| info.kv_tokens),
            max_running: info.map_or(0, |info| info.max_running),
            gpus: self.config.gpus,
            labels: self.config.labels.clone().into_iter().collect(),
            addresses: self.config.addresses.iter().map(ToString::to_string).collect(),
            held: session.map(|_| self.held()).unwrap_or_default(),
            loaded: self.loader.serving().map(|version| version.into()),
            resume_session: session.map_or(0, |session| session.id),
            engine_kind: info.map(|info| info.kind.clone()).unwrap_or_default(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            host: self.config.host.clone(),
        }
    }

    pub(super) fn welcomed(&mut self, now: Now, link: LinkId, welcome: pb::Welcome) {
        if !matches!(self.link, LinkState::Greeting { .. }) {
            tracing::warn!("a second Welcome on one link: ignored");
            return;
        }
        if !self.logprobs_mode_fits(&welcome) {
            return;
        }
        let lease = Duration::from_millis(welcome.lease_ms.into()).max(MIN_LEASE);
        self.set_link(LinkState::Joined { link, lease });
        self.dials = 0;
        self.redial.reset();
        self.heard(now);
        self.timers.set(Timer::Beat, now + lease / 3);
        match self.session.as_ref() {
            Some(session) if session.is(&welcome) => self.re_attached(now, &welcome),
            former => {
                let former = former.map(|session| session.id);
                self.attached_anew(now, &welcome, former);
            }
        }
        self.act(Action::ServePeers { key: welcome.serve_key.clone() });
        self.act(Action::Bind { link, session: welcome.session });
    }

    fn logprobs_mode_fits(&mut self, welcome: &pb::Welcome) -> bool {
        let Some(engine) = &self.engine else { return true };
        let offered = &engine.caps.logprobs_modes;
        let wanted = match LogprobsMode::from_wire("welcome.convention", welcome.convention) {
            Ok(None) => return true,
            Ok(Some(mode)) if offered.contains(&mode) => return true,
            Ok(Some(mode)) => mode.name(),
            Err(_) => "unknown",
        };
        let offered = offered.iter().map(|mode| mode.name()).collect::<Vec<_>>().join(", ");
        self.exit(ExitReason::LogprobsMode { wanted: wanted.to_owned(), offered });
        false
    }

    /// Continues the session. Attempts that the manager keeps go on, with the unacknowledged ticks
    /// sent again; all others are discarded without a report.
    fn re_attached(&mut self, now: Now, welcome: &pb::Welcome) {
        let keep: BTreeSet<(SampleId, u32)> = welcome
            .keep
            .iter()
            .filter_map(|held| Some((SampleId::from(held.sample?), held.attempt)))
            .collect();
        let dropped = self.discard_attempts(|sample, attempt| !keep.contains(&(sample, attempt.0)));
        // The manager sends each prompt once more over the new link; attempts that go on have theirs.
        self.prompts.clear();
        self.outbox.ack(welcome.acked_tick);
        self.outbox.resend_all();
        let (kept, bytes) = (self.attempts.live(), self.outbox.bytes());
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
        let dropped = self.discard_attempts(|_, _| true);
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

    /// Tells the outcomes that no link could take. The last report on a load is repeated, because
    /// the lost link may have swallowed it.
    fn resend_outcomes(&mut self) {
        let last = self.loader.last_report().cloned();
        if let Some(report) = last.filter(|_| self.unsent.is_empty()) {
            self.unsent.push_back(from_agent::Kind::LoadState(report));
        }
        for kind in std::mem::take(&mut self.unsent) {
            self.act(Action::SendControl(Box::new(kind)));
        }
    }

    /// Tells the manager that the engine died. With the link up the manager ends the session.
    pub(super) fn tell_engine_down(&mut self, why: &str, will_restart: bool) {
        let up = matches!(self.link, LinkState::Joined { .. } | LinkState::Bound { .. });
        if let Some(session) = self.session.as_mut() {
            session.ending |= up;
        }
        let why = why.to_owned();
        self.tell(from_agent::Kind::EngineDown(pb::EngineDown { why, will_restart }));
    }

    /// Ends the session after the engine's restart, once the manager has the rest of the former
    /// life.
    pub(super) fn begin_rejoin(&mut self, now: Now) {
        let Some(session) = self.session.as_mut() else { return };
        if matches!(self.link, LinkState::Joined { .. } | LinkState::Bound { .. }) {
            session.ending = true;
            self.timers.set(Timer::Rejoin, now + REJOIN);
        }
    }

    /// Begins the new session as soon as the manager has everything of the engine's former life.
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
        self.set_link(LinkState::Down);
        self.timers.clear(Timer::LinkSilent);
        self.timers.clear(Timer::Beat);
        self.dial();
    }

    /// Attempts whose fate the manager may not know: they run, or their end is not acknowledged.
    fn held(&self) -> Vec<pb::Held> {
        let running = self.attempts.held();
        let ended = self.outbox.ends().map(|end| pb::Held {
            sample: end.sample,
            attempt: end.attempt,
            upto: end.at,
        });
        running.chain(ended).collect()
    }
}
