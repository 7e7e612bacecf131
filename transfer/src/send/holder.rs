//! Versions that this process lends, by (epoch, number): each with its image, perhaps deltas, and the
//! leases of those who read it. Decides who may read; the bytes themselves go through `serve`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anabranch_proto::grant::{Grant, GrantError, Role, ServeKey};
use anabranch_proto::version::{Root, Version};

use crate::image::blob::{Blob, BlobId};
use crate::link::wire::FailCode;
use crate::send::inbound::Inbound;

/// A version that this process lends.
#[derive(Debug)]
pub struct Held {
    version: Version,
    image: Blob,
    /// Deltas with their bases, the version before first.
    deltas: Mutex<Vec<(Root, Blob)>>,
    leases: AtomicU32,
    sent_bytes: AtomicU64,
}

/// A receiver's right to read, while its stream is bound to the version.
#[derive(Debug)]
pub struct Lease {
    held: Arc<Held>,
    receiver: String,
}

/// The versions that this process lends, and who may read them. Clones are the same holder.
#[derive(Clone, Debug)]
pub struct Holder {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    job: String,
    state: Mutex<State>,
    offered: Condvar,
    passes_memory: AtomicBool,
    inbound: Inbound,
}

#[derive(Debug, Default)]
struct State {
    /// The manager's present key and the one before: grants outlive a re-attach.
    keys: Vec<ServeKey>,
    versions: BTreeMap<(u32, u64), Arc<Held>>,
    /// First use of each grant (by hash); those of withdrawn versions are forgotten.
    first_use: BTreeMap<[u8; 32], FirstUse>,
}

#[derive(Debug)]
struct FirstUse {
    version: (u32, u64),
    at: Instant,
}

/// Why a receiver is not let in.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The grant is forged, expired, or for something else.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// The version is not held here, or not any more.
    #[error("{asked} is not held here (held: {held})")]
    Unknown { asked: Version, held: String },
    /// The version has not begun to arrive here.
    #[error("{asked} has not begun to arrive here (held: {held})")]
    NotYet { asked: Version, held: String },
    /// The version that is held has another root.
    #[error("{asked} has root {asked_root}, the {held} held here has root {held_root}", asked_root = .asked.root, held_root = .held.root)]
    OtherRoot { asked: Version, held: Version },
    /// No manager gave a key yet.
    #[error("this holder has no key from a manager yet")]
    NoKey,
}

// === impl Holder ===

impl Holder {
    /// An empty `job` honours the grants of any: of a manager that had none yet when it gave its key, which
    /// alone then says who may read.
    pub fn new(job: &str) -> Holder {
        let (job, state) = (job.to_owned(), Mutex::default());
        let (offered, inbound) = (Condvar::new(), Inbound::default());
        let passes_memory = AtomicBool::new(false);
        Holder { shared: Arc::new(Shared { job, state, offered, passes_memory, inbound }) }
    }

    /// Grants made with `key` are honoured from now on; those of the key before remain valid.
    pub fn set_key(&self, key: ServeKey) {
        let mut state = self.lock();
        if state.keys.last() != Some(&key) {
            state.keys.retain(|k| *k != key);
            state.keys.push(key);
            let old = state.keys.len().saturating_sub(2);
            state.keys.drain(..old);
        }
    }

    pub(crate) fn offer(&self, held: Arc<Held>) {
        let at = (held.version.epoch, held.version.number);
        self.lock().versions.insert(at, held);
        self.shared.offered.notify_all();
    }

    /// Lends `version` no more. Streams bound to it end at their next chunk once its memory is reused.
    pub fn withdraw(&self, version: Version) {
        let at = (version.epoch, version.number);
        let mut state = self.lock();
        if state.versions.get(&at).is_some_and(|h| h.version.root == version.root) {
            state.versions.remove(&at);
            state.first_use.retain(|_, used| used.version != at);
        }
    }

    /// Sets whether processes of this host are given the memory itself.
    pub(crate) fn pass_memory(&self, pass: bool) {
        self.shared.passes_memory.store(pass, Ordering::Release);
    }

    pub(crate) fn passes_memory(&self) -> bool {
        self.shared.passes_memory.load(Ordering::Acquire)
    }

    /// Forgets versions whose memory was given away.
    pub(crate) fn prune(&self) {
        let mut state = self.lock();
        state.versions.retain(|_, held| held.image.stamp.is_valid());
        let State { versions, first_use, .. } = &mut *state;
        first_use.retain(|_, used| versions.contains_key(&used.version));
    }

    /// The versions that are lent, oldest first.
    pub fn versions(&self) -> Vec<Version> {
        self.lock().versions.values().map(|h| h.version).collect()
    }

    /// The version, if it is lent.
    pub fn held(&self, version: Version) -> Option<Arc<Held>> {
        let found = self.lock().versions.get(&(version.epoch, version.number)).cloned();
        found.filter(|h| h.version.root == version.root)
    }

