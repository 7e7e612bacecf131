//! The scheduler core: which sequence runs, when a token is due, when weights are swapped. Owns every sequence, the
//! pause, the queue of updates and the version labels. Synchronous, takes `now`, does no I/O; the driver carries
//! out its [`Action`]s and delivers its output.
//!
//! The state of a sequence is the map it lies in:
//!
//! ```text
//!            admit            prefilled          stop, length
//!  waiting ---------> Prefill ---------> Decode --------------> ended(Stop | Length) --delivered--> gone
//!     ^ |                |  \              |                         ^
//!     | |  retract       |   \   abort     |                         |
//!     +-+----------------+----+------------+------------------> ended(Abort)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::config::EngineConfig;
use crate::model::{Model, Sampling};

mod control;
mod run;
#[cfg(test)]
mod tests;

pub(crate) use control::{Action, PauseMode, Update, UpdateReply};

pub(crate) type SeqId = u64;

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub rid: String,
    pub prompt: Vec<u32>,
    pub sampling: Arc<Sampling>,
    pub stream: bool,
    pub return_logprob: bool,
    pub return_extra: bool,
    /// Tokens per chunk after the first.
    pub interval: u32,
}

/// One request with the tokens that were made for it. `S` is the driver's way back to the client.
pub(crate) struct Seq<S> {
    pub request: Request,
    pub sink: S,
    pub tokens: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub extras: Vec<u32>,
    /// Position in `tokens` at which each weight version begins.
    pub marks: Vec<Mark>,
    /// Number of `tokens` that were sent to the client.
    pub sent: usize,
    pub retractions: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mark {
    pub label: Arc<str>,
    pub start: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum End {
    Stop { matched: u32 },
    Length,
    Abort { message: String, queued: bool },
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("The input is empty: input_ids must hold at least one token id.")]
    Empty,
    #[error(
        "Token id {id} at position {at} of input_ids is out of vocabulary: vocab_size is {vocab}."
    )]
    Vocabulary { id: u32, at: usize, vocab: u32 },
    #[error(
        "The input ({len} tokens) is longer than the model's context length ({context} tokens)."
    )]
    TooLong { len: usize, context: u32 },
    #[error(
        "Requested token count exceeds the model's maximum context length of {context} tokens. You requested a total of {total} tokens: {len} tokens from the input messages and {new} tokens for the completion."
    )]
    OverContext { len: usize, new: u32, total: u64, context: u32 },
    #[error("Duplicate request ID detected: {0}")]
    Duplicate(String),
    #[error("The request queue is full ({0} requests wait); try again later.")]
    Full(usize),
    #[error(
        "The {0} was released and not brought back: resume it and load weights before generating."
    )]
    Released(&'static str),
}

enum Phase<K> {
    Prefill { ready_at: Duration },
    Decode { kv: K, due: Duration },
}

struct Running<K, S> {
    seq: Box<Seq<S>>,
    phase: Phase<K>,
}

struct Limits {
    context: u32,
    max_running: usize,
    max_waiting: usize,
    kv_tokens: u64,
    rate: Option<f64>,
    prefill_rate: Option<f64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub running: usize,
    pub waiting: usize,
    pub used_tokens: u64,
    pub total_tokens: u64,
    pub generated_total: u64,
    /// Part of `generated_total` for requests that stream.
    pub streamed_total: u64,
    pub prefilled_total: u64,
    pub aborted_total: u64,
    pub retracted_total: u64,
}

pub(crate) struct Core<M: Model, S> {
    model: M,
    limits: Limits,
    waiting: BTreeMap<SeqId, Box<Seq<S>>>,
    running: BTreeMap<SeqId, Running<M::Kv, S>>,
    ended: BTreeMap<SeqId, (Box<Seq<S>>, End)>,
    by_rid: BTreeMap<String, SeqId>,
    /// Running sequences with a chunk to send.
    ready: BTreeSet<SeqId>,
    next_id: SeqId,
    label: Arc<str>,
    control: control::Control,
    counters: Counters,
    actions: Vec<Action>,
}

impl<M: Model, S> Core<M, S> {
    /// A core without requests, with the limits of `config`.
    pub fn new(model: M, config: &EngineConfig) -> Self {
        Self {
            model,
            limits: Limits {
                context: config.context_capacity,
                max_running: config.max_running as usize,
                max_waiting: config.max_waiting as usize,
                kv_tokens: config.kv_tokens,
                rate: config.rate,
                prefill_rate: config.prefill_rate,
            },
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            ended: BTreeMap::new(),
            by_rid: BTreeMap::new(),
            ready: BTreeSet::new(),
            next_id: 0,
            label: Arc::from(config.weight_version.as_str()),
            control: control::Control::default(),
            counters: Counters::default(),
            actions: Vec::new(),
        }
    }

    /// Admits a request to the queue, or says why not.
    pub fn submit(&mut self, request: Request, sink: S) -> Result<SeqId, (Refusal, S)> {
        if let Err(refusal) = self.validate(&request) {
            return Err((refusal, sink));
        }
        let id = self.next_id;
        self.next_id += 1;
        self.by_rid.insert(request.rid.clone(), id);
        let seq = Box::new(Seq {
            request,
            sink,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            extras: Vec::new(),
            marks: Vec::new(),
            sent: 0,
            retractions: 0,
        });
        if seq.request.sampling.max_new_tokens == 0 {
            self.ended.insert(id, (seq, End::Length));
        } else {
            self.waiting.insert(id, seq);
        }
        Ok(id)
    }

