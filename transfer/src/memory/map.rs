//! Shared memory that is both a file (for `sendfile` and hard links) and a mapping (for copies and
//! receives). Owns the mapping and all `unsafe` of the crate; who may touch which range is decided by
//! its callers: the arena's slot protocol and the receiver's chunk queue.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use memmap2::{Advice, MmapRaw};

/// A shared mapping of a whole file, prefaulted but for what was only reserved.
pub struct SharedMap {
    map: MmapRaw,
    file: Arc<File>,
    /// Number of bytes from the front that have their memory.
    backed: Mutex<u64>,
}

/// Largest size of a page: memory that is given back begins at a multiple of it.
const LARGEST_PAGE_BYTES: u64 = 64 << 10;

// === impl SharedMap ===

impl SharedMap {
    /// Anonymous shared memory, named `name` in `/proc/<pid>/maps`; not bounded by the size of /dev/shm.
    pub fn anonymous(name: &str, len: u64) -> io::Result<SharedMap> {
        let map = SharedMap::reserved(name, len)?;
        map.back(len)?;
        Ok(map)
    }

    /// Like [`SharedMap::anonymous`], with memory for these ranges only: the rest must not be touched.
    pub(crate) fn anonymous_in_part(
        name: &str,
        len: u64,
        parts: &[Range<u64>],
    ) -> io::Result<SharedMap> {
        let map = SharedMap::reserved(name, len)?;
        parts.iter().try_for_each(|part| map.populate(part.clone()))?;
        Ok(map)
    }

    /// Like [`SharedMap::anonymous`], but addresses only: [`SharedMap::back`] gives them memory.
    pub(crate) fn reserved(name: &str, len: u64) -> io::Result<SharedMap> {
        let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?;
        SharedMap::over(File::from(fd), len)
    }

    /// The file at `path`, created with mode 0644 or cut to `len`.
    pub(crate) fn file(path: &Path, len: u64) -> io::Result<SharedMap> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o644);
        let file = options.open(path)?;
        let before = file.metadata()?.len();
        let map = SharedMap::over(file, len)?;
        map.back(len).inspect_err(|_| {
            // A file without its memory must not pass for one that has it.
            map.file.set_len(before.min(len)).ok();
        })?;
        Ok(map)
    }

    fn over(file: File, len: u64) -> io::Result<SharedMap> {
        if file.metadata()?.len() != len {
            file.set_len(len)?;
        }
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let map = memmap2::MmapOptions::new().len(len.max(1)).map_raw(&file)?;
        Ok(SharedMap { map, file: Arc::new(file), backed: Mutex::default() })
    }

    /// Every page is touched here, so that none faults on the update path.
    fn populate(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        // Allocating fails with ENOSPC where writing to a sparse file would raise SIGBUS.
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&self.file, flags, range.start, range.end - range.start)?;
        let (at, len) = self.bounds(range.clone());
        if self.map.advise_range(Advice::PopulateWrite, at, len).is_err() {
            // Kernels before 5.14 do not know it: fault the pages in by reading them.
            let touch = |bytes: &[u8]| bytes.iter().step_by(4096).fold(0u8, |a, b| a ^ b);
            std::hint::black_box(self.read(range, touch));
        }
        Ok(())
    }

    /// The first `to` bytes have their memory after this.
    pub(crate) fn back(&self, to: u64) -> io::Result<()> {
        let mut backed = self.backed.lock().expect("nothing panics under it");
        if to > *backed {
            self.populate(*backed..to)?;
            *backed = to;
        }
        Ok(())
    }

    pub(crate) fn backed(&self) -> u64 {
        *self.backed.lock().expect("nothing panics under it")
    }

    /// Gives memory back behind the first `kept` bytes, in whole pages.
    pub(crate) fn release(&self, kept: u64) -> io::Result<()> {
        let mut backed = self.backed.lock().expect("nothing panics under it");
        let kept = kept.next_multiple_of(LARGEST_PAGE_BYTES);
        if kept < *backed {
            use rustix::fs::FallocateFlags as Flags;
            let flags = Flags::PUNCH_HOLE | Flags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, flags, kept, *backed - kept)?;
            *backed = kept;
        }
        Ok(())
    }

    /// Length of the file in bytes, as far as it is mapped.
    #[expect(clippy::len_without_is_empty, reason = "nobody maps an empty file")]
    pub fn len(&self) -> u64 {
        self.file.metadata().map(|m| m.len()).unwrap_or(0).min(self.map.len() as u64)
    }

    /// The file behind the mapping.
    pub fn backing(&self) -> &Arc<File> {
        &self.file
    }

    /// True if nothing on this host but this map leads to its memory: no other name, no other open file, no
    /// other mapping, in any process, container or user's. The kernel grants a write lease only then.
    // Some C libraries have the kinds of leases as short integers.
    #[allow(clippy::useless_conversion)]
    pub(crate) fn is_exclusive(&self) -> io::Result<bool> {
        if self.file.metadata()?.nlink() > 1 {
            return Ok(false);
        }
        let fd = self.file.as_raw_fd();
        // SAFETY: these take a descriptor that is open for the length of the call, and integers.
        let control = |command, argument: i32| match unsafe { libc::fcntl(fd, command, argument) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        };
        // Whoever opens the file while we hold the lease has a signal sent to us: one that is ignored.
        control(F_SETSIG, libc::SIGURG)?;
        match control(libc::F_SETLEASE, libc::F_WRLCK.into()) {
            Ok(()) => control(libc::F_SETLEASE, libc::F_UNLCK.into()).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Address of the mapping in this process: tells it from a second mapping in `/proc/self/maps`.
    pub fn address(&self) -> usize {
        self.map.as_ptr() as usize
    }

    /// Writes through `fill`. The caller owns the range: nobody else writes it, and readers of it know
    /// that it is not valid (a generation, a ledger, a hash).
    pub fn write<R>(&self, range: Range<u64>, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let (at, len) = self.bounds(range);
        // SAFETY: `bounds` keeps the range inside the mapping, which lives as long as `self`. The
        // caller owns the range (above); other processes map the file read-only and after the seal.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(at), len) };
        fill(bytes)
    }

    /// Reads through `f`. The caller knows that nobody writes the range meanwhile.
    pub fn read<R>(&self, range: Range<u64>, f: impl FnOnce(&[u8]) -> R) -> R {
        let (at, len) = self.bounds(range);
        // SAFETY: as in `write`; the caller's protocol excludes a writer for the time of the call.
        let bytes = unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(at), len) };
        f(bytes)
    }

    fn bounds(&self, range: Range<u64>) -> (usize, usize) {
        let mapped = self.map.len() as u64;
        assert!(range.start <= range.end && range.end <= mapped, "{range:?} of {mapped} bytes");
        (range.start as usize, (range.end - range.start) as usize)
    }
}

