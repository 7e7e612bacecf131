//! The engine's own thread: takes commands, steps the core on the clock, hands chunks to the connections. Decides
//! nothing about sequences; that is the core's.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::config::EngineConfig;
use crate::meter::Meter;
use crate::model::{Loader, Model};
use crate::sse::{self, Shape};
use crate::step::{Action, Core, Counters, End, PauseMode, Request, Seq, Update, UpdateReply};
use crate::weights::WeightsError;

/// Length of the ticks in which paced tokens are made, so that wake-ups and writes come in batches.
const TICK: Duration = Duration::from_millis(5);
/// Shortest time between two steps of the core in a burst of commands.
const MIN_STEP: Duration = Duration::from_millis(1);
/// Time after which a client that is gone loses its sequence.
const SWEEP: Duration = Duration::from_millis(50);
/// Chunks that a connection may lag behind; then its tokens gather in the core and are sent as one larger chunk.
pub(crate) const SINK_FRAMES: usize = 4;

/// Way back to one HTTP request.
pub(crate) struct Sink {
    pub frames: mpsc::Sender<Frame>,
    /// Cancelled by the fault `reset`, which cuts the connection with a TCP reset.
    pub connection: CancellationToken,
    /// True if the request is a health probe, which is not counted and which faults spare.
    pub probe: bool,
}

#[derive(Debug)]
pub(crate) enum Frame {
    /// A server-sent event, or the whole answer of a request that does not stream.
    Data(Bytes),
    /// A refusal of a request that does not stream.
    Error { status: u16, body: Bytes },
}

pub(crate) enum Command {
    Generate(Request, Sink),
    Abort { rid: String },
    AbortAll,
    Pause(PauseMode, oneshot::Sender<()>),
    Continue(oneshot::Sender<()>),
    Flush { timeout: Duration, done: oneshot::Sender<bool> },
    Update(Update, oneshot::Sender<UpdateReply>),
    SetVersion { version: String, abort_all: bool, done: oneshot::Sender<()> },
    Release { weights: bool, kv: bool, done: oneshot::Sender<Result<(), String>> },
    ResumeMemory { weights: bool, kv: bool, done: oneshot::Sender<()> },
    Fault(Fault, oneshot::Sender<usize>),
    LoadDone,
    Stop,
}

/// Faults of `POST /fault` that act on the engine thread; `die` ends the process before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    Stall(Option<Duration>),
    Slow(f64),
    EndEarly(usize),
    LoseFinish(usize),
    Corrupt(usize),
    Reset(usize),
    Clear,
}

/// Counters that other threads may read at any time, also while the engine loads or stalls.
#[derive(Default)]
pub(crate) struct Shared {
    pub paused: AtomicBool,
    pub steps: AtomicU64,
    counters: Mutex<Counters>,
    labels: Mutex<Labels>,
}

#[derive(Clone, Default)]
pub(crate) struct Labels {
    pub weight_version: Arc<str>,
    pub model_path: String,
    pub digest: [u8; 32],
}

impl Shared {
    pub fn counters(&self) -> Counters {
        *self.counters.lock().expect("no holder of this lock panics")
    }

    pub fn labels(&self) -> Labels {
        self.labels.lock().expect("no holder of this lock panics").clone()
    }
}

type LoadSlot<W> = Arc<Mutex<Option<Result<W, WeightsError>>>>;

pub(crate) struct Driver<M: Model> {
    core: Core<M, Sink>,
    incremental: bool,
    commands: Receiver<Command>,
    /// Sender with which the loading thread says that the load is done.
    own_commands: SyncSender<Command>,
    shared: Arc<Shared>,
    model_path: String,
    loader: Loader<M::Weights>,
    load_slot: LoadSlot<M::Weights>,
    load_path: String,
    /// Callers of updates; bounded by the core's queue of updates.
    updates: BTreeMap<u64, oneshot::Sender<UpdateReply>>,
    next_ticket: u64,
    flushes: Vec<(Instant, oneshot::Sender<bool>)>,
    lose_finish: usize,
    corrupt: usize,
    started: Instant,
    last_step: Instant,
    last_sweep: Instant,
    buf: Vec<u8>,
    meter: Option<Meter>,
}

impl<M: Model> Driver<M> {
    pub fn new(
        model: M,
        config: &EngineConfig,
        model_path: String,
        (own_commands, commands): (SyncSender<Command>, Receiver<Command>),
        shared: Arc<Shared>,
        meter: Option<Meter>,
    ) -> Self {
        let now = Instant::now();
        let loader = model.loader();
        let driver = Self {
            core: Core::new(model, config),
            incremental: config.incremental,
            commands,
            own_commands,
            shared,
            model_path,
            loader,
            load_slot: Arc::default(),
            load_path: String::new(),
            updates: BTreeMap::new(),
            next_ticket: 0,
            flushes: Vec::new(),
            lose_finish: 0,
            corrupt: 0,
            started: now,
            last_step: now,
            last_sweep: now,
            buf: Vec::with_capacity(64 << 10),
            meter,
        };
        driver.publish_labels();
        driver
    }

