//! The trainer's side of the memory: prefaulted slots of shared memory, two in the steady state, the second
//! made ready behind the first version. Publishing copies into one and never waits for readers: streams are
//! revoked, and memory that a receiver of this host adopted is left to it.
//!
//! ```text
//!   slot:  Free ── begin ──► Writing ── seal ──► Sealed{version} ── two newer begin ──► Free
//!          Writing ── a part is hashed ──► Parted{number} ── seal, with what the others have ──► Sealed
//!          Writing, Parted ── dropped before the seal ──► Free
//!   Free -> Writing only if nobody else on this host has the memory open, mapped or named; else a new slot
//!   is made, and when all are let go the surplus is given back.
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use anabranch_proto::version::{Root, Version};

use crate::image::blob::Stamp;
use crate::image::layout::Layout;
use crate::memory::map::SharedMap;
use crate::send::holder::Holder;

mod seal;

use crate::memory::home::{Home, HomeError};
pub(crate) use seal::{Sealer, SlotWriter};

/// Sealed versions that are kept, and slots in the steady state.
const SLOTS: usize = 2;

/// Versions in the hands of others on this host from which on no more memory is passed on: an engine
/// that never lets go must not take one version's memory more each time.
const MAX_LEFT: u32 = 4;

/// The slots and the holder that lends what is sealed in them.
#[derive(Clone)]
pub(crate) struct Arena {
    shared: Arc<Shared>,
}

struct Shared {
    holder: Holder,
    chunk_bytes: u32,
    state: Mutex<State>,
    sealed: Condvar,
}

struct State {
    /// The directory in which slots have names; without it they are anonymous.
    home: Option<Home>,
    slots: BTreeMap<SlotId, Slot>,
    next: SlotId,
    closed: bool,
}

type SlotId = u64;

struct Slot {
    map: Arc<SharedMap>,
    /// Ranges of the image for which the slot has memory.
    extent: Vec<Range<u64>>,
    /// Path of the slot's file in the home.
    path: Option<PathBuf>,
    /// Bumped when the memory changes hands.
    generation: Arc<AtomicU64>,
    state: SlotState,
}

#[derive(Clone, Copy, Debug)]
enum SlotState {
    Free,
    Writing,
    /// Waits for what the other senders of the version have.
    Parted {
        number: u64,
    },
    Sealed {
        version: Version,
    },
}

/// A slot to write a version into, and what that cost others.
pub(crate) struct Begun {
    pub(crate) writer: SlotWriter,
    pub(crate) sealer: Sealer,
    /// Streams that were reading the version that is no longer lent.
    pub(crate) revoked: u32,
    /// Slots of older versions that are left to receivers of this host.
    pub(crate) left: u32,
}

/// Why there is no slot for a version.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The system gives no memory.
    #[error(
        "cannot get {bytes} bytes of shared memory for an arena slot: {error}; two versions must fit \
         in memory (in a container, memory limits count shared memory too)"
    )]
    Memory { bytes: u64, error: std::io::Error },
    /// The part before is neither sealed nor dropped.
    #[error(
        "the part of version {number} that was published before is not sealed yet: seal it with what the \
         other senders have, or drop it"
    )]
    Unsealed { number: u64 },
    /// The directory of the slots cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
}

// === impl Arena ===

impl Arena {
    pub(crate) fn new(
        holder: Holder,
        chunk_bytes: u32,
        home: Option<Home>,
    ) -> Result<Arena, ArenaError> {
        let mut state = State { home, slots: BTreeMap::new(), next: 0, closed: false };
        state.take_over()?;
        let state = Mutex::new(state);
        Ok(Arena {
            shared: Arc::new(Shared { holder, chunk_bytes, state, sealed: Condvar::new() }),
        })
    }