/// Command of `fcntl`, the same on every Linux.
const F_SETSIG: i32 = 10;

/// A path that opens the same file anew, under any name or none.
pub(crate) fn descriptor_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_to_the_mapping_is_read_from_the_file() {
        use std::os::unix::fs::FileExt;
        let map = SharedMap::anonymous("anabranch-test", 10_000).expect("memfd");
        map.write(5000..5003, |b| b.copy_from_slice(b"abc"));
        let mut out = [0; 3];
        map.backing().read_exact_at(&mut out, 5000).expect("read");
        assert_eq!((&out, map.len()), (b"abc", 10_000));
    }

    #[test]
    fn what_is_reserved_takes_memory_as_far_as_it_is_backed_until_that_is_released() {
        let map = SharedMap::reserved("anabranch-test", 1 << 40).expect("memfd");
        let used = || map.backing().metadata().expect("metadata").blocks() * 512;
        assert_eq!((used(), map.len()), (0, 1 << 40));
        map.back(1 << 20).expect("backed");
        map.back(1000).expect("there already");
        assert_eq!(used(), 1 << 20);
        map.write(0..3, |b| b.copy_from_slice(b"abc"));
        map.release(100 << 10).expect("released");
        assert_eq!((used(), map.read(0..3, <[u8]>::to_vec)), (128 << 10, b"abc".to_vec()));
        map.back(1 << 20).expect("backed again");
        assert_eq!(used(), 1 << 20);
    }

    #[test]
    fn memory_is_exclusive_until_somebody_opens_maps_or_names_it() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("shm");
        let path = dir.path().join("slot");
        let own = SharedMap::file(&path, 8192).expect("map");
        let exclusive = || own.is_exclusive().expect("lease");
        assert!(exclusive());
        let opened = File::open(descriptor_path(own.backing())).expect("open");
        assert!(!exclusive());
        let mapped = memmap2::MmapOptions::new().map_raw_read_only(&opened).expect("map");
        drop(opened);
        assert!(!exclusive(), "the mapping outlives its descriptor");
        drop(mapped);
        assert!(exclusive());
        std::fs::hard_link(&path, dir.path().join("name")).expect("link");
        assert!(!exclusive());
        std::fs::remove_file(dir.path().join("name")).expect("unlink");
        let opened = File::open(&path).expect("open");
        let mut reader =
            std::process::Command::new("sleep").arg("60").stdin(opened).spawn().expect("sleep");
        assert!(!exclusive(), "another process has it open");
        reader.kill().expect("kill");
        reader.wait().expect("wait");
        assert!(exclusive());
    }

    #[test]
    #[should_panic(expected = "of 4096 bytes")]
    fn a_range_outside_the_mapping_is_never_touched() {
        SharedMap::anonymous("anabranch-test", 4096).expect("memfd").read(4000..5000, |_| ());
    }
}
