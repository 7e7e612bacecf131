//! The link to the manager: `impl Core` for dialling, leases, beats, and what goes out and comes
//! in.

use std::time::Duration;

use anabranch_proto::pb::{self, data_to_agent, from_agent, to_agent};
use anabranch_runtime::{Backoff, BackoffConfig, Now};

use super::action::{Action, ExitReason};
use super::event::LinkId;
use super::life::AgentState;
use super::timer::Timer;
use super::{Core, MAX_UNSENT, check_edge};

/// The connection to the manager.
///
/// ```text
///   Down ──dial──► Greeting ──Welcome──► Joined{lease} ──Data stream──► Bound{lease}
///    ▲                 │                      │                            │
///    └─────────────────┴──────────────────────┴── lost, silent, refused ───┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    /// No connection; the agent dials when `Timer::Redial` fires.
    Down,
    /// Dialled; the manager has not answered the Hello yet.
    Greeting { link: LinkId },
    /// Welcomed; control messages flow, the Data stream is not open yet.
    Joined { link: LinkId, lease: Duration },
    /// Both streams are open.
    Bound { link: LinkId, lease: Duration },
}

impl LinkState {
    /// True if the graph has an edge from this state to `next`. A link never changes its id.
    pub(super) fn may_become(self, next: LinkState) -> bool {
        match (self, next) {
            (_, LinkState::Down) | (LinkState::Down, LinkState::Greeting { .. }) => true,
            (LinkState::Greeting { link }, LinkState::Joined { link: to, .. })
            | (LinkState::Joined { link, .. }, LinkState::Bound { link: to, .. }) => link == to,
            _ => false,
        }
    }

    pub(super) fn id(self) -> Option<LinkId> {
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

/// Time from a dial to its Welcome; the driver gives the link up after it.
pub const DIAL_PATIENCE: Duration = Duration::from_secs(10);

/// Delays between dials, jittered so that a fleet does not dial a restarted manager all at once.
const REDIAL: BackoffConfig =
    BackoffConfig { first: Duration::from_millis(200), max: Duration::from_secs(5), factor: 2.0 };

/// The series of delays of one agent. The seed is its name and life, so that a simulation
/// reproduces.
pub(super) fn redial_backoff(id: &str, incarnation: u64) -> Backoff {
    let digest = blake3::hash(id.as_bytes());
    let [a, b, c, d, e, f, g, h, ..] = *digest.as_bytes();
    let seed = u64::from_le_bytes([a, b, c, d, e, f, g, h]) ^ incarnation;
    Backoff::seeded(REDIAL, seed).expect("the bounds are in order")
}

impl Core {
    /// Assigns the state of the link; no other code does.
    pub(super) fn set_link(&mut self, next: LinkState) {
        check_edge("link", self.link.may_become(next), &self.link, &next);
        self.link = next;
    }

    pub(super) fn dial(&mut self) {
        let stopped = matches!(self.state, AgentState::Stopped);
        if stopped || self.link != LinkState::Down || self.engine.is_none() {
            return;
        }
        let link = LinkId(self.next_link);
        self.next_link += 1;
        self.dials += 1;
        self.set_link(LinkState::Greeting { link });
        self.timers.clear(Timer::Redial);
        let hello = Box::new(self.hello());
        self.act(Action::Dial { link, hello });
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

    /// Renews the lease: any byte from the manager does.
    pub(super) fn heard(&mut self, now: Now) {
        if let Some(lease) = self.link.lease() {
            self.timers.set(Timer::LinkSilent, now + lease);
        }
    }

    pub(super) fn bound(&mut self, link: LinkId) {
        match self.link {
            LinkState::Joined { link: joined, lease } if joined == link => {
                self.set_link(LinkState::Bound { link, lease });
            }
            _ => {}
        }
    }

    fn refused(&mut self, now: Now, link: LinkId, refused: pb::Refused) {
        if !refused.retry {
            self.exit(ExitReason::Refused { why: refused.why });
            return;
        }
        tracing::warn!(why = refused.why, "the manager does not take this engine now");
        self.act(Action::HangUp { link });
        self.link_down(now, Duration::from_millis(refused.retry_after_ms.into()));
    }

    pub(super) fn link_lost(&mut self, now: Now, link: LinkId, why: &str, fatal: bool) {
        if self.link.id() != Some(link) {
            return;
        }
        if fatal {
            self.exit(ExitReason::Refused { why: why.to_owned() });
            return;
        }
        let running = self.attempts.live();
        // A warning for the loss, not for each failed dial after it.
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
        self.set_link(LinkState::Down);
        self.timers.clear(Timer::LinkSilent);
        self.timers.clear(Timer::Beat);
        if self.session.as_ref().is_some_and(|session| session.ending) {
            // The session was about a dead engine, and the manager knows.
            self.session = None;
            self.outbox.clear();
        }
        let delay = self.redial.next_delay();
        self.timers.set(Timer::Redial, now + delay.max(at_least));
    }

    pub(super) fn beat(&mut self, now: Now) {
        let Some(lease) = self.link.lease() else { return };
        self.timers.set(Timer::Beat, now + lease / 3);
        let (running, waiting) = (self.attempts.at_engine(), self.attempts.waiting());
        let phase = match () {
            () if self.loader.is_loading() => pb::beat::Phase::Loading,
            () if self.paused => pb::beat::Phase::Paused,
            () => pb::beat::Phase::Serving,
        };
        let buffered_bytes = self.outbox.bytes() as u64;
        let (utilization, engine_tokens) = (self.utilization, self.engine_tokens);
        let Some(session) = self.session.as_mut() else { return };
        session.beats += 1;
        let beat = pb::Beat {
            seq: session.beats,
            running: u32::try_from(running).unwrap_or(u32::MAX),
            waiting: utilization.waiting.saturating_add(u32::try_from(waiting).unwrap_or(u32::MAX)),
            kv_used: utilization.kv_used,
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

    /// Tells the manager an outcome, now or after the next re-attach.
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
}
