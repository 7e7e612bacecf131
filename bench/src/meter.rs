//! Reads what an embedded engine told of itself (`anabranch engine --meter FILE`): tokens made, and when chunks of
//! them were ready. The file outlives the engine's death; its format is the engine's.

use std::path::PathBuf;

use anyhow::Context;
use rustix::time::{ClockId, clock_gettime};

const ENTRIES_AT: usize = 64;
const ENTRY_BYTES: usize = 24;
const LAST: u64 = 1 << 63;

/// The counter file of one life of an engine.
#[derive(Clone, Debug)]
pub struct Meter {
    path: PathBuf,
}

/// A chunk that an engine had ready. The last chunk of every answer is noted, and all chunks of some answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Seed of the sample.
    pub seed: u64,
    /// Tokens of the stream, up to and with this chunk.
    pub tokens: u64,
    /// True if the chunk is the stream's last.
    pub last: bool,
    /// Time at which the chunk was ready, in monotonic nanoseconds.
    pub at_ns: u64,
}

/// Time in nanoseconds on the clock that all processes of this machine share.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Meter {
    /// The file at `path`, which need not exist yet.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Tokens made for streams; zero if the engine died before it could open the file.
    pub fn made(&self) -> anyhow::Result<u64> {
        Ok(self.bytes()?.get(..8).map_or(0, word))
    }

    /// The chunks that are noted, in their order.
    pub fn chunks(&self) -> anyhow::Result<Vec<Ready>> {
        let bytes = self.bytes()?;
        let entries = bytes.get(ENTRIES_AT..).unwrap_or_default().chunks_exact(ENTRY_BYTES);
        Ok(entries.map(Ready::new).collect())
    }

    fn bytes(&self) -> anyhow::Result<Vec<u8>> {
        match std::fs::read(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            read => read.with_context(|| format!("reading the meter {}", self.path.display())),
        }
    }
}

impl Ready {
    fn new(entry: &[u8]) -> Self {
        let (seed, tokens, at_ns) = (word(&entry[..8]), word(&entry[8..16]), word(&entry[16..24]));
        Self { seed, tokens: tokens & !LAST, last: tokens & LAST != 0, at_ns }
    }
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_chunks_are_read_and_a_missing_file_is_no_token() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        assert_eq!(Meter::at(path.clone()).made().unwrap(), 0);
        let mut bytes = vec![0u8; 64];
        bytes[0] = 9;
        for word in [7u64, 4 | LAST, 100, 8, 16, 200] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        std::fs::write(&path, bytes).unwrap();
        let meter = Meter::at(path);
        assert_eq!(meter.made().unwrap(), 9);
        let want = [
            Ready { seed: 7, tokens: 4, last: true, at_ns: 100 },
            Ready { seed: 8, tokens: 16, last: false, at_ns: 200 },
        ];
        assert_eq!(meter.chunks().unwrap(), want);
    }
}
