//! The file beside a slot: the hash of each chunk that the slot holds. Written after the chunk's bytes
//! and cleared before they change, so a killed process leaves at worst too few entries; those of an
//! earlier life are hashed again before they count.

use std::sync::MutexGuard;

use super::*;

/// 32 bytes per chunk, by index; zeros where nothing is known.
pub(super) struct Record {
    file: File,
    state: Mutex<State>,
}

struct State {
    hashes: Vec<ChunkHash>,
    /// Read from disk: not yet compared with the bytes.
    inherited: bool,
}

// === impl Record ===

impl Record {
    pub(super) fn open(path: &Path) -> io::Result<Record> {
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut bytes = vec![0; file.metadata()?.len() as usize / 32 * 32];
        file.read_exact_at(&mut bytes, 0)?;
        let hashes: Vec<ChunkHash> =
            bytes.chunks_exact(32).map(|h| h.try_into().expect("chunks of 32")).collect();
        Ok(Record { file, state: Mutex::new(State { hashes, inherited: true }) })
    }

    /// Number of chunks of `manifest` that the slot holds already.
    pub(super) fn matching(&self, manifest: &Manifest) -> u32 {
        self.equal(manifest).count()
    }

    pub(super) fn equal(&self, manifest: &Manifest) -> ChunkSet {
        let mut set = ChunkSet::empty(manifest.chunk_count());
        let state = self.lock();
        for (index, want) in manifest.chunk_hashes.iter().enumerate() {
            if state.hashes.get(index) == Some(want) {
                set.insert(index as u32);
            }
        }
        set
    }

    /// Forgets all but what `manifest` has too, and returns that.
    pub(super) fn keep_matching(
        &self,
        manifest: &Manifest,
        map: &SharedMap,
    ) -> io::Result<ChunkSet> {
        let mut equal = self.equal(manifest);
        let mut state = self.lock();
        if state.inherited {
            for index in equal.clone().iter() {
                let range = manifest.chunk_range(index);
                let want = &manifest.chunk_hashes[index as usize];
                if !map.read(range, |bytes| blake3::hash(bytes).as_bytes() == want) {
                    equal.remove(index);
                }
            }
            state.inherited = false;
        }
        let kept = |(index, hash): (usize, &ChunkHash)| {
            if equal.contains(index as u32) { *hash } else { UNKNOWN }
        };
        state.hashes = manifest.chunk_hashes.iter().enumerate().map(kept).collect();
        let bytes: Vec<u8> = state.hashes.iter().flatten().copied().collect();
        self.file.write_all_at(&bytes, 0)?;
        self.file.set_len(bytes.len() as u64)?;
        Ok(equal)
    }

    pub(super) fn set(&self, index: u32, hash: &ChunkHash) -> io::Result<()> {
        let mut state = self.lock();
        self.file.write_all_at(hash, u64::from(index) * 32)?;
        state.hashes[index as usize] = *hash;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the record's lock panics")
    }
}
