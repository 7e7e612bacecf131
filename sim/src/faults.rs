//! The faults of a world, and how each heals.

use std::time::Duration;

use anabranch_manager::event::{CancelWhat, Event};
use anabranch_proto::pb::end::Why;
use anabranch_proto::{BatchSeq, EngineId, Step};

use crate::trainer::Phase;
use crate::world::{Happening, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// Agent and engine die; the manager sees the reset.
    Kill,
    /// Agent and engine die, and nobody hears of it before the lease is over.
    SilentDeath,
    /// The engine process dies; its agent says so and starts it again.
    EngineDown,
    /// The engine makes no token for a while.
    Stall,
    /// The engine generates slower for a while.
    Slow,
    /// One stream ends cleanly without a finish.
    CleanEnd,
    /// Finishes are lost for a while.
    LostFinish,
    /// The link is cut, and comes back.
    Partition,
    /// The link breaks and is dialled again at once.
    Reset,
    /// Ticks come twice.
    Repeat,
    /// A tick has a token outside the vocabulary.
    Garbage,
    /// The engine is drained.
    Drain,
    /// The engine is removed.
    Remove,
    /// The load that runs fails.
    FailedLoad,
    /// A consumer's stream breaks.
    ConsumerReset,
    /// The trainer dies and starts again from its checkpoint.
    TrainerRestart,
    /// The manager's process is stopped for a while.
    ManagerPause,
    /// Some groups, a step, or all groups are cancelled.
    Cancel,
    /// The machine is taken away, with notice.
    Preemption,
    /// A load hangs until its deadline.
    StuckLoad,
    /// The agent's buffer is full.
    Busy,
    /// The engine says that a request is wrong.
    Refusal,
    /// A second stream attaches for a shard while the first still stands.
    ConsumerTakeover,
    /// The publishers' streams break.
    PublisherReset,
    /// An agent of an older life dials.
    Ghost,
}

const ALL: &[Fault] = &[
    Fault::Kill,
    Fault::Kill,
    Fault::SilentDeath,
    Fault::EngineDown,
    Fault::Stall,
    Fault::Slow,
    Fault::CleanEnd,
    Fault::CleanEnd,
    Fault::LostFinish,
    Fault::Partition,
    Fault::Partition,
    Fault::Reset,
    Fault::Repeat,
    Fault::Garbage,
    Fault::Drain,
    Fault::Remove,
    Fault::FailedLoad,
    Fault::ConsumerReset,
    Fault::TrainerRestart,
    Fault::ManagerPause,
    Fault::Cancel,
    Fault::Preemption,
    Fault::StuckLoad,
    Fault::Busy,
    Fault::Refusal,
    Fault::ConsumerTakeover,
    Fault::PublisherReset,
    Fault::Ghost,
];

impl World {
    pub(crate) fn strike(&mut self) {
        let fault = *self.rng.pick(ALL).unwrap_or(&Fault::Kill);
        let engine = self.rng.range(0, self.engines.len() as u64) as usize;
        self.note(format!("fault {fault:?} at engine {engine}"));
        *self.outcome.faults.entry(format!("{fault:?}")).or_default() += 1;
        match fault {
            Fault::Repeat => self.repeat_ticks(engine),
            Fault::ConsumerReset => self.reset_consumer(),
            Fault::TrainerRestart => self.restart_trainer(),
            Fault::ManagerPause => self.pause_manager(),
            Fault::Cancel => self.cancel_some(),
            Fault::ConsumerTakeover => self.take_over_consumer(),
            Fault::PublisherReset => self.reset_publishers(),
            _ => self.strike_engine(fault, engine),
        }
    }

