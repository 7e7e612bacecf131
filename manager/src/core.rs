//! The deciding core: holds the owners (job, work, engines, weights), the deadlines and the outbox. Sees facts,
//! never tokens. Its coordinators are the files beside this one: each asks one owner and tells another.
//!
//! Methods are of three kinds. *Inputs*: [`Core::handle`]. *Outputs*: [`Core::poll_action`] until `None` after
//! each input, then [`Core::next_timeout`]: call `handle(now, TimePassed)` when that time comes. *Views*:
//! [`Core::state`]. The core does no I/O, reads no clock, and iterates only ordered maps, so a seed reproduces.
//!
//! Durable state changes only by the owners' `apply(&Change)`; [`Core::take_changes`] gives the changes of a turn.
//! Links, leases, timers, loads in progress, the plan, credit and the outbox are volatile.

pub mod config;

mod admitting;
mod attaching;
mod check;
mod delivering;
mod facts;
mod fold;
mod leasing;
mod losing;
mod opening;
mod parting;
mod placing;
mod rolling;
mod switching;

use anabranch_proto::{SampleId, SessionId};
use anabranch_runtime::clock::Now;

use self::config::CoreConfig;
use crate::action::Action;
use crate::event::Event;
use crate::fleet::{EngineState, Fleet};
use crate::job::Job;
use crate::outbox::Outbox;
use crate::rollout::{Moment, Rollout};
use crate::timer::Timer;
use crate::weights::{Stand, Standing, Weights};

pub use fold::{Changes, Folded, Move, graphs};

pub struct Core {
    pub(crate) config: CoreConfig,
    pub(crate) job: Job,
    pub(crate) rollout: Rollout,
    pub(crate) fleet: Fleet,
    pub(crate) weights: Weights,
    pub(crate) out: Outbox,
    mode_switch: Option<switching::Switch>,
    started: Now,
}

impl Core {
    pub fn new(config: CoreConfig, now: Now) -> Self {
        Self {
            config,
            job: Job::default(),
            rollout: Rollout::default(),
            fleet: Fleet::default(),
            weights: Weights::default(),
            out: Outbox::default(),
            mode_switch: None,
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
        self.out.poll()
    }

    pub fn next_timeout(&self) -> Option<Now> {
        self.out.timers.next()
    }

    /// Engines, samples, groups and queue places that the core has looked at, since it started.
    pub fn visited(&self) -> u64 {
        self.out.visited()
    }

    pub(crate) fn uptime(&self, now: Now) -> std::time::Duration {
        now.since(self.started)
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
                self.rollout.credit(consumer, bytes, samples);
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
            Event::PublisherLost { publisher } => self.weights.lose_publisher(publisher),
            Event::TimePassed { .. } => {}
            engine_event => self.dispatch_engine(now, engine_event),
        }
    }

    fn dispatch_engine(&mut self, now: Now, event: Event) {
        match event {
            Event::EngineAttached { link, hello } => self.attach_engine(now, link, *hello),
            Event::LinkLost { link, why } => self.lose_link(now, link, why),
            Event::EngineHeard { session, tokens } => {
                self.engine_heard(now, session);
                self.fleet.note_tokens(session, tokens);
                self.out.counters.tokens += tokens;
            }
            Event::EngineBeat { session, kv_used, .. } => self.engine_beat(now, session, kv_used),
            Event::EngineDied { session, why } => self.part_with(now, session, &why, true),
            Event::PreemptionNoticed { session, within, why } => {
                self.preempted(now, session, within, &why);
            }
            Event::LoadReported { session, report } => self.load_reported(now, session, *report),
            Event::ModeReported { session, order, report } => {
                self.mode_reported(now, session, order, report);
            }
            Event::FactsFound { session, facts } => self.facts_found(now, session, facts),
            Event::SilenceFound { session, silent } => self.silence_found(now, session, &silent),
            Event::PageCleared { sample, tokens } => {
                self.rollout.cleared(sample, tokens, &mut self.out);
            }
            Event::PageFrozen { sample, kept, oldest } => {
                self.rollout.frozen(self.at(now), sample, (kept, oldest), &mut self.out);
            }
            Event::DrainRequested { engine, deadline, reply } => {
                self.drain_requested(now, &engine, deadline, reply);
            }
            Event::RemoveRequested { engine, reply } => self.remove_requested(now, &engine, reply),
            _ => debug_assert!(false, "dispatch has taken every other event"),
        }
    }

