//! The part of an image that a sender has: whole chunks, and pieces of others. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

use anabranch_proto::manifest::chunk_range;

use super::overlap;
use crate::image::chunks::ChunkSet;
use crate::image::layout::Layout;

/// The ranges of the image that a part covers.
pub(super) struct Extent {
    /// Runs of its bytes, in order, that do not touch.
    runs: Vec<Range<u64>>,
    /// Length of the image's header, which every sender has.
    header_bytes: u64,
    chunk_bytes: u32,
    image_bytes: u64,
}

// === impl Extent ===

impl Extent {
    /// The extent of ranges that are in order and do not overlap.
    pub(super) fn new(layout: &Layout, ranges: &[Range<u64>], chunk_bytes: u32) -> Extent {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match runs.last_mut() {
                Some(run) if run.end == range.start => run.end = range.end,
                _ => runs.push(range.clone()),
            }
        }
        let (header_bytes, image_bytes) = (layout.header().len() as u64, layout.image_bytes());
        Extent { runs, header_bytes, chunk_bytes, image_bytes }
    }

    /// Chunks with bytes of the part, and how many of each this sender has.
    fn touched(&self) -> BTreeMap<u32, u64> {
        let mut touched = BTreeMap::new();
        for run in &self.runs {
            for index in self.chunks_of(run) {
                let part = overlap(run, &self.chunk(index));
                *touched.entry(index).or_insert(0) += part.end - part.start;
            }
        }
        for (index, bytes) in &mut touched {
            let chunk = self.chunk(*index);
            *bytes += self.header_bytes.clamp(chunk.start, chunk.end) - chunk.start;
        }
        touched
    }

    /// Chunks that lie in the part.
    pub(super) fn whole(&self) -> ChunkSet {
        let len = |index| self.chunk(index).end - self.chunk(index).start;
        self.set(self.touched().into_iter().filter(|(at, has)| *has == len(*at)).map(|(at, _)| at))
    }

    /// Chunks that this sender lends: those it has a piece of, and those that are only header.
    pub(super) fn held(&self) -> ChunkSet {
        let header_only = (self.header_bytes / u64::from(self.chunk_bytes)) as u32;
        self.set(self.touched().into_keys().chain(0..header_only))
    }

    /// Ranges for which the part needs memory.
    pub(super) fn memory(&self) -> Vec<Range<u64>> {
        let bytes = |run: &Range<u32>| self.chunk(run.start).start..self.chunk(run.end - 1).end;
        self.held().ranges().iter().map(bytes).collect()
    }

    /// The part's bytes in chunks that do not lie in it as a whole.
    pub(super) fn pieces(&self) -> Vec<Range<u64>> {
        let whole = self.whole();
        let of_run = |run: &Range<u64>| {
            let border = self.chunks_of(run).filter(|index| !whole.contains(*index));
            border.map(|index| overlap(run, &self.chunk(index))).collect::<Vec<_>>()
        };
        self.runs.iter().flat_map(of_run).collect()
    }

    fn set(&self, chunks: impl Iterator<Item = u32>) -> ChunkSet {
        let count = self.image_bytes.div_ceil(self.chunk_bytes.into()) as u32;
        let mut set = ChunkSet::empty(count);
        for index in chunks {
            set.insert(index);
        }
        set
    }

    fn chunks_of(&self, run: &Range<u64>) -> Range<u32> {
        let chunk_bytes = u64::from(self.chunk_bytes);
        (run.start / chunk_bytes) as u32..run.end.div_ceil(chunk_bytes) as u32
    }

    fn chunk(&self, index: u32) -> Range<u64> {
        chunk_range(self.chunk_bytes, self.image_bytes, index)
    }
}
