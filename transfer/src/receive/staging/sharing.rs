//! Agents of one host that share: what one of them fetched, the others adopt (see `fetch/adopt`). Owns the
//! socket where they ask for it, and the memory of slots that was left to them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};

use super::{Memory, Slot, StageError, Staging, ignore_absent};
use crate::memory::home;
use crate::memory::map::SharedMap;

const SOCKET: &str = "socket";
/// Versions whose memory may be in the hands of others besides the two slots.
const MAX_LEFT: usize = 2;

impl Staging {
    /// The socket at which agents of this host are passed memory, and a name of the host, which is the same for
    /// all agents of one user whose staging areas lie on one tmpfs. `None` where the kernel cannot say
    /// whether memory is still used.
    pub fn sharing(&self) -> Option<(PathBuf, String)> {
        let socket = self.root().join(SOCKET);
        let usable = home::check_socket(&socket)
            .and_then(|()| fs::remove_file(&socket).or_else(ignore_absent))
            .and_then(|()| home::probe(self.root()))
            .and_then(|()| self.host());
        match usable {
            Ok(host) => {
                self.shared.shared.store(true, Ordering::Release);
                Some((socket, host))
            }
            Err(error) => {
                let root = self.root().display();
                tracing::warn!(%root, %error, "agents of this host will get copies");
                None
            }
        }
    }

    fn host(&self) -> io::Result<String> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let (device, user) =
            (fs::metadata(self.root())?.dev(), rustix::process::geteuid().as_raw());
        let id = blake3::hash(format!("{boot}\n{device}\n{user}").as_bytes());
        Ok(hex::encode(&id.as_bytes()[..8]))
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.shared.shared.load(Ordering::Acquire)
    }

    /// True if another agent of this host, or the engine of one, uses the slot's memory.
    pub(super) fn is_with_others(&self, slot: &Slot) -> bool {
        let used = |memory: &Arc<Memory>| is_used(&memory.map);
        self.is_shared() && slot.memory.as_ref().is_some_and(used)
    }

    /// Leaves the slot's memory to those who use it, if anybody does; the slot has none then.
    pub(super) fn leave_if_used(&self, slot: &mut Slot, ix: usize) -> Result<(), StageError> {
        let Some(memory) = slot.memory.take() else { return Ok(()) };
        if !is_used(&memory.map) {
            slot.memory = Some(memory);
            return Ok(());
        }
        let mut left = self.left();
        if left.len() == MAX_LEFT {
            slot.memory = Some(memory);
            let user = format!("slot {ix} and {MAX_LEFT} versions before it are used on this host");
            return Err(StageError::Busy { users: vec![user] });
        }
        for path in [self.slot_path(ix), self.record_path(ix)] {
            fs::remove_file(path).or_else(ignore_absent).map_err(|e| self.io(e))?;
        }
        let root = self.root().display();
        tracing::info!(%root, "memory of an older version is still used on this host, and left alone");
        left.push(memory);
        Ok(())
    }

    /// Gives back what was left to others that have let go.
    pub(super) fn forget_unused(&self) {
        self.left().retain(|memory| is_used(&memory.map));
    }

    fn left(&self) -> MutexGuard<'_, Vec<Arc<Memory>>> {
        self.shared.left.lock().expect("nothing panics under it")
    }
}

/// True if somebody else uses the memory, or if the kernel cannot tell.
fn is_used(map: &SharedMap) -> bool {
    !map.is_exclusive().unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot tell whether memory is still used: it is left alone");
        false
    })
}