    /// Like [`Holder::admit`], but waits for a version that may still come, up to `patience`.
    pub(crate) fn admit_in_time(&self, grant: &[u8], patience: Duration) -> Result<Lease, Refusal> {
        let until = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            match state.admit(&self.shared.job, grant, now) {
                Err(Refusal::NotYet { .. }) if now < until => {}
                other => return other,
            }
            let waited = self.shared.offered.wait_timeout(state, until - now);
            state = waited.expect("no holder of the state's lock panics").0;
        }
    }

    /// Lets the bearer of `grant`, a source, be asked on the stream that it dialled. Gives its name.
    pub(crate) fn admit_offer(&self, grant: &[u8], now: Instant) -> Result<String, Refusal> {
        let mut state = self.lock();
        let granted = state.granted(&self.shared.job, grant, Role::Feed)?;
        state.note_use(grant, &granted, now)?;
        Ok(granted.receiver)
    }

    /// Streams that sources dialled, for fetches to ask on.
    pub(crate) fn inbound(&self) -> &Inbound {
        &self.shared.inbound
    }

    /// Lets the bearer of `grant` read the version that it names.
    pub fn admit(&self, grant: &[u8], now: Instant) -> Result<Lease, Refusal> {
        self.lock().admit(&self.shared.job, grant, now)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("no holder of the state's lock panics")
    }
}

impl State {
    fn admit(&mut self, job: &str, grant: &[u8], now: Instant) -> Result<Lease, Refusal> {
        let granted = self.granted(job, grant, Role::Fetch)?;
        let at = (granted.version.epoch, granted.version.number);
        let Some(held) = self.versions.get(&at).cloned() else {
            let asked = granted.version;
            let held: Vec<String> = self.versions.values().map(|h| h.version.to_string()).collect();
            let held = held.join(", ");
            let is_past = self.versions.keys().any(|newer| *newer > at);
            return Err(if is_past {
                Refusal::Unknown { asked, held }
            } else {
                Refusal::NotYet { asked, held }
            });
        };
        if granted.version.root != held.version.root {
            return Err(Refusal::OtherRoot { asked: granted.version, held: held.version });
        }
        self.note_use(grant, &granted, now)?;
        held.leases.fetch_add(1, Ordering::Relaxed);
        Ok(Lease { held, receiver: granted.receiver })
    }

    /// The content of a genuine grant for this job and role.
    fn granted(&self, job: &str, grant: &[u8], role: Role) -> Result<Grant, Refusal> {
        let granted = self.verify(grant)?;
        if !job.is_empty() && granted.job != job {
            let serves = job.to_owned();
            return Err(GrantError::Job { granted: granted.job, serves }.into());
        }
        if granted.role != role {
            return Err(GrantError::Role(granted.role).into());
        }
        Ok(granted)
    }

    /// Notes a use of the grant, whose time to live runs from its first use here.
    fn note_use(&mut self, grant: &[u8], granted: &Grant, now: Instant) -> Result<(), Refusal> {
        let version = (granted.version.epoch, granted.version.number);
        let id = *blake3::hash(grant).as_bytes();
        let first = self.first_use.entry(id).or_insert(FirstUse { version, at: now });
        let ttl = Duration::from_millis(granted.ttl_ms);
        let age = now.saturating_duration_since(first.at);
        if let Some(over) = age.checked_sub(ttl).filter(|over| !over.is_zero()) {
            let (receiver, ttl_ms, ago_ms) =
                (granted.receiver.clone(), granted.ttl_ms, over.as_millis() as u64);
            return Err(GrantError::Expired { receiver, ttl_ms, ago_ms }.into());
        }
        Ok(())
    }

    fn verify(&self, grant: &[u8]) -> Result<Grant, Refusal> {
        let mut outcome = Err(Refusal::NoKey);
        for key in self.keys.iter().rev() {
            outcome = Grant::verify(key, grant).map_err(Refusal::Grant);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }
}

// === impl Refusal ===

impl Refusal {
    /// The code that the receiver is told.
    pub fn code(&self) -> FailCode {
        match self {
            Refusal::Grant(_) | Refusal::NoKey => FailCode::Grant,
            Refusal::Unknown { .. } | Refusal::OtherRoot { .. } => FailCode::UnknownVersion,
            Refusal::NotYet { .. } => FailCode::NotYet,
        }
    }
}

// === impl Held ===

impl Held {
    pub(crate) fn new(version: Version, image: Blob) -> Held {
        let (leases, sent_bytes) = (AtomicU32::new(0), AtomicU64::new(0));
        Held { version, image, deltas: Mutex::default(), leases, sent_bytes }
    }

    /// The version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Number of streams that are bound to the version now.
    pub fn leases(&self) -> u32 {
        self.leases.load(Ordering::Relaxed)
    }

    /// Bytes of chunks sent to receivers, of the image and of the delta.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn count_sent(&self, bytes: u64) {
        self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The version before first.
    pub(crate) fn set_deltas(&self, deltas: Vec<(Root, Blob)>) {
        *self.deltas.lock().expect("held only to copy") = deltas;
    }

    pub(crate) fn image(&self) -> &Blob {
        &self.image
    }

    /// The delta to the newest base.
    pub(crate) fn first_delta(&self) -> Option<Blob> {
        let deltas = self.deltas.lock().expect("held only to copy");
        deltas.first().map(|(_, blob)| blob.clone())
    }

    pub(crate) fn blob(&self, id: BlobId, base: Root) -> Option<Blob> {
        match id {
            BlobId::Image => Some(self.image.clone()),
            BlobId::Delta => {
                let deltas = self.deltas.lock().expect("held only to copy");
                deltas.iter().find(|(b, _)| *b == base).map(|(_, blob)| blob.clone())
            }
        }
    }
}

// === impl Lease ===

impl Lease {
    /// The version that the lease is for.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Name of the receiver, from its grant.
    pub fn receiver(&self) -> &str {
        &self.receiver
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.held.leases.fetch_sub(1, Ordering::Relaxed);
    }
}
