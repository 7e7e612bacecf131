//! Which processes still map a file: the kernel's word on whether an engine is done with old weights.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

/// A process that maps the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapper {
    pub pid: u32,
    pub command: String,
}

/// Every visible process that maps `file`, other than this process's mapping at `own_address`.
/// Processes of other users and other pid namespaces may be invisible, so this comes on top of "the
/// next load returned", never instead of it.
pub(crate) fn mappers(file: &fs::File, own_address: usize) -> io::Result<Vec<Mapper>> {
    let meta = file.metadata()?;
    let dev = meta.dev();
    let device = format!("{:02x}:{:02x}", rustix::fs::major(dev), rustix::fs::minor(dev));
    let inode = meta.ino().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        // It ended meanwhile, or is not ours to look at.
        let Ok(maps) = fs::read_to_string(entry.path().join("maps")) else { continue };
        let own = (pid == std::process::id()).then_some(own_address);
        if maps.lines().any(|line| names(line, &device, &inode, own)) {
            let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push(Mapper { pid, command: command.trim().to_owned() });
        }
    }
    Ok(found)
}

/// `address perms offset dev inode path`
fn names(line: &str, device: &str, inode: &str, own: Option<usize>) -> bool {
    let mut fields = line.split_ascii_whitespace();
    let (address, dev_field) = (fields.next().unwrap_or(""), fields.nth(2));
    if dev_field != Some(device) || fields.next() != Some(inode) {
        return false;
    }
    let start = address.split('-').next().and_then(|a| usize::from_str_radix(a, 16).ok());
    own.is_none() || start != own
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::SharedMap;

    #[test]
    fn our_own_mapping_does_not_count_and_a_second_one_does() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("shm");
        let path = dir.path().join("slot");
        let own = SharedMap::file(&path, 8192).expect("map");
        let check = || mappers(own.backing(), own.address()).expect("proc");
        assert_eq!(check(), []);
        let second = SharedMap::file(&path, 8192).expect("map");
        assert_eq!(check().iter().map(|m| m.pid).collect::<Vec<_>>(), [std::process::id()]);
        drop(second);
        assert_eq!(check(), []);
    }
}
