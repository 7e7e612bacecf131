//! The receiver's memory: two prefaulted slots as files on /dev/shm, the second made ready behind the first
//! version. A slot is written only while no
//! engine can be reading it, and is given to the engine under a new directory name each time.
//!
//! ```text
//!   slot:  Idle ── begin ──► Filling ── publish ──► Staged (until its guard is dropped) ──► Idle
//!          Filling ── fetch failed, cancelled ──► Idle (verified chunks are kept for the next)
//!   Idle -> Filling only if no process maps the slot's file or, where slots are shared, has it open.
//! ```
//! The hashes of what a slot holds stand in a file beside it, so that chunks outlive the process.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use anabranch_proto::manifest::{ChunkHash, Manifest};
use anabranch_proto::version::{Root, Version};

use crate::image::blob::Stamp;
use crate::image::chunks::{ChunkSet, Ledger};
use crate::memory::home;
use crate::memory::lock::{DirLock, LockError};
use crate::memory::map::SharedMap;
use crate::memory::mappers::{Mapper, mappers};

mod filling;
mod record;
mod sharing;
mod staged;

pub(crate) use filling::{Base, Filler, Filling};
use record::Record;
pub use staged::StagedSlot;
pub(crate) use staged::{Adopting, VersionDir};

const SLOTS: usize = 2;

/// A staging area. Clones are the same area; a second process cannot open it.
#[derive(Clone)]
pub struct Staging {
    shared: Arc<Shared>,
}

struct Shared {
    root: PathBuf,
    /// Locked while this process lives.
    _lock: DirLock,
    slots: Mutex<[Slot; SLOTS]>,
    /// True if other agents of this host may have a slot's memory.
    shared: AtomicBool,
    /// Memory of former slots that others still use.
    left: Mutex<Vec<Arc<Memory>>>,
    published: AtomicU64,
}

#[derive(Default)]
struct Slot {
    memory: Option<Arc<Memory>>,
    generation: Arc<AtomicU64>,
    state: SlotState,
    /// Cloned into each [`Base`].
    reading: Arc<()>,
}

#[derive(Clone, Debug, Default)]
enum SlotState {
    #[default]
    Idle,
    Filling,
    Staged {
        root: Root,
        manifest: Arc<Manifest>,
    },
}

/// A slot's mapping, and the hash of each chunk that it is known to hold.
struct Memory {
    map: SharedMap,
    record: Record,
}

/// Why the staging area cannot take a version.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// A file of the area cannot be used.
    #[error("cannot use {path} for staging: {error}")]
    Io { path: PathBuf, error: io::Error },
    /// Another agent has the area.
    #[error(
        "{path} is the staging area of another agent: {error}; give each agent on a host its own name"
    )]
    Locked { path: PathBuf, error: LockError },
    /// The file system has too little room.
    #[error(
        "{path} is too small: a version needs {need} bytes more there, {free} of {size} are free. In a \
         container start it with a larger --shm-size (Docker) or mount an emptyDir with medium: \
         Memory at /dev/shm (Kubernetes); two versions must fit"
    )]
    TooSmall { path: PathBuf, need: u64, free: u64, size: u64 },
    /// Both slots are in use.
    #[error("both staging slots are in use: {}", .users.join("; "))]
    Busy { users: Vec<String> },
    /// Memory of another process cannot get a name here.
    #[error(
        "cannot link memory of another process into {path}: {error} (staging and the trainer's arena must \
         be on one mount of one tmpfs, and belong to the same user)"
    )]
    Link { path: PathBuf, error: io::Error },
    /// The image does not fit its manifest.
    #[error("the image does not fit its manifest: {0}")]
    Image(#[from] crate::image::layout::LayoutError),
}

// === impl Staging ===

