//! The control half of the core: pause, abort, weight updates, memory, pace faults.
//!
//! ```text
//! update:  Idle --begin, paused--> Loading --loaded--> Idle
//!            \--begin, serving--> Draining{gate} --in-flight ended, or paused--> Loading
//! memory:  Held --release(weights)--> Released --resume--> Blank --loaded--> Held
//! ```

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{Core, End, Phase, Refusal, SeqId};
use crate::model::Model;
use crate::weights::WeightsError;

/// Weight updates that may wait. A trainer makes one per step, so more at once are a client in a loop.
const UPDATE_QUEUE: usize = 16;
/// Rate, in tokens per second, that the fault `slow` divides on an engine without a rate.
const UNPACED_RATE_WHEN_SLOWED: f64 = 1000.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PauseMode {
    Abort,
    Retract,
    InPlace,
}

/// One call of `update_weights_from_disk`; `ticket` is the driver's name for the caller.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Update {
    pub path: PathBuf,
    pub version: Option<String>,
    pub abort_all: bool,
    pub flush: bool,
    pub ticket: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct UpdateReply {
    pub success: bool,
    pub message: String,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Action {
    /// Load and check this directory elsewhere, then call [`Core::loaded`].
    Load(PathBuf),
    Reply {
        ticket: u64,
        reply: UpdateReply,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Memory {
    #[default]
    Held,
    Released,
    /// Allocated again without content: only weights can be in this state.
    Blank,
}

#[derive(Debug, Default)]
enum UpdateState {
    #[default]
    Idle,
    Draining {
        gate: SeqId,
        update: Update,
    },
    Loading(Update),
}

#[derive(Debug)]
pub(super) struct Control {
    paused: bool,
    update: UpdateState,
    queue: VecDeque<Update>,
    weights: Memory,
    kv: Memory,
    pub(super) stall_until: Option<Duration>,
    slow: f64,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            paused: false,
            update: UpdateState::Idle,
            queue: VecDeque::new(),
            weights: Memory::Held,
            kv: Memory::Held,
            stall_until: None,
            slow: 1.0,
        }
    }
}

impl Control {
    /// Id from which on sequences wait until a draining update is through.
    pub(super) fn gate(&self) -> Option<SeqId> {
        match self.update {
            UpdateState::Draining { gate, .. } => Some(gate),
            UpdateState::Idle | UpdateState::Loading(_) => None,
        }
    }
}

impl<M: Model, S> Core<M, S> {
    /// Pauses generation, and does with running requests what `mode` says.
    pub fn pause(&mut self, mode: PauseMode) {
        self.control.paused = true;
        match mode {
            PauseMode::Abort => self.abort_all(),
            PauseMode::InPlace => {}
            PauseMode::Retract => {
                let ids: Vec<SeqId> = self.running.keys().copied().collect();
                ids.into_iter().for_each(|id| self.retract(id));
            }
        }
        self.advance_update();
    }

    /// Ends the pause.
    pub fn resume(&mut self, now: Duration) {
        self.control.paused = false;
        self.restart_pace(now);
    }

    /// True if generation is paused.
    pub fn is_paused(&self) -> bool {
        self.control.paused
    }

    /// Aborts the request with exactly this rid, as SGLang with one tokenizer worker; false if it is not live.
    pub fn abort(&mut self, rid: &str) -> bool {
        let Some(&id) = self.by_rid.get(rid) else { return false };
        let queued = self.waiting.contains_key(&id);
        let message = if queued { "Abort in waiting queue" } else { "Aborted" };
        self.end(id, End::Abort { message: message.to_owned(), queued });
        self.advance_update();
        true
    }

    /// Aborts all requests.
    pub fn abort_all(&mut self) {
        let rids: Vec<String> = self.by_rid.keys().cloned().collect();
        for rid in rids {
            self.abort(&rid);
        }
    }

    /// True if the cache holds nothing that a new request could meet: only running sequences keep it busy.
    pub fn flush_cache(&self) -> bool {
        self.running.is_empty()
    }

    /// Queues a weight update. Answers at once if the queue is full.
    pub fn begin_update(&mut self, update: Update) {
        if self.control.queue.len() >= UPDATE_QUEUE {
            let message =
                format!("{UPDATE_QUEUE} weight updates already wait; this one was not queued.");
            self.reply(&update, false, message);
            return;
        }
        if update.abort_all {
            self.abort_all();
        }
        self.control.queue.push_back(update);
        self.advance_update();
    }

    /// Takes the result of [`Action::Load`].
    pub fn loaded(&mut self, result: Result<M::Weights, WeightsError>, now: Duration) {
        let UpdateState::Loading(update) = std::mem::take(&mut self.control.update) else { return };
        match result {
            Err(error) => self.reply(&update, false, format!("Failed to update weights: {error}.")),
            Ok(weights) => self.install(&update, weights),
        }
        self.restart_pace(now);
        self.advance_update();
    }

    /// Sets the label of the weights without a load.
    pub fn set_version(&mut self, version: &str, abort_all: bool) {
        if abort_all {
            self.abort_all();
        }
        self.label = Arc::from(version);
    }

    /// Releases weights or cache. An error names what is in the way; nothing has changed then.
    pub fn release(&mut self, weights: bool, kv: bool) -> Result<(), String> {
        let live = self.running.len() + self.waiting.len();
        if live > 0 {
            return Err(format!(
                "release_memory_occupation needs an idle server and {live} requests are live."
            ));
        }
        if !matches!(self.control.update, UpdateState::Idle) {
            return Err("release_memory_occupation came during a weight update.".to_owned());
        }
        if weights && self.control.weights != Memory::Released {
            self.model.release();
            self.control.weights = Memory::Released;
        }
        if kv {
            self.control.kv = Memory::Released;
        }
        Ok(())
    }

    /// Allocates weights or cache again; weights stay without content until the next update.
    pub fn resume_memory(&mut self, weights: bool, kv: bool) {
        if weights && self.control.weights == Memory::Released {
            self.control.weights = Memory::Blank;
        }
        if kv {
            self.control.kv = Memory::Held;
        }
    }

    /// Makes no token before `until`; `Duration::MAX` is for ever.
    pub fn stall(&mut self, until: Duration) {
        self.control.stall_until = Some(until);
    }

    /// Divides the rate by `factor`.
    pub fn slow(&mut self, factor: f64) {
        self.control.slow = factor;
    }

    /// Ends stall and slowness.
    pub fn clear_faults(&mut self, now: Duration) {
        self.control.slow = 1.0;
        if self.control.stall_until.take().is_some() {
            self.restart_pace(now);
        }
    }

    /// Returns the actions that the driver has not carried out yet.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    pub(super) fn check_memory(&self) -> Result<(), Refusal> {
        match (self.control.weights, self.control.kv) {
            (Memory::Held, Memory::Held) => Ok(()),
            (Memory::Held, _) => Err(Refusal::Released("KV cache")),
            _ => Err(Refusal::Released("weights memory")),
        }
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.control.paused || matches!(self.control.update, UpdateState::Loading(_))
    }

    pub(super) fn may_step(&mut self, now: Duration) -> bool {
        if let Some(until) = self.control.stall_until {
            if until > now {
                return false;
            }
            self.control.stall_until = None;
            self.restart_pace(now);
        }
        self.advance_update();
        !self.is_blocked()
    }

    pub(super) fn period(&self) -> Option<Duration> {
        let slowed = self.control.slow > 1.0;
        let rate = self.limits.rate.or(slowed.then_some(UNPACED_RATE_WHEN_SLOWED))?;
        Some(Duration::from_secs_f64(self.control.slow / rate))
    }

    fn install(&mut self, update: &Update, weights: M::Weights) {
        self.model.swap(weights);
        self.control.weights = Memory::Held;
        let kept =
            self.running.values().any(|running| matches!(running.phase, Phase::Decode { .. }));
        if update.flush && kept {
            // As SGLang after an in_place pause: the weights did change and the label did not.
            let message =
                "Weights were updated, but the cache was not flushed because requests are running.";
            self.reply(update, false, message.to_owned());
            return;
        }
        if let Some(version) = &update.version {
            self.label = Arc::from(version.as_str());
        }
        self.reply(update, true, "Succeeded to update model weights.".to_owned());
    }

    pub(super) fn advance_update(&mut self) {
        if matches!(self.control.update, UpdateState::Idle)
            && let Some(update) = self.control.queue.pop_front()
        {
            if self.control.weights == Memory::Released {
                let message = "The weights memory is released; call resume_memory_occupation before an update.";
                self.reply(&update, false, message.to_owned());
                return self.advance_update();
            }
            self.control.update = UpdateState::Draining { gate: self.next_id, update };
        }
        let UpdateState::Draining { gate, .. } = &self.control.update else { return };
        let older = |id: Option<&SeqId>| id.is_some_and(|id| id < gate);
        let in_flight = older(self.running.keys().next()) || older(self.waiting.keys().next());
        if self.control.paused || !in_flight {
            let UpdateState::Draining { update, .. } = std::mem::take(&mut self.control.update)
            else {
                return;
            };
            self.actions.push(Action::Load(update.path.clone()));
            self.control.update = UpdateState::Loading(update);
        }
    }

    fn reply(&mut self, update: &Update, success: bool, message: String) {
        self.actions
            .push(Action::Reply { ticket: update.ticket, reply: UpdateReply { success, message } });
    }

    /// Restarts the pace of all sequences, so that time spent paused, stalled or loading is no debt.
    fn restart_pace(&mut self, now: Duration) {
        for running in self.running.values_mut() {
            if let Phase::Decode { due, .. } = &mut running.phase {
                *due = now.max(*due);
            }
        }
    }
}
