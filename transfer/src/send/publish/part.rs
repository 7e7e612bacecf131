//! Publishing a version from several senders: each has a part of its bytes, all know its layout. Each hashes
//! the chunks that lie in its part; what the senders tell each other (over the trainer's own collective, a
//! directory, anything) is one small [`PartInfo`] each, and from all of them everyone makes the same manifest.
//!
//! ```text
//!   publish_part ─► PublishingPart ── hashed ──► Part{info} ── seal(the infos of all) ──► Published
//!                                                └── dropped ──► its memory is free again
//! ```
//! A chunk that straddles a border is held by each sender that has a piece of it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anabranch_proto::manifest::{Tensor, chunk_range};
use tokio::sync::oneshot;

use super::{Last, PublishError, Published, Publisher, lock};
use crate::image::checkpoint::Checkpoint;
use crate::image::chunks::ChunkSet;
use crate::image::layout::{Layout, TensorSpec};
use crate::send::arena::{Begun, Sealer};

mod extent;
mod info;
mod join;

use extent::Extent;
pub use info::{PartInfo, PartInfoError};
pub use join::PartError;
use join::{check_here, join};

/// Bytes of a tensor in the trainer's memory: all of them, or a run of them (a shard along dimension 0).
#[derive(Clone, Copy, Debug)]
pub struct PieceRef<'a> {
    /// Name of the tensor.
    pub tensor: &'a str,
    /// Offset from the start of the tensor, in bytes.
    pub offset: u64,
    /// The bytes.
    pub data: &'a [u8],
}

/// One of several senders of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// Number of the sender, from 0.
    pub index: u32,
    /// Number of senders.
    pub count: u32,
}

/// A part that is in the arena; its hashes are still being made.
pub struct PublishingPart {
    /// Number of the version.
    pub number: u64,
    /// Bytes of the whole version.
    pub image_bytes: u64,
    /// Bytes of this part.
    pub bytes: u64,
    /// Time for which the trainer was kept: the copy.
    pub copied_in: Duration,
    hashed: oneshot::Receiver<Part>,
}

/// A part that waits for what the other senders have. Nothing else can be published here until it is
/// sealed or dropped.
pub struct Part {
    info: PartInfo,
    layout: Arc<Layout>,
    held: ChunkSet,
    epoch: u32,
    number: u64,
    sealer: Sealer,
    started: Instant,
    last: Arc<Mutex<Last>>,
}

// === impl Publisher ===

impl Publisher {
    /// Publishes what this sender has of the version whose tensors are `specs`, the same list in the same
    /// order at every sender. Blocks for the copy. It takes memory for its part only, goes out in full
    /// (without a delta), and is neither exported nor passed on as memory: it is no whole.
    pub fn publish_part(
        &self,
        number: u64,
        specs: &[TensorSpec],
        pieces: &[PieceRef<'_>],
    ) -> Result<PublishingPart, PublishError> {
        let layout = self.layout(number, specs.to_vec())?;
        let tensors = layout.tensors().iter();
        let by_name: BTreeMap<&str, &Tensor> = tensors.map(|t| (t.name.as_str(), t)).collect();
        let place = |piece: &PieceRef<'_>| {
            let (name, offset, len) = (piece.tensor, piece.offset, piece.data.len() as u64);
            let tensor = by_name.get(name).copied();
            let fits = tensor.filter(|t| offset.checked_add(len).is_some_and(|end| end <= t.len));
            let Some(tensor) = fits else {
                let (name, of) = (name.to_owned(), tensor.map_or(0, |t| t.len));
                return Err(PublishError::Piece { name, offset, len, of });
            };
            let at = tensor.offset + offset;
            Ok(at..at + len)
        };
        let mut placed = Vec::with_capacity(pieces.len());
        for piece in pieces.iter().filter(|piece| !piece.data.is_empty()) {
            placed.push((place(piece)?, piece.data));
        }
        placed.sort_by_key(|(range, _)| range.start);
        if let Some(twice) = placed.windows(2).find(|w| w[0].0.end > w[1].0.start) {
            let name = tensor_at(&layout, twice[1].0.start).to_owned();
            return Err(PublishError::Twice { name });
        }
        let ranges = placed.iter().map(|(range, _)| range.clone()).collect();
        self.write_part(number, layout, ranges, |at, out| {
            out.copy_from_slice(placed[at].1);
            Ok(())
        })
    }

    /// Publishes one sender's share of a safetensors directory: a run of whole tensors of about the same
    /// bytes as the others'.
    pub fn publish_directory_part(
        &self,
        number: u64,
        dir: &Path,
        sender: Sender,
    ) -> Result<PublishingPart, PublishError> {
        let failed = |error| PublishError::Checkpoint { number, error };
        let checkpoint = Checkpoint::open(dir).map_err(failed)?;
        let (stored, layout) = self.stored(number, &checkpoint)?;
        let header = layout.header().len() as u64;
        let data_bytes = u128::from(layout.image_bytes() - header);
        let is_mine = |t: &Tensor| {
            let middle = u128::from(t.offset - header) + u128::from(t.len) / 2;
            let share = middle * u128::from(sender.count) / data_bytes.max(1);
            t.len > 0 && share == u128::from(sender.index)
        };
        let tensors = layout.tensors().iter().zip(stored);
        let (ranges, mine): (Vec<Range<u64>>, Vec<_>) = tensors
            .filter(|(t, _)| is_mine(t))
            .map(|(t, stored)| (t.offset..t.offset + t.len, stored))
            .unzip();
        self.write_part(number, layout, ranges, |at, out| {
            checkpoint.read_into(mine[at], out).map_err(failed)
        })
    }

