//! A small file that tells what this engine made even after it was killed: bench and chaos runs read it to know which
//! tokens were lost with an engine, and when a stream's last token was made. Owns the file and its format.
//!
//! Bytes 0..8: tokens made for streams so far (u64 LE). From byte 64: one entry for each stream that ended by itself,
//! its seed and the monotonic time in nanoseconds (two u64 LE).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};

const ENTRIES_AT: u64 = 64;

pub(crate) struct Meter {
    file: File,
    made: u64,
    entries: Vec<u8>,
    end: u64,
}

impl Meter {
    pub fn create(path: &Path) -> std::io::Result<Self> {
        let file = File::create(path)?;
        file.write_all_at(&[0; 8], 0)?;
        Ok(Self { file, made: 0, entries: Vec::new(), end: ENTRIES_AT })
    }

    /// A stream has its last token.
    pub fn finished(&mut self, seed: u64) {
        let now = clock_gettime(ClockId::Monotonic);
        let now_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        self.entries.extend_from_slice(&seed.to_le_bytes());
        self.entries.extend_from_slice(&now_ns.to_le_bytes());
    }

    /// After each step. The page cache outlives the process, so a write is enough.
    pub fn write(&mut self, made: u64) {
        if let Err(error) = self.try_write(made) {
            tracing::warn!(%error, "the meter file cannot be written");
        }
    }

    fn try_write(&mut self, made: u64) -> std::io::Result<()> {
        if made != self.made {
            self.file.write_all_at(&made.to_le_bytes(), 0)?;
            self.made = made;
        }
        if !self.entries.is_empty() {
            self.file.write_all_at(&self.entries, self.end)?;
            self.end += self.entries.len() as u64;
            self.entries.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_the_count_and_one_entry_for_each_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meter");
        let mut meter = Meter::create(&path).unwrap();
        meter.write(5);
        meter.finished(7);
        meter.finished(8);
        meter.write(9);
        let bytes = std::fs::read(&path).unwrap();
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((bytes.len(), word(0), word(64), word(80)), (96, 9, 7, 8));
        assert!(word(72) > 0 && word(72) <= word(88));
    }
}
