//! The deltas that a version is offered with: to the version before, and by the chain of those before it
//! to older ones. Owns the memory of the chains; what a delta is, is `delta`'s.

use std::sync::{Arc, Mutex};

use anabranch_proto::manifest::Manifest;
use anabranch_proto::version::{Root, Version};

use super::PublisherConfig;
use crate::arena::Arena;
use crate::delta;
use crate::delta::chain::{self, MAX_LINKS};
use crate::delta::memory::{DeltaMemory, blobs};
use crate::holder::{Blob, Held};
use crate::shm::SharedMap;

/// After so many bytes it is clear whether a version is worth a delta.
const DELTA_TRIAL_BYTES: u64 = 8 << 20;

/// The anchor: a receiver so far behind that its chain would cost more than one part in so many of the
/// image gets the version in full. This also bounds the memory of the chains.
const CHAIN_SHARE: u64 = 4;

#[derive(Default)]
pub(super) struct Offers {
    memory: DeltaMemory,
    last: Mutex<Option<Chained>>,
}

/// The chain that leads to the last version that has a delta.
struct Chained {
    to: Version,
    map: Arc<SharedMap>,
    /// (base, where its chain ends), the newest base first: all begin at 0.
    links: Vec<(Root, u64)>,
}

// === impl Offers ===

impl Offers {
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
        let coded = encode(arena, config, base, version, manifest)?;
        match self.chain(config, base, version, &coded, manifest.image_bytes) {
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

    /// The new delta in front of the last chain, as far as that is worth it.
    fn chain(
        &self,
        config: &PublisherConfig,
        base: Version,
        version: Version,
        coded: &[u8],
        image_bytes: u64,
    ) -> std::io::Result<Vec<(Root, Blob)>> {
        let mut last = self.last.lock().expect("nothing panics while a chain is made");
        if last
            .as_ref()
            .is_some_and(|l| (l.to.epoch, l.to.number) > (version.epoch, version.number))
        {
            return Ok(Vec::new());
        }
        let first = chain::HEAD_BYTES + coded.len() as u64;
        let before = last.take().filter(|l| l.to.root == base.root);
        let older = before.as_ref().map_or(&[][..], |l| &l.links);
        let kept = older.iter().take(MAX_LINKS - 1);
        let kept = kept.take_while(|(_, end)| first + end <= image_bytes / CHAIN_SHARE);
        let mut links = vec![(base.root, first)];
        links.extend(kept.map(|(base, end)| (*base, first + end)));
        let total = links.last().map_or(first, |(_, end)| *end);
        let (map, stamp) = self.memory.take(total)?;
        map.write(0..first, |out| {
            let (head, delta) = out.split_at_mut(chain::HEAD_BYTES as usize);
            head.copy_from_slice(&chain::head(base.root, coded.len() as u64));
            delta.copy_from_slice(coded);
        });
        if let Some(before) = &before {
            before.map.read(0..total - first, |from| {
                map.write(first..total, |out| out.copy_from_slice(from));
            });
        }
        let blobs = blobs(&map, &stamp, &links, config.chunk_bytes, version.root);
        *last = Some(Chained { to: version, map, links });
        Ok(blobs)
    }
}

fn encode(
    arena: &Arena,
    config: &PublisherConfig,
    base: Version,
    version: Version,
    manifest: &Manifest,
) -> Option<Vec<u8>> {
    let (old, old_stamp) = arena.sealed(base.root)?;
    let (new, new_stamp) = arena.sealed(version.root)?;
    // A newer publish may take either slot meanwhile; what was coded from it is thrown away.
    let valid = || old_stamp.is_valid() && new_stamp.is_valid();
    let worth = |raw, coded| valid() && (raw < DELTA_TRIAL_BYTES || coded < raw / 4 * 3);
    let image = 0..manifest.image_bytes;
    let coded = old.read(image.clone(), |old| {
        new.read(image, |new| delta::encode(manifest, old, new, config.hash_threads, &worth))
    });
    coded.filter(|c| valid() && (c.len() as u64) < manifest.image_bytes)
}
