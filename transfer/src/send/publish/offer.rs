//! The deltas that a version is offered with: to the version before, and by the chain of those before it
//! to older ones. Owns the memory of the chains; what a delta is, is `delta`'s.

use std::sync::{Arc, Mutex, MutexGuard};

use anabranch_proto::manifest::Manifest;
use anabranch_proto::version::{Root, Version};

use super::PublisherConfig;
use crate::delta::chain::{self, MAX_LINKS};
use crate::delta::encode::{Encoder, Output};
use crate::delta::memory::{DeltaMemory, DeltaWriter, blobs, room, trim};
use crate::image::blob::Blob;
use crate::memory::map::SharedMap;
use crate::send::arena::Arena;
use crate::send::holder::Held;

/// After so many bytes it is clear whether a version is worth a delta.
const DELTA_TRIAL_BYTES: u64 = 8 << 20;
/// Bytes that a trial may write, with the blocks that threads had in work at its end.
const PREPARED_BYTES: u64 = 10 << 20;

/// The anchor: a receiver so far behind that its chain would cost more than one part in so many of the
/// image gets the version in full. This also bounds the memory of the chains, of which there are two.
const CHAIN_SHARE: u64 = 16;

#[derive(Default)]
pub(super) struct Offers {
    memory: DeltaMemory,
    /// One delta at a time: the one before is given up when its version loses its slot.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    encoder: Encoder,
    last: Option<Chained>,
}

/// The chain that leads to the last version that has a delta.
struct Chained {
    to: Version,
    map: Arc<SharedMap>,
    /// (base, where its chain ends), the newest base first: all begin at 0.
    links: Vec<(Root, u64)>,
}

/// A version and the one before.
struct Step<'a> {
    arena: &'a Arena,
    config: &'a PublisherConfig,
    base: Version,
    version: Version,
    manifest: &'a Manifest,
}

// === impl Offers ===

impl Offers {
    /// Gets the memory that deltas of such versions are coded in, before one is.
    pub(super) fn prepare(&self, config: &PublisherConfig, manifest: &Manifest) {
        if let Err(error) = self.memory.prepare(room(manifest.image_bytes), PREPARED_BYTES) {
            tracing::info!(%error, "no memory for deltas yet");
        }
        self.lock().encoder.prepare(manifest, config.hash_threads);
    }

    /// Lends the differences to the versions before as well, if the one before is in memory still and the
    /// difference to it is worth its bytes; tells these.
    pub(super) fn offer(
        &self,
        arena: &Arena,
        config: &PublisherConfig,
        base: Version,
        held: &Held,
        manifest: &Manifest,
    ) -> Option<u64> {
        let version = held.version();
        let step = Step { arena, config, base, version, manifest };
        match self.lock().chain(&self.memory, &step) {
            Ok(deltas) => {
                let bytes = deltas.first().map(|(_, blob)| blob.manifest.image_bytes);
                held.set_deltas(deltas);
                bytes
            }
            Err(error) => {
                tracing::warn!(%version, %error, "no memory for the delta; the version goes out in full");
                None
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while a delta is coded")
    }
}

// === impl State ===

impl State {
    /// The new delta in front of the last chain, as far as that is worth it. Nothing if there is none.
    fn chain(
        &mut self,
        memory: &DeltaMemory,
        step: &Step<'_>,
    ) -> std::io::Result<Vec<(Root, Blob)>> {
        let newer =
            |l: &Chained| (l.to.epoch, l.to.number) > (step.version.epoch, step.version.number);
        if self.last.as_ref().is_some_and(newer) {
            return Ok(Vec::new());
        }
        let (map, stamp) = memory.take(room(step.manifest.image_bytes))?;
        let coded = step.encode(&mut self.encoder, &map);
        let Ok(Some(len)) = coded else {
            trim(&map, 0);
            return coded.map(|_| Vec::new());
        };
        let mut writer = DeltaWriter::new(&map, 0);
        writer.put(0, &chain::head(step.base.root, len))?;
        let first = chain::HEAD_BYTES + len;
        let mut links = vec![(step.base.root, first)];
        if let Some(before) = self.last.take().filter(|l| l.to.root == step.base.root) {
            let kept = before.links.iter().take(MAX_LINKS - 1);
            let bound = step.manifest.image_bytes / CHAIN_SHARE;
            let kept = kept.take_while(|(_, end)| first + end <= bound);
            links.extend(kept.map(|(base, end)| (*base, first + end)));
            let total = links.last().map_or(first, |(_, end)| *end);
            before.map.read(0..total - first, |from| writer.put(first, from))?;
        }
        trim(&map, links.last().map_or(first, |(_, end)| *end));
        let blobs = blobs(&map, &stamp, &links, step.config.chunk_bytes, step.version.root);
        self.last = Some(Chained { to: step.version, map, links });
        Ok(blobs)
    }
}

// === impl Step ===

impl Step<'_> {
    /// Into `map`, behind the room for the head of a chain.
    fn encode(&self, encoder: &mut Encoder, map: &SharedMap) -> std::io::Result<Option<u64>> {
        let sealed = |version: Version| self.arena.sealed(version.root);
        let Some(((old, old_stamp), (new, new_stamp))) =
            sealed(self.base).zip(sealed(self.version))
        else {
            return Ok(None);
        };
        // A newer publish may take either slot meanwhile; what was coded from it is thrown away.
        let valid = || old_stamp.is_valid() && new_stamp.is_valid();
        let worth = |raw, coded| valid() && (raw < DELTA_TRIAL_BYTES || coded < raw / 4 * 3);
        let (image, threads) = (0..self.manifest.image_bytes, self.config.hash_threads);
        let mut writer = DeltaWriter::new(map, chain::HEAD_BYTES);
        let len = old.read(image.clone(), |old| {
            new.read(image, |new| {
                encoder.encode(self.manifest, [old, new], threads, &worth, &mut writer)
            })
        })?;
        Ok(len.filter(|len| valid() && *len < self.manifest.image_bytes))
    }
}