    fn fire_timers(&mut self, now: Now) {
        while let Some(timer) = self.out.timers.pop_due(now) {
            match timer {
                Timer::Lease(session) => self.suspect(now, session, "lease over"),
                Timer::Reattach(session) => self.grace_over(now, session),
                Timer::Drain(session) => {
                    self.part_with(now, session, "drain deadline over", false);
                }
                Timer::Quarantine(session) => self.quarantine_over(session),
                Timer::Load(session) => self.load_overdue(now, session),
                Timer::Rested(session) => {
                    self.fleet.rested(session);
                    self.out.wake_placement();
                }
                Timer::LoadRetry(session) => self.weights.retry(session),
                // They are ordered at the end of the turn.
                Timer::Orders => self.weights.order_more(),
                Timer::Tidings(version) => {
                    self.weights.tell_publishers(now, version, &mut self.out);
                }
                Timer::Leader(group) => self.rollout.release_siblings(group, &mut self.out),
                Timer::Group(group) => self.group_overdue(now, group),
                Timer::Flush(step) => self.rollout.flush(self.at(now), step, &mut self.out),
                Timer::ModeSwitch => self.mode_switch_over(now),
                Timer::TrainerLost => self.trainer_lost(now),
            }
        }
    }

    /// What follows from any change: versions move on, loads are ordered, samples placed, batches sent.
    fn settle(&mut self, now: Now) {
        self.advance_current(now);
        self.order_loads(now);
        if self.out.take_placeable() {
            self.place(now);
        }
        self.weights.check_settled(now, &mut self.out);
        self.rollout.send_batches(&mut self.out);
    }

    fn at(&self, now: Now) -> Moment {
        Moment { now, current: self.weights.current() }
    }

    /// Moves an engine along its graph, and tells the other owners where it stands.
    fn set_engine(&mut self, session: SessionId, to: EngineState) {
        self.fleet.set_state(session, to);
        self.follow(session);
    }

    /// Tells weights and rollout where an engine stands, after its state or link has changed.
    fn follow(&mut self, session: SessionId) {
        let Some(engine) = self.fleet.engine(session) else { return };
        let (stand, leaving) = match *engine.state() {
            EngineState::Joining => (Some(Stand::Joining), false),
            EngineState::Syncing { .. } => (Some(Stand::Syncing), false),
            EngineState::Serving { at } => (Some(Stand::Serving(at)), false),
            EngineState::Updating { from, .. } => (Some(Stand::Updating(from)), false),
            EngineState::Draining { .. } => (None, true),
            _ => (None, false),
        };
        let linked = engine.link.is_some();
        let preemptible = leaving || self.fleet.is_preemptible(engine);
        self.rollout.engine_at(session, engine.version().map(|at| at.number));
        self.weights.stand(session, Standing { linked, stand, preemptible });
    }

    /// Takes a running sample off its engine: fenced off there, and not queued yet.
    fn take_off(&mut self, id: SampleId, why: &'static str) {
        let running = self.rollout.sample(id).and_then(|sample| sample.running_on());
        let Some((session, attempt)) = running else { return };
        self.detach(id, session);
        self.out.act(Action::Stop { session, sample: id, attempt, why });
    }

    /// Takes a sample out of an engine's books, and back to waiting.
    fn detach(&mut self, id: SampleId, session: SessionId) {
        if let Some(digest) = self.fleet.remove(session, id) {
            self.out.act(Action::ForgetPrompt { session, digest });
        }
        self.rollout.left(id, &mut self.out);
    }
}

#[cfg(test)]
mod tests;