    /// Runs until [`Command::Stop`]; every open stream ends with it.
    pub fn run(mut self) {
        loop {
            if !self.take_commands() {
                return;
            }
            self.step();
        }
    }

    /// Waits for commands or for the next token; false if the engine is to end.
    fn take_commands(&mut self) -> bool {
        let deadline = self.wake_at();
        let first =
            match self.commands.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(command) => command,
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            };
        if !self.apply(first) {
            return false;
        }
        let until = self.last_step + MIN_STEP;
        while let Ok(command) =
            self.commands.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            if !self.apply(command) {
                return false;
            }
        }
        true
    }

    fn wake_at(&self) -> Instant {
        let now = Instant::now();
        let sweep = if self.core.is_empty() && self.flushes.is_empty() {
            now + Duration::from_secs(3600)
        } else {
            now + SWEEP
        };
        let flush = self.flushes.iter().map(|(deadline, _)| *deadline).min().unwrap_or(sweep);
        let lagging = if self.core.has_undelivered() { self.last_step + TICK } else { sweep };
        let due = self.core.next_due(now - self.started).map_or(sweep, |due| {
            let due = self.started + due;
            if due <= self.last_step { now } else { due.max(self.last_step + TICK) }
        });
        sweep.min(flush).min(lagging).min(due)
    }

    fn step(&mut self) {
        let now = Instant::now();
        self.last_step = now;
        self.core.step(now - self.started);
        // Before anything leaves: what a client was sent is counted.
        self.measure();
        self.deliver();
        if now.duration_since(self.last_sweep) >= SWEEP {
            self.last_sweep = now;
            self.core.remove_where(usize::MAX, |seq| seq.sink.frames.is_closed());
        }
        self.run_actions();
        self.answer_flushes(now);
        *self.shared.counters.lock().expect("no holder of this lock panics") = self.core.counters();
        self.shared.paused.store(self.core.is_paused(), Relaxed);
        self.shared.steps.fetch_add(1, Relaxed);
    }

    fn apply(&mut self, command: Command) -> bool {
        let now = self.started.elapsed();
        match command {
            Command::Generate(request, sink) => self.submit(request, sink),
            Command::Abort { rid } => {
                self.core.abort(&rid);
            }
            Command::AbortAll => self.core.abort_all(),
            Command::Pause(mode, done) => {
                // Tokens already due belong to the time before the pause.
                self.core.step(now);
                self.core.pause(mode);
                self.shared.paused.store(true, Relaxed);
                let _ = done.send(());
            }
            Command::Continue(done) => {
                self.core.resume(now);
                self.shared.paused.store(false, Relaxed);
                let _ = done.send(());
            }
            Command::Flush { timeout, done } => self.flushes.push((Instant::now() + timeout, done)),
            Command::Update(update, done) => self.begin_update(update, done),
            Command::SetVersion { version, abort_all, done } => {
                self.core.set_version(&version, abort_all);
                self.publish_labels();
                let _ = done.send(());
            }
            Command::Release { weights, kv, done } => {
                let _ = done.send(self.core.release(weights, kv));
            }
            Command::ResumeMemory { weights, kv, done } => {
                self.core.resume_memory(weights, kv);
                let _ = done.send(());
            }
            Command::Fault(fault, done) => {
                let _ = done.send(self.fault(fault));
            }
            Command::LoadDone => self.load_done(now),
            Command::Stop => return false,
        }
        true
    }

    fn submit(&mut self, request: Request, sink: Sink) {
        let stream = request.stream;
        let Err((refusal, sink)) = self.core.submit(request, sink) else { return };
        let status = match refusal {
            crate::step::Refusal::Full(_) | crate::step::Refusal::Released(_) => 503,
            _ => 400,
        };
        let message = refusal.to_string();
        let frame = if stream {
            Frame::Data(sse::error_event(&message, status).into())
        } else {
            Frame::Error { status, body: sse::error_json(&message, status).into() }
        };
        // The channel is fresh: only a client that left has no room.
        let _ = sink.frames.try_send(frame);
    }

    fn measure(&mut self) {
        if let Some(meter) = &mut self.meter {
            meter.write(self.core.counters().streamed_total);
        }
    }

    fn deliver(&mut self) {
        let label = self.core.label().clone();
        let (buf, incremental) = (&mut self.buf, self.incremental);
        let (lose_finish, corrupt) = (&mut self.lose_finish, &mut self.corrupt);
        let meter = &mut self.meter;
        self.core.deliver(|seq, end| {
            if let (Some(meter), true, Some(seed)) =
                (meter.as_mut(), seq.request.stream, seq.request.sampling.seed)
                && !matches!(end, Some(End::Abort { .. }))
            {
                meter.ready(seed, seq.tokens.len() as u64, end.is_some());
            }
            let permit = match seq.sink.frames.try_reserve() {
                Ok(permit) => permit,
                Err(mpsc::error::TrySendError::Full(())) => return false,
                Err(mpsc::error::TrySendError::Closed(())) => return true,
            };
            buf.clear();
            let lose =
                matches!(end, Some(End::Stop { .. } | End::Length)) && spend(lose_finish, seq);
            let shape = Shape { incremental, label: &label, hide_end: lose };
            if seq.request.stream {
                sse::write_event(buf, seq, end, shape);
            } else {
                sse::write_object(buf, seq, end, shape);
            }
            if spend(corrupt, seq) {
                buf.truncate(buf.len() / 2);
                buf.extend_from_slice(b"\n\n");
            }
            permit.send(Frame::Data(Bytes::copy_from_slice(buf)));
            true
        });
    }

    fn begin_update(&mut self, mut update: Update, done: oneshot::Sender<UpdateReply>) {
        update.ticket = self.next_ticket;
        self.next_ticket += 1;
        self.updates.insert(update.ticket, done);
        self.core.begin_update(update);
    }

    fn run_actions(&mut self) {
        for action in self.core.take_actions() {
            match action {
                Action::Load(path) => self.start_load(path),
                Action::Reply { ticket, reply } => {
                    if let Some(done) = self.updates.remove(&ticket) {
                        let _ = done.send(reply);
                    }
                }
            }
        }
    }

    fn start_load(&mut self, path: std::path::PathBuf) {
        self.load_path = path.display().to_string();
        let (loader, slot, commands) =
            (self.loader.clone(), self.load_slot.clone(), self.own_commands.clone());
        let load = move || {
            // A panicking loader must not leave the update open for ever.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| loader(&path)))
                .unwrap_or_else(|_| {
                    Err(WeightsError::Mismatch("the loader panicked; see the log".to_owned()))
                });
            *slot.lock().expect("no holder of this lock panics") = Some(result);
            let _ = commands.send(Command::LoadDone);
        };
        if let Err(error) =
            std::thread::Builder::new().name("anabranch-load".to_owned()).spawn(load)
        {
            let error = WeightsError::Read { path: self.load_path.clone().into(), source: error };
            *self.load_slot.lock().expect("no holder of this lock panics") = Some(Err(error));
            self.load_done(self.started.elapsed());
        }
    }

    fn load_done(&mut self, now: Duration) {
        let Some(result) = self.load_slot.lock().expect("no holder of this lock panics").take()
        else {
            return;
        };
        match &result {
            Ok(_) => {
                self.model_path = std::mem::take(&mut self.load_path);
                tracing::info!(path = %self.model_path, "new weights");
            }
            Err(error) => tracing::warn!(%error, "weights refused; the old ones keep serving"),
        }
        self.core.loaded(result, now);
        self.publish_labels();
        self.run_actions();
    }

    fn publish_labels(&self) {
        let labels = Labels {
            weight_version: self.core.label().clone(),
            model_path: self.model_path.clone(),
            digest: self.core.model().digest(),
        };
        *self.shared.labels.lock().expect("no holder of this lock panics") = labels;
    }

    fn answer_flushes(&mut self, now: Instant) {
        let flushed = self.core.flush_cache();
        for (deadline, done) in std::mem::take(&mut self.flushes) {
            if flushed || deadline <= now {
                let _ = done.send(flushed);
            } else {
                self.flushes.push((deadline, done));
            }
        }
    }

    /// Injects a fault. Returns the number of streams that it touched, or may touch.
    fn fault(&mut self, fault: Fault) -> usize {
        let now = self.started.elapsed();
        tracing::warn!(?fault, "fault injected");
        match fault {
            Fault::Stall(time) => self.core.stall(time.map_or(Duration::MAX, |time| now + time)),
            Fault::Slow(factor) => self.core.slow(factor),
            Fault::LoseFinish(count) => self.lose_finish = count,
            Fault::Corrupt(count) => self.corrupt = count,
            Fault::EndEarly(count) => {
                return self
                    .core
                    .remove_where(count, |seq| seq.request.stream && !seq.sink.probe)
                    .len();
            }
            Fault::Reset(count) => {
                let cut = self.core.remove_where(count, |seq| !seq.sink.probe);
                cut.iter().for_each(|seq| seq.sink.connection.cancel());
                return cut.len();
            }
            Fault::Clear => {
                (self.lose_finish, self.corrupt) = (0, 0);
                self.core.clear_faults(now);
            }
        }
        self.core.counters().running
    }
}

fn spend(left: &mut usize, seq: &Seq<Sink>) -> bool {
    let hit = *left > 0 && seq.request.stream && !seq.sink.probe;
    *left -= usize::from(hit);
    hit
}
