//! A small file that counts what this engine made and outlives a kill: bench and chaos runs read which tokens were lost
//! with an engine, and when tokens were on their way. Owns the file and its format.
//!
//! Bytes 0..8: tokens made for streams so far (u64 LE). From byte 64: entries of three u64 LE: a stream's seed, the
//! number of its tokens with the chunk that is ready (highest bit: the last one), the monotonic time in nanoseconds.
//! There is one for each stream that ended by itself, and one for each chunk of every sixteenth stream.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};

const ENTRIES_AT: u64 = 64;
const LAST: u64 = 1 << 63;
/// Divisor of the seeds of streams all of whose chunks are noted.
const SAMPLED: u64 = 16;

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

    /// Notes that a stream's chunk is ready to be sent. A client that lags makes one chunk ready more than once.
    pub fn ready(&mut self, seed: u64, tokens: u64, last: bool) {
        if !last && !seed.is_multiple_of(SAMPLED) {
            return;
        }
        let now = clock_gettime(ClockId::Monotonic);
        let now_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        for word in [seed, if last { tokens | LAST } else { tokens }, now_ns] {
            self.entries.extend_from_slice(&word.to_le_bytes());
        }
    }

    /// Writes the count and the new entries; called after each step. The page cache outlives the process, so a write is
    /// enough.
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
    fn the_file_holds_the_count_every_end_and_the_chunks_of_some_streams() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meter");
        let mut meter = Meter::create(&path).unwrap();
        meter.write(5);
        meter.ready(7, 3, false);
        meter.ready(7, 4, true);
        meter.ready(32, 8, false);
        meter.write(9);
        let bytes = std::fs::read(&path).unwrap();
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((bytes.len(), word(0)), (112, 9));
        assert_eq!((word(64), word(72)), (7, 4 | LAST));
        assert_eq!((word(88), word(96)), (32, 8));
        assert!(word(80) > 0 && word(80) <= word(104));
    }
}