    /// `copy` fills each range, in order. They do not overlap.
    fn write_part(
        &self,
        number: u64,
        layout: Layout,
        ranges: Vec<Range<u64>>,
        mut copy: impl FnMut(usize, &mut [u8]) -> Result<(), PublishError>,
    ) -> Result<PublishingPart, PublishError> {
        if self.export.is_some() {
            return Err(PublishError::PartExport { number });
        }
        let _one = self.publishing.lock().expect("no publisher panics under its lock");
        self.check_newer(number)?;
        let started = Instant::now();
        let extent = Extent::new(&layout, &ranges, self.config.chunk_bytes);
        let memory = extent.memory();
        let Begun { writer, sealer, .. } = self.arena.begin(&layout, &memory)?;
        let (image_bytes, layout) = (layout.image_bytes(), Arc::new(layout));
        let hashed = self.start_hashing(sealer, number, &layout, extent, started)?;
        let with_header = memory.first().filter(|run| run.start == 0).map_or(0, |run| run.end);
        let header = &layout.header()[..layout.header().len().min(with_header as usize)];
        writer.fill(0..header.len() as u64, |out| out.copy_from_slice(header));
        for (at, range) in ranges.iter().enumerate() {
            writer.fill(range.clone(), |out| copy(at, out))?;
        }
        writer.finish();
        lock(&self.last).number = Some(number);
        let bytes = ranges.iter().map(|range| range.end - range.start).sum();
        let copied_in = started.elapsed();
        Ok(PublishingPart { number, image_bytes, bytes, copied_in, hashed })
    }

    /// The thread ends by itself: with the hashes, or when the writer gave up.
    fn start_hashing(
        &self,
        sealer: Sealer,
        number: u64,
        layout: &Arc<Layout>,
        extent: Extent,
        started: Instant,
    ) -> Result<oneshot::Receiver<Part>, PublishError> {
        let (done, hashed) = oneshot::channel();
        let (epoch, threads) = (self.config.epoch, self.config.hash_threads);
        let chunk_bytes = self.config.chunk_bytes;
        let (layout, last) = (Arc::clone(layout), Arc::clone(&self.last));
        let (arena, single) = (self.arena.clone(), self.config.single);
        let hash = move || {
            let whole = extent.whole();
            let Some(hashes) = sealer.hash(&whole, threads) else { return };
            if sealer.part(number).is_none() {
                return;
            }
            let hashes = whole.iter().zip(hashes).collect();
            let mut info = PartInfo::new((epoch, number), &layout, chunk_bytes, hashes);
            for range in extent.pieces() {
                info.add_piece(range.start, sealer.map().read(range, <[u8]>::to_vec));
            }
            let (held, image_bytes) = (extent.held(), layout.image_bytes());
            // Whoever gave up on the part has it dropped here.
            done.send(Part { info, layout, held, epoch, number, sealer, started, last }).ok();
            if !single {
                arena.prepare(image_bytes, &extent.memory());
            }
        };
        let builder = std::thread::Builder::new().name("transfer-part".into());
        builder.spawn(hash).map_err(PublishError::Thread)?;
        Ok(hashed)
    }
}

/// The name of the tensor that this byte of the image belongs to.
fn tensor_at(layout: &Layout, at: u64) -> &str {
    let after = layout.tensors().partition_point(|t| t.offset <= at);
    // Of several at one place all but the last are empty.
    layout.tensors().get(after.saturating_sub(1)).map_or("", |t| t.name.as_str())
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    a.start.max(b.start)..a.end.min(b.end)
}

// === impl PublishingPart ===

impl PublishingPart {
    /// Resolves when the part's hashes are made.
    pub async fn hashed(self) -> Result<Part, PublishError> {
        let number = self.number;
        self.hashed.await.map_err(|_| PublishError::Abandoned { number })
    }

    /// Like [`PublishingPart::hashed`], for a trainer without a runtime.
    pub fn wait(self) -> Result<Part, PublishError> {
        let number = self.number;
        self.hashed.blocking_recv().map_err(|_| PublishError::Abandoned { number })
    }
}

// === impl Part ===

impl Part {
    /// The message that the other senders need of this part.
    pub fn info(&self) -> &PartInfo {
        &self.info
    }

    /// Makes the version out of what all senders told, this one too, in the same order everywhere (errors
    /// number them from 1), and lends what is here of it.
    pub fn seal(self, parts: &[PartInfo]) -> Result<Published, PartError> {
        let Part { info, layout, held, epoch, number, sealer, started, last } = self;
        let joined = join(&layout, &info, parts)?;
        check_here(&layout, &info, parts, sealer.map())?;
        let bytes = layout.image_bytes();
        for (index, chunk) in joined.assembled.iter().filter(|(index, _)| held.contains(**index)) {
            let range = chunk_range(info.chunk_bytes(), bytes, *index);
            sealer.map().write(range, |out| out.copy_from_slice(chunk));
        }
        let held_chunks = held.count();
        let (held, manifest) = sealer.lend(epoch, number, &layout, joined.hashes, held);
        // What is here of it is no base for a delta.
        lock(&last).sealed = None;
        let (version, sealed_in) = (held.version(), started.elapsed());
        let chunks = manifest.chunk_count();
        tracing::info!(
            %version, root = %version.root, held_chunks, chunks, parts = parts.len(), ?sealed_in,
            "a part of a version sealed"
        );
        let (delta_bytes, copied_in, export) = (None, Duration::ZERO, None);
        Ok(Published { version, manifest, bytes, delta_bytes, copied_in, sealed_in, export, held })
    }
}
