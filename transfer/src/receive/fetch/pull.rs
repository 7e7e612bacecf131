//! The streams of one fetch: each a thread that asks the queue for chunks, receives them straight into
//! the slot and reports what came.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anabranch_proto::manifest::Manifest;
use anabranch_proto::version::Root;

use super::{
    FetchError, FetchProgress, FetchReport, FetchRequest, Shared, SourceRef, SourceStream,
    StreamError, Tried,
};
use crate::link::Closer;
use crate::link::wire::{BlobId, FailCode, Message};
use crate::receive::queue::{Assign, ChunkQueue, SourceId, StreamId, StripePlan, Take};
use crate::receive::staging::StageError;

mod sink;
mod watch;

pub(super) use sink::Sink;

/// Wakes idle streams to look at the clock; also bounds how late a cancel is noticed.
const TICK: Duration = Duration::from_millis(50);
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Senders of parts above which streams go from one sender to the next when it has given all.
const MOST_SENDERS: usize = 16;

/// One pull: the blob that is fetched, and where its chunks go.
pub(super) struct PullOrder {
    pub(super) blob: BlobId,
    pub(super) base: Root,
    pub(super) manifest: Arc<Manifest>,
    pub(super) sink: Sink,
}

/// One fetch, seen by all its threads. Those may outlive it for a moment (one that waits for a dead
/// host to accept): they find it ended and go.
struct Pull {
    shared: Arc<Shared>,
    request: FetchRequest,
    job: PullOrder,
    state: Mutex<State>,
    changed: Condvar,
    /// Bytes received in this fetch by an earlier pull (of a delta).
    received_before: u64,
    received_bytes: AtomicU64,
}

struct State {
    queue: ChunkQueue,
    /// Closers of the open streams, for a cancel, a rescue and the end.
    handles: BTreeMap<usize, Closer>,
    next_handle: usize,
    of_stream: BTreeMap<StreamId, usize>,
    verified_bytes: u64,
    /// Verified bytes by source.
    bytes_of: Vec<u64>,
    /// When a chunk was last verified.
    moved: Instant,
    failures: BTreeMap<SourceId, String>,
    watched: BTreeMap<SourceId, ()>,
    /// Streams that are writing into the slot at this moment.
    writers: usize,
    outcome: Outcome,
}

enum Outcome {
    Running,
    Complete,
    Failed(FetchError),
    /// Reported.
    Over,
}

/// The way a stream ended.
enum StreamEnd {
    Done,
    /// No more from this source now.
    Left,
    /// The stream left with answers still on their way.
    Cut,
}

pub(super) fn pull(
    shared: &Arc<Shared>,
    request: &FetchRequest,
    job: PullOrder,
    report: &mut FetchReport,
) -> Result<(), FetchError> {
    let held = job.sink.ledger().snapshot();
    let plan = StripePlan {
        stripe_count: request.stripe_count,
        stripes: request.sources.iter().map(|s| s.stripes.clone()).collect(),
        fallbacks: request.sources.iter().map(|s| s.fallback_for.clone()).collect(),
        origins: request.sources.iter().map(|s| s.origin.clone()).collect(),
    };
    let (rules, sources) = (shared.rules.queue(), request.sources.len());
    let queue = ChunkQueue::new(rules, &held, sources, &plan, Instant::now());
    let outcome = if queue.is_done() { Outcome::Complete } else { Outcome::Running };
    let state = State {
        queue,
        handles: BTreeMap::new(),
        next_handle: 0,
        of_stream: BTreeMap::new(),
        verified_bytes: if job.blob == BlobId::Image { report.carried_bytes } else { 0 },
        bytes_of: vec![0; request.sources.len()],
        moved: Instant::now(),
        failures: BTreeMap::new(),
        watched: BTreeMap::new(),
        writers: 0,
        outcome,
    };
    let pull = Arc::new(Pull {
        shared: Arc::clone(shared),
        request: request.clone(),
        job,
        state: Mutex::new(state),
        changed: Condvar::new(),
        received_before: report.received_bytes,
        received_bytes: AtomicU64::new(0),
    });
    pull.start();
    pull.supervise();
    pull.finish(report)
}

// === impl Pull ===

