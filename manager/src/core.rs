//! The deciding core: owns jobs, groups, engines, versions and batches; sees facts, never tokens.
//!
//! Methods are of three kinds. *Inputs*: [`Core::handle`]. *Outputs*: [`Core::poll_action`] until `None` after
//! each input, then [`Core::next_timeout`]: call `handle(now, TimePassed)` when it comes. *Views*:
//! [`Core::state`]. It does no I/O, reads no clock, iterates only ordered maps, so a seed reproduces.

pub mod config;
mod job;
pub mod timer;

mod check;
mod deliver;
mod engines;
mod feeding;
mod leases;
mod loads;
mod modes;
mod placing;
mod publishing;
mod samples;
mod trainer;
mod weights;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use anabranch_proto::{EngineId, GroupId, OrderId, SampleId, SessionId, Step, Version};
use anabranch_runtime::clock::{Now, TimerTable};

use self::config::CoreConfig;
use self::job::Job;
use self::timer::Timer;
use crate::action::{Action, Answer, FailKind, Notice};
use crate::event::{Event, LinkId, Pack, ReplyTo};
use crate::fleet::{Engine, Record};
use crate::rollout::egress::Egress;
use crate::rollout::group::Group;
use crate::rollout::microbatch::Pool;
use crate::rollout::queue::Queue;
use crate::view::state::Counters;
use crate::weights::versions::Versions;

pub struct Core {
    pub(crate) config: CoreConfig,
    pub(crate) job: Option<Job>,
    // Work
    pub(crate) groups: BTreeMap<GroupId, Group>,
    /// Idempotency: keys of this (job, epoch). Grows by one short string a group, for the epoch's life.
    pub(crate) keys: BTreeMap<Arc<str>, GroupId>,
    pub(crate) steps: BTreeMap<Step, StepState>,
    /// Committed whole: eight bytes a step, for the epoch's life.
    pub(crate) past_steps: BTreeSet<Step>,
    pub(crate) queue: Queue,
    pub(crate) admitted_tokens: u64,
    /// Some group was ever pinned: else nobody looks for pins.
    pub(crate) pins_in_use: bool,
    pub(crate) pack: Option<Pack>,
    pub(crate) egress: Egress,
    // Engines
    pub(crate) engines: BTreeMap<SessionId, Engine>,
    pub(crate) by_id: BTreeMap<EngineId, SessionId>,
    pub(crate) by_link: BTreeMap<LinkId, SessionId>,
    pub(crate) records: BTreeMap<EngineId, Record>,
    pub(crate) mode_switch: Option<modes::Switch>,
    pub(crate) training: bool,
    // Weights
    pub(crate) current: Version,
    pub(crate) versions: Versions,
    // Plumbing
    pub(crate) timers: TimerTable<Timer>,
    pub(crate) counters: Counters,
    actions: VecDeque<Action>,
    next_id: u64,
    /// Something changed that may let a sample be placed.
    placeable: bool,
    started: Now,
}

/// A training step, as far as work and batches go.
#[derive(Default)]
pub(crate) struct StepState {
    pub is_final: bool,
    pub groups: BTreeSet<GroupId>,
    pub open_groups: u32,
    pub pool: Pool,
    pub delivered: u64,
    pub tokens: u64,
    pub discarded_tokens: u64,
    pub max_lag: u64,
    pub short: Vec<crate::action::ShortGroup>,
    pub dropped: Vec<crate::action::ShortGroup>,
    pub over: bool,
}

impl Core {
    pub fn new(config: CoreConfig, now: Now) -> Self {
        Self {
            config,
            job: None,
            groups: BTreeMap::new(),
            keys: BTreeMap::new(),
            steps: BTreeMap::new(),
            past_steps: BTreeSet::new(),
            queue: Queue::default(),
            admitted_tokens: 0,
            pins_in_use: false,
            pack: None,
            egress: Egress::default(),
            engines: BTreeMap::new(),
            by_id: BTreeMap::new(),
            by_link: BTreeMap::new(),
            records: BTreeMap::new(),
            mode_switch: None,
            training: false,
            current: Version::base(0),
            versions: Versions::default(),
            timers: TimerTable::new(),
            counters: Counters::default(),
            actions: VecDeque::new(),
            next_id: 0,
            placeable: false,
            started: now,
        }
    }

    /// Takes in what happened. Deadlines that are due by `now` fire first, except after the process itself
    /// was stopped: then its own gap is not held against anybody.
    pub fn handle(&mut self, now: Now, event: Event) {
        match event {
            Event::TimePassed { gap } if !gap.is_zero() => self.forgive(now, gap),
            _ => {}
        }
        self.fire_timers(now);
        self.dispatch(now, event);
        self.settle(now);
    }

    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub fn next_timeout(&self) -> Option<Now> {
        self.timers.next()
    }