    fn strike_engine(&mut self, fault: Fault, engine: usize) {
        if !self.engines[engine].alive {
            return;
        }
        let now = self.now;
        let a_while = Duration::from_millis(self.rng.range(100, 9_000));
        match fault {
            Fault::Kill => self.kill(engine, a_while, true),
            Fault::SilentDeath => self.kill(engine, a_while, false),
            Fault::EngineDown => self.engine_down(engine, a_while),
            Fault::Stall => self.engines[engine].stalled_until = now + a_while,
            Fault::Slow => {
                self.engines[engine].slow = self.rng.range(2, 10);
                self.after(a_while, Happening::Recover { engine });
            }
            Fault::CleanEnd => self.end_one(engine, Why::Lost),
            Fault::Busy => self.end_one(engine, Why::Busy),
            Fault::Refusal => self.end_one(engine, Why::Refused),
            Fault::Preemption => {
                // Not of a session that the manager has given up: it is revived there.
                let agent = &self.engines[engine];
                let live = agent.link.filter(|link| self.links.contains_key(link) && agent.net_up);
                let Some(session) = agent.session.filter(|_| live.is_some()) else { return };
                self.core_event(Event::PreemptionNoticed {
                    session,
                    within: a_while,
                    why: "spot".into(),
                });
                self.after(a_while, Happening::Preempted { engine });
            }
            Fault::StuckLoad => {
                if let Some(load) = self.engines[engine].load.as_mut() {
                    load.stuck = self.scenario.fleet.load_deadline < Duration::from_secs(60);
                }
            }
            Fault::Ghost => self.dial_as_ghost(engine),
            Fault::LostFinish => {
                self.lose_finishes_at = Some((engine, now + a_while));
            }
            Fault::Partition => {
                self.engines[engine].net_up = false;
                self.after(a_while, Happening::NetUp { engine });
                if self.rng.chance(50) {
                    self.break_link(engine, true);
                }
            }
            Fault::Reset => {
                self.break_link(engine, true);
                self.redial(engine, Duration::from_millis(50));
            }
            Fault::Garbage => self.garble = Some(engine),
            Fault::Drain => {
                let deadline = Duration::from_millis(self.rng.range(0, 2_000));
                let (engine, reply) = (self.id(engine), self.no_reply());
                self.core_event(Event::DrainRequested { engine, deadline, reply });
            }
            Fault::Remove => {
                let (engine, reply) = (self.id(engine), self.no_reply());
                self.core_event(Event::RemoveRequested { engine, reply });
            }
            Fault::FailedLoad => {
                if let Some(load) = self.engines[engine].load.as_mut() {
                    load.fails = true;
                }
            }
            _ => {}
        }
    }

    fn end_one(&mut self, engine: usize, why: Why) {
        let live: Vec<_> = self.engines[engine].live.keys().copied().collect();
        if let Some(sample) = self.rng.pick(&live) {
            self.engines[engine].end(*sample, why, "made to end");
        }
    }

    fn id(&self, engine: usize) -> EngineId {
        EngineId::new(&self.engines[engine].name)
    }

    fn kill(&mut self, engine: usize, back_in: Duration, heard: bool) {
        self.engines[engine].alive = false;
        if heard {
            self.break_link(engine, true);
        }
        self.after(back_in, Happening::Reborn { engine });
    }

    /// Ends the machine after its notice, unless the agent left in time.
    pub(crate) fn preempted(&mut self, engine: usize) {
        if self.engines[engine].alive {
            let back_in = Duration::from_millis(self.rng.range(100, 3_000));
            self.kill(engine, back_in, true);
        }
    }

    fn engine_down(&mut self, engine: usize, back_in: Duration) {
        if let Some(session) = self.engines[engine].session.filter(|_| self.engines[engine].net_up)
        {
            self.post(Event::EngineDied { session, why: "engine process died".into() });
        }
        self.engines[engine].alive = false;
        self.after(back_in, Happening::Reborn { engine });
    }

    fn repeat_ticks(&mut self, engine: usize) {
        let ticks: Vec<_> = self.engines[engine].unacked.iter().cloned().collect();
        for tick in ticks {
            self.send_tick(engine, tick);
        }
    }