    /// Takes a slot for this much of the image; the older of two sealed versions is lent no more. Waits for
    /// the seal of the version before, whose hashing nobody can hold up.
    pub(crate) fn begin(
        &self,
        layout: &Layout,
        extent: &[Range<u64>],
    ) -> Result<Begun, ArenaError> {
        let busy = |state: &mut State| state.slots.values().any(Slot::is_writing);
        let state = self.shared.sealed.wait_while(self.lock(), busy);
        let mut state = state.expect("no holder of the slots' lock panics");
        if let Some(number) = state.slots.values().find_map(Slot::parted) {
            return Err(ArenaError::Unsealed { number });
        }
        let revoked = self.withdraw_older(&mut state);
        let (id, left) = state.take(layout.image_bytes(), extent)?;
        self.shared.holder.pass_memory(state.home.is_some() && left < MAX_LEFT);
        let slot = state.slots.get_mut(&id).expect("it was just taken");
        slot.generation.fetch_add(1, Ordering::AcqRel);
        slot.state = SlotState::Writing;
        let stamp = Stamp::of(&slot.generation);
        let (writer, sealer) = seal::ends(self, id, stamp, &slot.map, layout.image_bytes());
        Ok(Begun { writer, sealer, revoked, left })
    }

    /// The slot for the version after the first, before that comes. Whoever begins meanwhile waits for it,
    /// instead of making the same one.
    pub(crate) fn prepare(&self, bytes: u64, extent: &[Range<u64>]) {
        let mut state = self.lock();
        if state.closed || state.slots.len() >= SLOTS {
            return;
        }
        if let Err(error) = state.fresh(bytes, extent) {
            tracing::info!(%error, "no memory for a second version yet");
        }
    }

    /// Returns the streams that read it.
    fn withdraw_older(&self, state: &mut State) -> u32 {
        let sealed = state.slots.values_mut().filter_map(|slot| match slot.state {
            SlotState::Sealed { version } => Some((version, slot)),
            SlotState::Free | SlotState::Writing | SlotState::Parted { .. } => None,
        });
        let mut sealed: Vec<(Version, &mut Slot)> = sealed.collect();
        // A new epoch may begin with a smaller number.
        sealed.sort_by_key(|(version, _)| (version.epoch, version.number));
        if sealed.len() < SLOTS {
            return 0;
        }
        let (version, slot) = sealed.swap_remove(0);
        // First, so that whoever opens it from now on finds that it is too late: then it can be seen
        // whether somebody has it.
        slot.generation.fetch_add(1, Ordering::AcqRel);
        slot.state = SlotState::Free;
        let revoked = self.shared.holder.held(version).map_or(0, |h| h.leases());
        self.shared.holder.withdraw(version);
        revoked
    }

    /// The image of a sealed version that is still in its slot, with the stamp that says so.
    pub(crate) fn sealed(&self, root: Root) -> Option<(Arc<SharedMap>, Stamp)> {
        let state = self.lock();
        let is_it =
            |s: &&Slot| matches!(s.state, SlotState::Sealed { version } if version.root == root);
        let slot = state.slots.values().find(is_it)?;
        Some((Arc::clone(&slot.map), Stamp::of(&slot.generation)))
    }

    /// Gives names back. What receivers have adopted stays theirs.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        for slot in state.slots.values() {
            slot.unlink();
        }
        state.home = None;
        state.closed = true;
    }

    fn set(&self, slot: SlotId, to: SlotState) {
        if let Some(slot) = self.lock().slots.get_mut(&slot) {
            slot.state = to;
        }
        self.shared.sealed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("no holder of the slots' lock panics")
    }
}

// === impl State ===

impl State {
    /// The slots of a trainer of this job that was killed: free, once their readers let go.
    fn take_over(&mut self) -> Result<(), ArenaError> {
        let Some(home) = &self.home else { return Ok(()) };
        for path in home.leftovers()? {
            let failed = |error| HomeError::Unusable { path: path.clone(), error };
            let bytes = std::fs::metadata(&path).map_err(failed)?.len();
            let map = SharedMap::file(&path, bytes).map_err(failed)?;
            tracing::info!(path = %path.display(), bytes, "took over a slot of a trainer that ended");
            self.slots.insert(self.next, Slot::named(map, path));
            self.next += 1;
        }
        Ok(())
    }