    fn dispatch(&mut self, now: Now, event: Event) {
        match event {
            Event::JobOpened { open, reply } => self.open_job(now, *open, reply),
            Event::TrainerHeard => self.trainer_heard(now),
            Event::JobClosed { session, cancel_running, reply } => {
                self.close_job(now, session, cancel_running, reply);
            }
            Event::GroupsSubmitted { session, step, is_final, groups, reply } => {
                self.submit(now, session, step, is_final, groups, reply);
            }
            Event::GroupsCancelled { session, what, keep_partial, reply } => {
                self.cancel(now, session, what, keep_partial, reply);
            }
            Event::ConsumerAttached { session, consumer, pack, shard } => {
                self.attach_consumer(now, session, consumer, pack, shard);
            }
            Event::ConsumerLost { consumer } => self.lose_consumer(now, consumer),
            Event::CreditGranted { consumer, bytes, samples } => {
                self.egress.credit(consumer, bytes, samples);
            }
            Event::BatchAcked { consumer, seq } => self.ack(now, consumer, seq),
            Event::BatchCommitted { consumer, seq } => self.commit(now, consumer, seq),
            Event::ModeRequested { session, train, deadline, reply } => {
                self.switch_mode(now, session, train, deadline, reply);
            }
            Event::EngineReported { session, engine, version, reply } => {
                self.attest(now, session, engine, version, reply);
            }
            Event::VersionAnnounced { publisher, announce, reply } => {
                self.announce(now, publisher, *announce, reply);
            }
            Event::VersionSealed { publisher, version, reply } => {
                self.seal(now, publisher, version, reply);
            }
            Event::PublisherLost { publisher } => self.lose_publisher(now, publisher),
            Event::TimePassed { .. } => {}
            engine_event => self.dispatch_engine(now, engine_event),
        }
    }

    fn dispatch_engine(&mut self, now: Now, event: Event) {
        match event {
            Event::EngineAttached { link, hello } => self.attach_engine(now, link, *hello),
            Event::LinkLost { link, why } => self.lose_link(now, link, why),
            Event::EngineHeard { session } => self.engine_heard(now, session),
            Event::EngineBeat { session, kv_used, .. } => self.engine_beat(now, session, kv_used),
            Event::EngineDied { session, why } => self.engine_died(now, session, why),
            Event::PreemptionNoticed { session, within, why } => {
                self.preempted(now, session, within, why);
            }
            Event::LoadReported { session, report } => self.load_reported(now, session, *report),
            Event::ModeReported { session, order, report } => {
                self.mode_reported(now, session, order, report);
            }
            Event::FactsFound { session, facts } => self.facts_found(now, session, facts),
            Event::DrainRequested { engine, deadline, reply } => {
                self.drain_requested(now, engine, deadline, reply);
            }
            Event::RemoveRequested { engine, reply } => self.remove_requested(now, engine, reply),
            _ => debug_assert!(false, "dispatch has taken every other event"),
        }
    }

    fn fire_timers(&mut self, now: Now) {
        while let Some(timer) = self.timers.pop_due(now) {
            match timer {
                Timer::Lease(session) => self.lease_over(now, session),
                Timer::Reattach(session) => self.grace_over(now, session),
                Timer::Progress(session) => self.look_for_silence(now, session),
                Timer::Drain(session) => self.drain_over(now, session),
                Timer::Quarantine(session) => self.quarantine_over(now, session),
                Timer::Load(session) => self.load_overdue(now, session),
                Timer::Rested(_) => self.placeable = true,
                // Settling after the timer orders it again.
                Timer::LoadRetry(_) => {}
                Timer::Leader(group) => self.release_siblings(group),
                Timer::Group(group) => self.group_overdue(now, group),
                Timer::Flush(step) => self.flush(now, step),
                Timer::ModeSwitch => self.mode_switch_over(now),
                Timer::TrainerLost => self.trainer_lost(now),
            }
        }
    }

    /// What follows from any change: versions move on, loads are ordered, samples placed, batches sent.
    fn settle(&mut self, now: Now) {
        self.advance_current(now);
        self.order_loads(now);
        if std::mem::take(&mut self.placeable) {
            self.place(now);
        }
        self.send_batches();
    }

    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    fn tell(&mut self, notice: Notice) {
        self.actions.push_back(Action::Emit(notice));
    }

    fn reply(&mut self, to: ReplyTo, answer: Answer) {
        self.actions.push_back(Action::Reply { to, answer });
    }

    fn fail(&mut self, to: ReplyTo, kind: FailKind, why: impl Into<String>) {
        self.reply(to, Answer::Failed { why: why.into(), kind });
    }

    fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn fresh_order(&mut self) -> OrderId {
        OrderId(self.fresh_id())
    }

    pub(crate) fn sample(&self, id: SampleId) -> Option<&crate::rollout::sample::Sample> {
        self.groups.get(&id.group)?.samples.get(id.index as usize)
    }

    fn sample_mut(&mut self, id: SampleId) -> Option<&mut crate::rollout::sample::Sample> {
        self.groups.get_mut(&id.group)?.samples.get_mut(id.index as usize)
    }

    pub(crate) fn uptime(&self, now: Now) -> std::time::Duration {
        now.since(self.started)
    }
}

#[cfg(test)]
mod tests;