impl Pull {
    fn start(self: &Arc<Self>) {
        if !matches!(self.lock().outcome, Outcome::Running) {
            return;
        }
        let sources = &self.request.sources;
        // A parent's streams are not enough where it is several senders, each with a part.
        let senders =
            sources.iter().filter(|s| !s.origin.is_empty() && !s.stripes.is_empty()).count();
        let planned = self.request.stripe_count as usize;
        let least = match planned {
            0 => sources.len(),
            _ => planned.max(senders.min(MOST_SENDERS)),
        };
        for id in 0..self.request.streams.max(least).max(1) {
            let pull = Arc::clone(self);
            let name = format!("transfer-recv-{id}");
            let spawned =
                std::thread::Builder::new().name(name).spawn(move || pull.stream_task(id));
            if let Err(error) = spawned {
                // Fewer streams are slower, not wrong; without any, the fetch gives up in time.
                tracing::warn!(%error, "no thread for a transfer stream");
            }
        }
    }

    /// Deadlines and the progress callback, until the outcome is known; then ends waits on sockets.
    fn supervise(&self) {
        let mut told = Instant::now();
        let mut state = self.lock();
        while matches!(state.outcome, Outcome::Running) {
            let waited = self.changed.wait_timeout(state, TICK);
            state = waited.expect("no panic under the lock").0;
            if self.request.cancel.is_cancelled() {
                self.end(&mut state, Outcome::Failed(FetchError::Cancelled(self.request.version)));
            } else if state.moved.elapsed() > self.shared.rules.give_up {
                let stalled = self.stalled(&state);
                self.end(&mut state, Outcome::Failed(stalled));
            }
            if told.elapsed() >= PROGRESS_EVERY {
                told = Instant::now();
                let bytes = state.verified_bytes;
                drop(state);
                self.tell(bytes);
                state = self.lock();
            }
        }
        // Streams of a complete fetch have nothing in flight and go back to the pool.
        let complete = matches!(state.outcome, Outcome::Complete);
        for (key, handle) in &state.handles {
            let is_stream = state.of_stream.values().any(|k| k == key);
            if !(complete && is_stream) {
                handle();
            }
        }
        let bytes = state.verified_bytes;
        drop(state);
        self.tell(bytes);
    }

    fn tell(&self, bytes: u64) {
        if let Some(progress) = &self.request.progress {
            let received_bytes = self.received_before + self.received_bytes.load(Ordering::Relaxed);
            let total_bytes = self.job.manifest.image_bytes;
            progress(FetchProgress { bytes, received_bytes, total_bytes });
        }
    }

    fn end(&self, state: &mut State, outcome: Outcome) {
        if matches!(state.outcome, Outcome::Running) {
            state.outcome = outcome;
        }
        self.changed.notify_all();
    }

    fn stream_task(self: &Arc<Self>, id: StreamId) {
        loop {
            let source = {
                let mut state = self.lock();
                if !matches!(state.outcome, Outcome::Running) {
                    return;
                }
                match state.queue.assign(id, Instant::now()) {
                    Assign::To(source) => source,
                    Assign::Done => return self.end(&mut state, Outcome::Complete),
                    Assign::None => {
                        let error = self.no_source(&state);
                        return self.end(&mut state, Outcome::Failed(error));
                    }
                    Assign::Wait(until) => {
                        let patience = until.saturating_duration_since(Instant::now());
                        let waited = self.changed.wait_timeout(state, patience.min(TICK));
                        drop(waited.expect("no panic under the lock"));
                        continue;
                    }
                }
            };
            let ended = self.stream(id, source);
            let mut state = self.lock();
            state.of_stream.remove(&id);
            match ended {
                Ok(StreamEnd::Done | StreamEnd::Left | StreamEnd::Cut) => {
                    state.queue.release(id);
                }
                Err(error) if error.is_early() => {
                    state.failures.insert(source, error.to_string());
                    state.queue.not_ready(id, Instant::now());
                }
                Err(error) => {
                    let refused = error.is_final();
                    let why = error.to_string();
                    tracing::info!(
                        holder = self.request.sources[source].holder, %error, "transfer stream lost"
                    );
                    state.failures.insert(source, why.clone());
                    state.queue.lost(id, Instant::now(), &why, refused);
                }
            }
            self.changed.notify_all();
        }
    }