    /// A slot of so many bytes that nobody else has, and how many others are left to those who have them.
    fn take(&mut self, bytes: u64, extent: &[Range<u64>]) -> Result<(SlotId, u32), ArenaError> {
        let free = |slot: &Slot| matches!(slot.state, SlotState::Free);
        let free: Vec<SlotId> =
            self.slots.iter().filter(|(_, slot)| free(slot)).map(|(id, _)| *id).collect();
        let (mut unused, used): (Vec<SlotId>, Vec<SlotId>) =
            free.into_iter().partition(|id| self.slots[id].is_unused());
        let fits =
            |id: &SlotId| self.slots[id].map.len() == bytes && self.slots[id].extent == extent;
        let fitting = unused.iter().position(fits).map(|at| unused.swap_remove(at));
        for id in unused {
            if fitting.is_none() || self.slots.len() > SLOTS {
                self.give_back(id);
            }
        }
        let left = used.len() as u32;
        if left > 0 {
            tracing::info!(
                left,
                "memory of older versions is still used on this host, and left alone"
            );
        }
        Ok((fitting.map_or_else(|| self.fresh(bytes, extent), Ok)?, left))
    }

    fn give_back(&mut self, id: SlotId) {
        if let Some(slot) = self.slots.remove(&id) {
            slot.unlink();
        }
    }

    fn fresh(&mut self, bytes: u64, extent: &[Range<u64>]) -> Result<SlotId, ArenaError> {
        let id = self.next;
        let slot = match &self.home {
            // What is not whole is of no use to others of this host.
            Some(home) if extent.first() == Some(&(0..bytes)) => match home.slot(id, bytes) {
                Ok((map, path)) => Slot::named(map, path),
                Err(error) if home.is_required() => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(%error, "engines of this host will get copies");
                    Slot::anonymous(id, bytes, extent)?
                }
            },
            _ => Slot::anonymous(id, bytes, extent)?,
        };
        self.next += 1;
        self.slots.insert(id, slot);
        Ok(id)
    }
}

// === impl Slot ===

impl Slot {
    fn named(map: SharedMap, path: PathBuf) -> Slot {
        let extent = std::iter::once(0..map.len()).collect();
        Slot::free(map, extent, Some(path))
    }

    fn anonymous(id: SlotId, bytes: u64, extent: &[Range<u64>]) -> Result<Slot, ArenaError> {
        let name = format!("anabranch-arena-{id}");
        let map = SharedMap::anonymous_in_part(&name, bytes, extent);
        let map = map.map_err(|error| {
            let bytes = extent.iter().map(|part| part.end - part.start).sum();
            ArenaError::Memory { bytes, error }
        })?;
        Ok(Slot::free(map, extent.to_vec(), None))
    }

    fn free(map: SharedMap, extent: Vec<Range<u64>>, path: Option<PathBuf>) -> Slot {
        let (map, generation) = (Arc::new(map), Arc::default());
        Slot { map, extent, path, generation, state: SlotState::Free }
    }

    fn parted(&self) -> Option<u64> {
        match self.state {
            SlotState::Parted { number } => Some(number),
            SlotState::Free | SlotState::Writing | SlotState::Sealed { .. } => None,
        }
    }

    fn is_writing(&self) -> bool {
        matches!(self.state, SlotState::Writing)
    }

    /// Anonymous memory is passed to nobody.
    fn is_unused(&self) -> bool {
        self.path.is_none() || self.map.is_exclusive().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot tell whether a slot is still used: it is left alone");
            false
        })
    }

    fn unlink(&self) {
        if let Some(path) = &self.path {
            std::fs::remove_file(path).ok();
        }
    }
}
