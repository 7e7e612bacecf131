//! Learning which chunks a source has: a source that is still receiving is watched.

use std::sync::Arc;
use std::time::Instant;

use super::{Outcome, Pull};
use crate::link::wire::Message;
use crate::receive::fetch::{SourceStream, StreamError};
use crate::receive::queue::SourceId;

impl Pull {
    /// A source that has all needs no watching; another one gets a stream that tells what it has.
    pub(super) fn learn(self: &Arc<Self>, source: SourceId, complete: bool) {
        let mut state = self.lock();
        if complete {
            state.queue.learned_all(source);
        } else if state.watched.insert(source, ()).is_none() {
            let pull = Arc::clone(self);
            let spawned = std::thread::Builder::new()
                .name(format!("transfer-watch-{source}"))
                .spawn(move || pull.watch_task(source));
            if let Err(error) = spawned {
                tracing::warn!(%error, "no thread to watch a relay");
                state.watched.remove(&source);
            }
        }
    }

    fn watch_task(&self, source: SourceId) {
        let watched = self.watch(source);
        let mut state = self.lock();
        state.watched.remove(&source);
        if let Err(error) = watched {
            // The next stream to this source watches again.
            let why = error.to_string();
            state.queue.unheard(source, Instant::now(), &why);
            state.failures.insert(source, why);
        }
        self.changed.notify_all();
    }

    fn watch(&self, source: SourceId) -> Result<(), StreamError> {
        let at = &self.request.sources[source];
        let mut session = SourceStream::open(&self.shared, at, self.job.base)?;
        let handle = self.register(&session, None)?;
        let told = session
            .link
            .send(&Message::WatchHave { blob: self.job.blob })
            .map_err(StreamError::from);
        let ended = told.and_then(|()| self.take_haves(source, &mut session));
        self.unregister(handle);
        ended
    }

    fn take_haves(&self, source: SourceId, session: &mut SourceStream) -> Result<(), StreamError> {
        let mut had = 0;
        while had < self.job.manifest.chunk_count() {
            match session.link.receive()? {
                Message::Have { ranges } => {
                    had += ranges.iter().map(|r| r.end - r.start).sum::<u32>();
                    let mut state = self.lock();
                    state.queue.learned(source, &ranges);
                    if !matches!(state.outcome, Outcome::Running) {
                        return Ok(());
                    }
                    drop(state);
                    self.changed.notify_all();
                }
                other => return Err(StreamError::from_reply(other)),
            }
        }
        Ok(())
    }
}
