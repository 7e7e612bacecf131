//! Outbox: what one turn of the deciding core asks for. Owners and coordinators write actions, deadlines and
//! counts into it; the core hands it to the driver. All of it is volatile.

use std::collections::VecDeque;

use anabranch_proto::OrderId;
use anabranch_runtime::clock::{Now, TimerTable};
use anabranch_views::Counters;

use crate::action::{Action, Answer, FailKind, Notice};
use crate::event::ReplyTo;
use crate::timer::Timer;

/// Actions, deadlines and counters of the deciding core, in the order in which the core asked for them.
#[derive(Default)]
pub(crate) struct Outbox {
    /// Deadlines of every part of the core.
    pub timers: TimerTable<Timer>,
    pub counters: Counters,
    actions: VecDeque<Action>,
    next_id: u64,
    placeable: bool,
    visited: u64,
}

impl Outbox {
    pub fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    pub fn tell(&mut self, notice: Notice) {
        self.act(Action::Emit(notice));
    }

    pub fn reply(&mut self, to: ReplyTo, answer: Answer) {
        self.act(Action::Reply { to, answer });
    }

    pub fn fail(&mut self, to: ReplyTo, kind: FailKind, why: impl Into<String>) {
        self.reply(to, Answer::Failed { why: why.into(), kind });
    }

    pub fn poll(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Number that no group, session or order of this life has had.
    pub fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub fn fresh_order(&mut self) -> OrderId {
        OrderId(self.fresh_id())
    }

    /// Asks for a placement pass at the end of the turn: a sample, a seat or a version may fit now.
    pub fn wake_placement(&mut self) {
        self.placeable = true;
    }

    /// Takes the wish for a placement pass.
    pub fn take_placeable(&mut self) -> bool {
        std::mem::take(&mut self.placeable)
    }

    /// Counts `entities` (engines, samples, groups, queue places) that the core looked at, for `bench core`.
    pub fn visit(&mut self, entities: usize) {
        self.visited += entities as u64;
    }

    pub fn visited(&self) -> u64 {
        self.visited
    }

    /// Sets `timer` unless it is set already.
    pub fn set_if_unset(&mut self, timer: Timer, at: Now) {
        if self.timers.get(timer).is_none() {
            self.timers.set(timer, at);
        }
    }
}
