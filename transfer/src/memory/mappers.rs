//! Which processes still map a file: the kernel's word on whether an engine is done with old weights.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard};

/// A process that maps the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapper {
    pub pid: u32,
    pub command: String,
}

/// A mapping of this process, by its address, that loads nothing: memory is lent through it.
#[derive(Debug)]
pub struct LendingMap(usize);

/// One for each file that is lent.
static LENDING: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

/// Every visible process that maps `file`, other than this process's mapping at `own_address` and those
/// that lend. Processes of other users and other pid namespaces may be invisible, so this comes on top of "the
/// next load returned", never instead of it.
pub(crate) fn mappers(file: &fs::File, own_address: usize) -> io::Result<Vec<Mapper>> {
    let meta = file.metadata()?;
    let dev = meta.dev();
    let device = format!("{:02x}:{:02x}", rustix::fs::major(dev), rustix::fs::minor(dev));
    let inode = meta.ino().to_string();
    let mut found = Vec::new();
    let mut own = lending().clone();
    own.insert(own_address);
    let none = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        // It ended meanwhile, or is not ours to look at.
        let Ok(maps) = fs::read_to_string(entry.path().join("maps")) else { continue };
        let own = if pid == std::process::id() { &own } else { &none };
        if maps.lines().any(|line| names(line, &device, &inode, own)) {
            let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push(Mapper { pid, command: command.trim().to_owned() });
        }
    }
    Ok(found)
}

/// `address perms offset dev inode path`
fn names(line: &str, device: &str, inode: &str, own: &BTreeSet<usize>) -> bool {
    let mut fields = line.split_ascii_whitespace();
    let (address, dev_field) = (fields.next().unwrap_or(""), fields.nth(2));
    if dev_field != Some(device) || fields.next() != Some(inode) {
        return false;
    }
    let start = address.split('-').next().and_then(|a| usize::from_str_radix(a, 16).ok());
    start.is_none_or(|start| !own.contains(&start))
}

fn lending() -> MutexGuard<'static, BTreeSet<usize>> {
    LENDING.lock().expect("held only to insert, remove and copy")
}

// === impl LendingMap ===

impl LendingMap {
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
