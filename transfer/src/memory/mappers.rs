//! Processes that still map a file: the kernel's word on whether an engine is done with old weights.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard};

use procfs::process::MemoryMap;

/// A process that maps a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapper {
    /// Process id, as this process sees it.
    pub pid: u32,
    /// Name of the command, cut to 15 characters by the kernel.
    pub command: String,
}

/// A mapping of this process, by its address, that loads nothing: memory is lent through it.
#[derive(Debug)]
pub struct LendingMap(usize);

/// Addresses of the mappings that lend, one for each file that is lent.
static LENDING: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

/// Every visible process that maps `file`, other than this process's mapping at `own_address` and those
/// that lend. Processes of other users and other pid namespaces may be invisible, so this comes on top of "the
/// next load returned", never instead of it.
pub(crate) fn mappers(file: &File, own_address: usize) -> io::Result<Vec<Mapper>> {
    let meta = file.metadata()?;
    let device = (rustix::fs::major(meta.dev()) as i32, rustix::fs::minor(meta.dev()) as i32);
    let (mut own, none) = (lending().clone(), BTreeSet::new());
    own.insert(own_address);
    let mut found = Vec::new();
    // A process that ended meanwhile, or is not ours to look at, has nothing to say.
    for process in procfs::process::all_processes().map_err(io::Error::other)?.flatten() {
        let Ok(maps) = process.maps() else { continue };
        let pid = process.pid() as u32;
        let own = if pid == std::process::id() { &own } else { &none };
        let is_it = |map: &MemoryMap| map.inode == meta.ino() && map.dev == device;
        if maps.iter().any(|map| is_it(map) && !own.contains(&(map.address.0 as usize))) {
            let command = process.stat().map(|stat| stat.comm).unwrap_or_default();
            found.push(Mapper { pid, command });
        }
    }
    Ok(found)
}

fn lending() -> MutexGuard<'static, BTreeSet<usize>> {
    LENDING.lock().expect("held only to insert, remove and copy")
}

// === impl LendingMap ===

impl LendingMap {
    /// Notes the mapping that begins at `address`, until the note is dropped.
    pub fn at(address: usize) -> LendingMap {
        lending().insert(address);
        LendingMap(address)
    }
}

impl Drop for LendingMap {
    fn drop(&mut self) {
        lending().remove(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::map::SharedMap;

    #[test]
    fn our_own_mapping_and_those_that_lend_do_not_count_and_a_second_one_does() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("shm");
        let path = dir.path().join("slot");
        let own = SharedMap::file(&path, 8192).expect("map");
        let look = || mappers(own.backing(), own.address()).expect("proc");
        // A child that another test starts has all of our mappings until it runs its own program.
        let child = |m: &Mapper| m.pid != std::process::id();
        let check =
            || std::iter::repeat_with(look).find(|m| !m.iter().any(child)).expect("endless");
        assert_eq!(check(), []);
        let second = SharedMap::file(&path, 8192).expect("map");
        let lending = LendingMap::at(second.address());
        assert_eq!(check(), []);
        drop(lending);
        assert_eq!(check().iter().map(|m| m.pid).collect::<Vec<_>>(), [std::process::id()]);
        drop(second);
        assert_eq!(check(), []);
    }
}