    /// Pulls chunks over one stream until there is nothing left to do with this source.
    fn stream(self: &Arc<Self>, id: StreamId, source: SourceId) -> Result<StreamEnd, StreamError> {
        let at = &self.request.sources[source];
        let mut session = SourceStream::open(&self.shared, at, self.job.base)?;
        let complete = match self.job.blob {
            BlobId::Image => session.complete,
            BlobId::Delta if session.delta_bytes == self.job.manifest.image_bytes => {
                session.delta_complete
            }
            BlobId::Delta => {
                let complete = session.complete;
                session.keep(&self.shared);
                // One that is still receiving may be about to get it.
                let code = if complete { FailCode::UnknownVersion } else { FailCode::NotYet };
                let text = "it has no such delta".to_owned();
                return Err(StreamError::Refused { code, text });
            }
        };
        let handle = self.register(&session, Some(id))?;
        self.learn(source, complete);
        let ended = self.exchange(id, source, &mut session);
        self.unregister(handle);
        if matches!(ended, Ok(StreamEnd::Done | StreamEnd::Left)) {
            session.keep(&self.shared);
        }
        ended
    }

    fn register(&self, session: &SourceStream, id: Option<StreamId>) -> Result<usize, StreamError> {
        let handle = session.link.closer()?;
        let mut state = self.lock();
        let key = state.next_handle;
        state.next_handle += 1;
        if !matches!(state.outcome, Outcome::Running) {
            handle();
        }
        state.handles.insert(key, handle);
        if let Some(id) = id {
            state.of_stream.insert(id, key);
        }
        Ok(key)
    }

    fn unregister(&self, key: usize) {
        self.lock().handles.remove(&key);
    }

    /// Keeps `Want`s in flight up to the window and takes in what answers them.
    fn exchange(
        &self,
        id: StreamId,
        source: SourceId,
        session: &mut SourceStream,
    ) -> Result<StreamEnd, StreamError> {
        let mut asked: VecDeque<u32> = VecDeque::new();
        loop {
            while asked.len() < self.window() {
                match self.next(id, source, asked.is_empty()) {
                    Next::Ask(index) => {
                        let blob = self.job.blob;
                        session.link.send(&Message::Want { blob, first: index, count: 1 })?;
                        asked.push_back(index);
                    }
                    Next::Receive => break,
                    Next::End(_) if !asked.is_empty() => return Ok(StreamEnd::Cut),
                    Next::End(end) => return Ok(end),
                }
            }
            if let Some(index) = asked.pop_front() {
                self.receive(id, source, index, session)?;
            }
        }
    }

    /// About 1% of the image in flight over all streams, two chunks each at least.
    fn window(&self) -> usize {
        let streams = self.request.streams.max(1) as u32;
        let window = (self.job.manifest.chunk_count() / (100 * streams)).max(2);
        window.min(self.shared.rules.window.max(1)) as usize
    }

    /// The stream's next step. With nothing in flight it waits here for work.
    fn next(&self, id: StreamId, source: SourceId, idle: bool) -> Next {
        let mut state = self.lock();
        loop {
            if !matches!(state.outcome, Outcome::Running) {
                return Next::End(StreamEnd::Done);
            }
            if idle && state.queue.is_dropped(source) {
                return Next::End(StreamEnd::Left);
            }
            match state.queue.take(id, Instant::now()) {
                Take::Chunk(index) => return Next::Ask(index),
                Take::Done => {
                    self.end(&mut state, Outcome::Complete);
                    return Next::End(StreamEnd::Done);
                }
                _ if !idle => return Next::Receive,
                Take::Leave => return Next::End(StreamEnd::Left),
                Take::Rescue(slow) => {
                    if let Some(handle) =
                        state.of_stream.get(&slow).and_then(|key| state.handles.get(key))
                    {
                        handle();
                    }
                }
                Take::Wait => {}
            }
            let waited = self.changed.wait_timeout(state, TICK);
            state = waited.expect("no panic under the lock").0;
        }
    }

