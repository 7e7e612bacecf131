//! Memory for the next version, made ready on a thread of its own while the engine loads the first. Decides
//! nothing about memory that is in use.

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use crate::delta::memory::{DeltaMemory, KEPT_BYTES, room};
use crate::receive::staging::Staging;

/// The thread that prepares, at most one. It ends with this value, so that nothing left behind holds a staging area.
#[derive(Default)]
pub(super) struct Next {
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A delta of one percent of the elements fits.
const DELTA_SHARE: u64 = 64;

// === impl Next ===

impl Next {
    /// Returns at once. Where there is no memory for it, the next version will say so.
    pub(super) fn prepare(&self, staging: &Staging, deltas: &Arc<DeltaMemory>, bytes: u64) {
        if staging.is_prepared(bytes) {
            return;
        }
        let (staging, deltas) = (staging.clone(), Arc::clone(deltas));
        let work = move || {
            if let Err(error) = staging.prepare(bytes) {
                tracing::info!(%error, "no memory for a second version yet");
            }
            if let Err(error) = deltas.prepare(room(bytes), KEPT_BYTES.min(bytes / DELTA_SHARE)) {
                tracing::info!(%error, "no memory for deltas yet");
            }
        };
        let mut thread = self.lock();
        // It was waited for already, by the version that was staged since.
        thread.take().map(JoinHandle::join);
        let spawned = std::thread::Builder::new().name("transfer-next".into()).spawn(work);
        *thread = spawned.ok();
    }

    fn lock(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().expect("nothing panics under it")
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        self.lock().take().map(JoinHandle::join);
    }
}