impl Staging {
    /// Opens `<shm>/<name>`, creating it if needed. Directories of versions left there by an earlier
    /// life are removed; the slots and what they hold are kept.
    pub fn open(shm: &Path, name: &str) -> Result<Staging, StageError> {
        // An agent is often the only one of us that comes back to a host.
        home::sweep(shm, None);
        let root = shm.join(name);
        let failed = |error| StageError::Io { path: root.clone(), error };
        fs::create_dir_all(&root).map_err(failed)?;
        let lock = DirLock::take(&root.join("lock"), "agent").map_err(|error| match error {
            LockError::Io(error) => failed(error),
            error => StageError::Locked { path: root.clone(), error },
        })?;
        for entry in fs::read_dir(&root).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.is_dir() {
                fs::remove_dir_all(&path).map_err(failed)?;
            }
        }
        let (slots, shared, left, published) = Default::default();
        let shared = Shared { root, _lock: lock, slots, shared, left, published };
        Ok(Staging { shared: Arc::new(shared) })
    }

    /// The directory of the area.
    pub fn root(&self) -> &Path {
        &self.shared.root
    }

    /// Says at start whether two versions of `image_bytes` will fit.
    pub fn check_space(&self, image_bytes: u64) -> Result<(), StageError> {
        let slots = self.lock();
        let have: u64 = (0..SLOTS).map(|ix| self.slot_bytes(&slots[ix], ix)).sum();
        self.require((SLOTS as u64 * image_bytes).saturating_sub(have))
    }

    /// True if both slots have memory for a version of `bytes`.
    pub(crate) fn is_prepared(&self, bytes: u64) -> bool {
        let fits = |slot: &Slot| slot.memory.as_ref().is_some_and(|m| m.map.len() == bytes);
        self.lock().iter().all(fits)
    }

    /// Gives both slots memory for a version of `bytes`, but for slots in use. Holds them meanwhile: who
    /// begins a version then would wait for this very memory.
    pub(crate) fn prepare(&self, bytes: u64) -> Result<(), StageError> {
        let mut slots = self.lock();
        for ix in 0..SLOTS {
            if slots[ix].state.user().is_some() {
                continue;
            }
            self.recover(&mut slots[ix], ix)?;
            // Memory of another size may be in the hands of others: whoever begins a version looks.
            if slots[ix].memory.is_none() {
                self.sized(&mut slots[ix], ix, bytes)?;
            }
        }
        Ok(())
    }

    /// Takes a slot for `manifest`: the one that already holds most of it, unless it is staged or somebody
    /// uses its memory. With `leave`, memory that others use is left to them and the slot gets new.
    pub(crate) fn begin(
        &self,
        manifest: &Arc<Manifest>,
        leave: bool,
    ) -> Result<Filling, StageError> {
        let mut slots = self.lock();
        self.forget_unused();
        let (mut users, mut free) = (Vec::new(), Vec::new());
        for ix in 0..SLOTS {
            if let Some(user) = slots[ix].state.user() {
                users.push(format!("slot {ix} {user}"));
                continue;
            }
            self.recover(&mut slots[ix], ix)?;
            match self.user(&slots[ix], ix)? {
                Some(user) if !leave || slots[ix].is_read() => users.push(user),
                _ => {
                    let known = |m: &Arc<Memory>| m.record.matching(manifest);
                    free.push((slots[ix].memory.as_ref().map_or(0, known), ix));
                }
            }
        }
        free.sort_by_key(|(known, ix)| (std::cmp::Reverse(*known), *ix));
        for (_, ix) in free {
            // First, so that whoever opens the memory from now on finds that it is too late: then it can be
            // seen whether somebody has it.
            slots[ix].generation.fetch_add(1, Ordering::AcqRel);
            self.unlink_versions(ix)?;
            if leave {
                self.leave_if_used(&mut slots[ix], ix)?;
            } else if self.is_with_others(&slots[ix]) {
                users.push(format!("slot {ix} is used by other agents of this host"));
                continue;
            }
            return self.fill(&mut slots[ix], ix, manifest);
        }
        Err(StageError::Busy { users })
    }

    fn fill(
        &self,
        slot: &mut Slot,
        ix: usize,
        manifest: &Arc<Manifest>,
    ) -> Result<Filling, StageError> {
        let memory = self.sized(slot, ix, manifest.image_bytes)?;
        let held = memory.record.keep_matching(manifest, &memory.map).map_err(|e| self.io(e))?;
        let ledger = Arc::new(Ledger::new(held));
        slot.state = SlotState::Filling;
        let stamp = Stamp::of(&slot.generation);
        let filler = Filler { memory, manifest: Arc::clone(manifest), ledger };
        Ok(Filling { staging: self.clone(), slot: ix, filler, stamp })
    }

    /// Text on who keeps an idle slot from being reused, if somebody does.
    fn user(&self, slot: &Slot, ix: usize) -> Result<Option<String>, StageError> {
        let Some(memory) = &slot.memory else { return Ok(None) };
        if slot.is_read() {
            return Ok(Some(format!("slot {ix} is the base of a transfer")));
        }
        let mapped = mappers(memory.map.backing(), memory.map.address()).map_err(|e| self.io(e))?;
        let Some(Mapper { pid, command }) = mapped.into_iter().next() else { return Ok(None) };
        Ok(Some(format!("slot {ix} is mapped by process {pid} ({command})")))
    }

    /// Maps a slot that an earlier life of this agent left.
    fn recover(&self, slot: &mut Slot, ix: usize) -> Result<(), StageError> {
        let path = self.slot_path(ix);
        let len = fs::metadata(&path).map_or(0, |m| m.len());
        if slot.memory.is_none() && len > 0 {
            let map = SharedMap::file(&path, len).map_err(|e| self.io(e))?;
            let record = Record::open(&self.record_path(ix)).map_err(|e| self.io(e))?;
            slot.memory = Some(Arc::new(Memory { map, record }));
        }
        Ok(())
    }

    /// The slot's memory at that size. The mapping is kept where the size is the same.
    fn sized(&self, slot: &mut Slot, ix: usize, bytes: u64) -> Result<Arc<Memory>, StageError> {
        if let Some(memory) = slot.memory.as_ref().filter(|m| m.map.len() == bytes) {
            return Ok(Arc::clone(memory));
        }
        self.require(bytes.saturating_sub(self.slot_bytes(slot, ix)))?;
        slot.memory = None;
        let record = Record::open(&self.record_path(ix)).map_err(|e| self.io(e))?;
        let map = SharedMap::file(&self.slot_path(ix), bytes).map_err(|e| self.io(e))?;
        let memory = Arc::new(Memory { map, record });
        slot.memory = Some(Arc::clone(&memory));
        Ok(memory)
    }

    fn require(&self, need: u64) -> Result<(), StageError> {
        let fs = rustix::fs::statvfs(&self.shared.root).map_err(|e| self.io(e.into()))?;
        let (free, size) = (fs.f_bavail * fs.f_frsize, fs.f_blocks * fs.f_frsize);
        // A tmpfs without a limit says 0 blocks.
        if size > 0 && need > free {
            return Err(StageError::TooSmall { path: self.shared.root.clone(), need, free, size });
        }
        Ok(())
    }

    fn slot_bytes(&self, slot: &Slot, ix: usize) -> u64 {
        let on_disk = || fs::metadata(self.slot_path(ix)).map_or(0, |m| m.len());
        slot.memory.as_ref().map_or_else(on_disk, |m| m.map.len())
    }

    /// Directories that name the slot's old contents.
    fn unlink_versions(&self, ix: usize) -> Result<(), StageError> {
        let suffix = format!("-s{ix}");
        for entry in fs::read_dir(&self.shared.root).map_err(|e| self.io(e))? {
            let path = entry.map_err(|e| self.io(e))?.path();
            if path.is_dir() && path.to_string_lossy().ends_with(&suffix) {
                fs::remove_dir_all(&path).map_err(|e| self.io(e))?;
            }
        }
        Ok(())
    }

    /// The version that is staged in the other slot.
    fn base(&self, slot: usize) -> Option<Base> {
        let slots = self.lock();
        let other = &slots[(slot + 1) % SLOTS];
        let SlotState::Staged { root, manifest } = &other.state else { return None };
        let (memory, manifest) = (other.memory.clone()?, Arc::clone(manifest));
        Some(Base { root: *root, manifest, memory, _reading: Arc::clone(&other.reading) })
    }

    /// A directory for a version, whose name nobody had before; `suffix` tells what is in it.
    fn version_dir(&self, version: Version, suffix: &str) -> Result<VersionDir, StageError> {
        let nth = self.shared.published.fetch_add(1, Ordering::Relaxed);
        let Version { epoch, number, root } = version;
        let name = format!("v{number}-e{epoch}-{root}-{nth}-{suffix}");
        VersionDir::make(&self.shared.root, &name).map_err(|e| self.io(e))
    }

    /// Gives back the memory of slots that nobody needs now: versions come another way.
    pub(crate) fn release_idle(&self) -> Result<(), StageError> {
        let mut slots = self.lock();
        for ix in 0..SLOTS {
            let idle = slots[ix].state.user().is_none() && self.user(&slots[ix], ix)?.is_none();
            if !idle {
                continue;
            }
            let slot = &mut slots[ix];
            slot.generation.fetch_add(1, Ordering::AcqRel);
            slot.memory = None;
            for path in [self.slot_path(ix), self.record_path(ix)] {
                fs::remove_file(path).or_else(ignore_absent).map_err(|e| self.io(e))?;
            }
        }
        Ok(())
    }

    fn slot_path(&self, ix: usize) -> PathBuf {
        self.shared.root.join(format!("slot-{ix}"))
    }

    fn record_path(&self, ix: usize) -> PathBuf {
        self.shared.root.join(format!("slot-{ix}.chunks"))
    }

    /// Gives all memory back: at the end of the agent, after the engine ended or moved on.
    pub fn remove(self) -> Result<(), StageError> {
        fs::remove_dir_all(&self.shared.root).map_err(|e| self.io(e))
    }

    fn io(&self, error: io::Error) -> StageError {
        StageError::Io { path: self.shared.root.clone(), error }
    }

    fn lock(&self) -> MutexGuard<'_, [Slot; SLOTS]> {
        self.shared.slots.lock().expect("no holder of the slots' lock panics")
    }
}

fn ignore_absent(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

// === impl Slot ===

impl Slot {
    /// A transfer has it as its base.
    fn is_read(&self) -> bool {
        Arc::strong_count(&self.reading) > 1
    }
}

// === impl SlotState ===

impl SlotState {
    fn user(&self) -> Option<&'static str> {
        match self {
            SlotState::Idle => None,
            SlotState::Filling => Some("is being filled"),
            SlotState::Staged { .. } => Some("holds a version that is loaded or being loaded"),
        }
    }
}

/// Keeps [`ChunkHash`]es comparable with "not known".
const UNKNOWN: ChunkHash = [0; 32];

#[cfg(test)]
mod tests;