    fn receive(
        &self,
        id: StreamId,
        source: SourceId,
        index: u32,
        session: &mut SourceStream,
    ) -> Result<(), StreamError> {
        let range = self.job.manifest.chunk_range(index);
        let len = range.end - range.start;
        match session.link.receive()? {
            Message::Chunk { blob, index: got, len: sent }
                if blob == self.job.blob && got == index && u64::from(sent) == len => {}
            other => return Err(StreamError::from_reply(other)),
        }
        if !self.begin_write() {
            return Ok(());
        }
        let received = session.link.receive_chunk(self.job.sink.map(), range);
        self.end_write();
        let hash = received?;
        self.received_bytes.fetch_add(len, Ordering::Relaxed);
        let now = Instant::now();
        if hash != self.job.manifest.chunk_hashes[index as usize] {
            self.lock().queue.bad(id, index, now);
            tracing::warn!(index, peer = %session.link.peer(), "chunk with a wrong hash");
            return Ok(());
        }
        let mut state = self.lock();
        if state.queue.verified(id, index, now) {
            state.verified_bytes += len;
            state.bytes_of[source] += len;
            state.moved = now;
            let recorded = self.job.sink.verified(index);
            if let Err(error) = recorded {
                self.fail_stage(&mut state, error);
            }
        }
        Ok(())
    }

    /// False once the fetch has ended: its slot may be another's.
    fn begin_write(&self) -> bool {
        let mut state = self.lock();
        let running = matches!(state.outcome, Outcome::Running);
        state.writers += usize::from(running);
        running
    }

    fn end_write(&self) {
        let mut state = self.lock();
        state.writers -= 1;
        // Whoever waits for the writers does so after the end; nobody else is woken for each chunk.
        if !matches!(state.outcome, Outcome::Running) {
            self.changed.notify_all();
        }
    }

    fn fail_stage(&self, state: &mut State, error: std::io::Error) {
        let version = self.request.version;
        let path = self.shared.staging.root().to_owned();
        let error = StageError::Io { path, error };
        self.end(state, Outcome::Failed(FetchError::Stage { version, error }));
    }

    fn finish(&self, report: &mut FetchReport) -> Result<(), FetchError> {
        // Their sockets are shut down by now, or they are done: this is a matter of a chunk.
        let state = self.changed.wait_while(self.lock(), |s| s.writers > 0);
        let mut state = state.expect("no panic under the lock");
        report.queue.add(state.queue.stats());
        report.received_bytes += self.received_bytes.load(Ordering::Relaxed);
        report.bytes_by_holder.resize_with(self.request.sources.len(), Default::default);
        let by_source = self.request.sources.iter().zip(&state.bytes_of);
        for ((source, bytes), entry) in by_source.zip(&mut report.bytes_by_holder) {
            entry.0.clone_from(&source.holder);
            entry.1 += bytes;
        }
        // Threads that are still on their way out must find the fetch ended.
        match std::mem::replace(&mut state.outcome, Outcome::Over) {
            Outcome::Complete => Ok(()),
            Outcome::Failed(error) => Err(error),
            Outcome::Running | Outcome::Over => Err(FetchError::Thread(self.request.version)),
        }
    }

    fn no_source(&self, state: &State) -> FetchError {
        let mut tried = self.tried(state);
        for (source, why) in state.queue.dropped() {
            if let Some(t) = tried.get_mut(source) {
                t.why = why;
            }
        }
        FetchError::NoSource { version: self.request.version, tried }
    }

    fn stalled(&self, state: &State) -> FetchError {
        FetchError::Stalled {
            version: self.request.version,
            waited: state.moved.elapsed(),
            verified: self.job.sink.ledger().snapshot().count(),
            chunks: self.job.manifest.chunk_count(),
            tried: self.tried(state),
        }
    }

    fn tried(&self, state: &State) -> Vec<Tried> {
        let one = |(ix, s): (usize, &SourceRef)| Tried {
            holder: s.holder.clone(),
            addr: s.shown(),
            why: state.failures.get(&ix).cloned().unwrap_or_else(|| "it had no more".to_owned()),
        };
        self.request.sources.iter().enumerate().map(one).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no transfer thread panics under the lock")
    }
}

enum Next {
    Ask(u32),
    Receive,
    End(StreamEnd),
}