    fn pause_manager(&mut self) {
        let gap = Duration::from_millis(self.rng.range(500, 8_000));
        self.paused = Some((self.now, self.now + gap));
    }

    fn cancel_some(&mut self) {
        let Some(session) = self.trainer.session else { return };
        let keys: Vec<String> = self.asked.keys().cloned().collect();
        let Some(key) = self.rng.pick(&keys).cloned() else { return };
        let (keep_partial, reply) = (self.rng.chance(50), self.no_reply());
        let what = match (self.rng.range(0, 8), self.trainer.phase) {
            (0, _) => CancelWhat::All,
            (1, Phase::Waiting { step }) => CancelWhat::Step(Step(step)),
            _ => CancelWhat::Keys(vec![key]),
        };
        self.post(Event::GroupsCancelled { session, what, keep_partial, reply });
    }

    fn reset_consumer(&mut self) {
        let Some((&consumer, &shard)) = self.trainer.consumers.first_key_value() else { return };
        self.trainer.consumers.remove(&consumer);
        self.core_event(Event::ConsumerLost { consumer });
        self.after(Duration::from_millis(40), Happening::Consume { shard });
    }

    /// Attaches a second stream for a shard; the manager closes the old one.
    fn take_over_consumer(&mut self) {
        let Some((&consumer, &shard)) = self.trainer.consumers.first_key_value() else { return };
        self.trainer.consumers.remove(&consumer);
        self.after(Duration::from_millis(10), Happening::Consume { shard });
    }

    fn reset_publishers(&mut self) {
        if self.trainer.publishers.is_empty() || !self.publishes_nothing() {
            return;
        }
        for publisher in std::mem::take(&mut self.trainer.publishers).into_values() {
            self.core_event(Event::PublisherLost { publisher });
        }
        let back_in = Duration::from_millis(self.rng.range(50, 2_000));
        self.after(back_in, Happening::Republish);
    }

    fn restart_trainer(&mut self) {
        if !self.scenario.restarts
            || matches!(
                self.trainer.phase,
                Phase::Down | Phase::Done | Phase::Opening | Phase::Closing
            )
        {
            return;
        }
        let new_epoch = self.rng.chance(50);
        let back_in = Duration::from_millis(self.rng.range(200, 3_000));
        if new_epoch && self.rng.chance(50) {
            self.leave_zombies();
        } else {
            let consumers: Vec<_> = self.trainer.consumers.keys().copied().collect();
            for consumer in consumers {
                self.core_event(Event::ConsumerLost { consumer });
            }
        }
        for publisher in std::mem::take(&mut self.trainer.publishers).into_values() {
            self.core_event(Event::PublisherLost { publisher });
        }
        if let Some(session) = self.trainer.session.filter(|_| self.rng.chance(20)) {
            let (cancel_running, reply) = (self.rng.chance(30), self.no_reply());
            self.core_event(Event::JobClosed { session, cancel_running, reply });
        }
        let most = u64::from(self.scenario.trainer.max_shards);
        let shards = self.rng.range(1, most + 1) as u32;
        self.trainer.crash(shards);
        if new_epoch {
            self.trainer.epoch += 1;
            self.trainer.version = 0;
        }
        self.after(back_in, Happening::OpenJob);
    }

    /// Leaves the old trainer's streams in place. After the next trainer has opened the job, they commit everything and
    /// close it.
    fn leave_zombies(&mut self) {
        let seq = BatchSeq(u64::MAX);
        let mut says = Vec::new();
        for &consumer in self.trainer.consumers.keys() {
            says.push(Event::BatchAcked { consumer, seq });
            says.push(Event::BatchCommitted { consumer, seq });
        }
        if let Some(session) = self.trainer.session {
            let reply = self.no_reply();
            says.push(Event::JobClosed { session, cancel_running: true, reply });
        }
        self.zombies.extend(says);
    }
}