    /// Makes every token that is due at `now`, at most the model's quantum for each sequence.
    pub fn step(&mut self, now: Duration) {
        if !self.may_step(now) {
            return;
        }
        self.admit(now);
        self.prefill(now);
        for _ in 0..self.model.rounds_per_step() {
            if self.round(now) == 0 {
                break;
            }
        }
        self.retract_over_capacity();
        self.advance_update();
    }

    /// Time at which the next token or prefill is due; `None` if there is nothing to do before the next command.
    pub fn next_due(&self, now: Duration) -> Option<Duration> {
        if let Some(until) = self.control.stall_until
            && until > now
        {
            return (until < Duration::MAX).then_some(until);
        }
        if self.is_blocked() {
            return None;
        }
        let admit = self.admissible().map(|_| now);
        let due = self.running.values().map(|running| match running.phase {
            Phase::Prefill { ready_at } => ready_at,
            Phase::Decode { due, .. } => due,
        });
        due.chain(admit).min()
    }

    /// Offers to `send` everything that waits to be sent. `send` returns false to be asked again later (a slow client).
    pub fn deliver(&mut self, mut send: impl FnMut(&Seq<S>, Option<&End>) -> bool) {
        let mut gone = Vec::new();
        for (&id, (seq, end)) in &self.ended {
            if send(seq, Some(end)) {
                gone.push(id);
            }
        }
        for id in gone {
            if let Some((seq, _)) = self.ended.remove(&id) {
                self.by_rid.remove(&seq.request.rid);
            }
        }
        let (running, waiting) = (&mut self.running, &mut self.waiting);
        self.ready.retain(|id| {
            let seq =
                running.get_mut(id).map(|running| &mut running.seq).or_else(|| waiting.get_mut(id));
            let Some(seq) = seq else { return false };
            if !send(seq, None) {
                return true;
            }
            seq.sent = seq.tokens.len();
            false
        });
    }

    /// Takes sequences out without a word to their clients: for clients that went away, and for faults.
    pub fn remove_where(
        &mut self,
        limit: usize,
        mut gone: impl FnMut(&Seq<S>) -> bool,
    ) -> Vec<Box<Seq<S>>> {
        let mut ids: Vec<SeqId> = Vec::new();
        ids.extend(
            self.running
                .iter()
                .filter(|(_, running)| gone(&running.seq))
                .map(|(id, _)| *id)
                .take(limit),
        );
        let left = limit - ids.len();
        ids.extend(self.waiting.iter().filter(|(_, seq)| gone(seq)).map(|(id, _)| *id).take(left));
        let left = limit - ids.len();
        ids.extend(
            self.ended.iter().filter(|(_, (seq, _))| gone(seq)).map(|(id, _)| *id).take(left),
        );
        let gone = ids.into_iter().filter_map(|id| self.remove(id)).collect();
        self.advance_update();
        gone
    }

    /// The counts of now.
    pub fn counters(&self) -> Counters {
        let total = |len: usize| len as u64;
        let waiting: u64 = self
            .waiting
            .values()
            .map(|seq| total(seq.request.prompt.len() + seq.tokens.len()))
            .sum();
        Counters {
            running: self.running.len(),
            waiting: self.waiting.len(),
            total_tokens: self.counters.used_tokens + waiting,
            ..self.counters
        }
    }

    /// True if no sequence is left, delivered ends included.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.ended.is_empty()
    }

    /// True if a chunk or an end waits to be sent.
    pub fn has_undelivered(&self) -> bool {
        !self.ended.is_empty() || !self.ready.is_empty()
    }

    /// Label of the current weight version.
    pub fn label(&self) -> &Arc<str> {
        &self.label
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    fn validate(&self, request: &Request) -> Result<(), Refusal> {
        let (len, context) = (request.prompt.len(), self.limits.context);
        let vocab = self.model.vocab();
        self.check_memory()?;
        if len == 0 {
            return Err(Refusal::Empty);
        }
        if let Some(at) = request.prompt.iter().position(|&id| id >= vocab) {
            return Err(Refusal::Vocabulary { id: request.prompt[at], at, vocab });
        }
        let capacity = u64::from(context).min(self.limits.kv_tokens) as u32;
        if len as u64 >= u64::from(capacity) {
            return Err(Refusal::TooLong { len, context: capacity });
        }
        let new = request.sampling.max_new_tokens;
        let total = len as u64 + u64::from(new);
        if total > u64::from(capacity) {
            return Err(Refusal::OverContext { len, new, total, context: capacity });
        }
        if self.by_rid.contains_key(&request.rid) {
            return Err(Refusal::Duplicate(request.rid.clone()));
        }
        if self.waiting.len() >= self.limits.max_waiting {
            return Err(Refusal::Full(self.waiting.len()));
        }
        Ok(())
    }
}

fn seq_len<S>(seq: &Seq<S>) -> u64 {
    (seq.request.prompt.len() + seq.tokens.len()) as u64
}
