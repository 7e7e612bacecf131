//! Coding of a whole image: several threads code blocks, which are written one behind the other. Owns the
//! memory that coding takes, for one delta after the other; where a delta goes is its caller's.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard};

use anabranch_proto::manifest::Manifest;

use super::block::Scratch;
use super::{BLOCK_BYTES, BlockSpec, CHANGES, MAGIC, RAW, blocks, cpu};

/// `keep_going(raw, coded)` is told before each block how many bytes became how many so far: false gives up.
pub(crate) type KeepGoing<'a> = &'a (dyn Fn(u64, u64) -> bool + Sync);

/// Sink of a delta's bytes. Later bytes may come before earlier ones.
pub(crate) trait Output: Send {
    fn put(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Codes deltas one after the other; what the first took in memory is enough for the others.
#[derive(Default)]
pub(crate) struct Encoder {
    workers: Vec<Worker>,
}

#[derive(Default)]
struct Worker {
    scratch: Scratch,
    coded: Vec<u8>,
}

/// The delta from `base` to `new`, both images with the tensors of `manifest`. `None` if it was given up.
pub fn encode(
    manifest: &Manifest,
    base: &[u8],
    new: &[u8],
    threads: usize,
    keep_going: &(dyn Fn(u64, u64) -> bool + Sync),
) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut encoder = Encoder::default();
    let written = encoder.encode(manifest, [base, new], threads, keep_going, &mut out);
    written.expect("it is written to memory").map(|_| out)
}

/// State that the threads share while they code one image.
struct Coding<'a> {
    blocks: &'a [BlockSpec],
    /// Old and new.
    images: [&'a [u8]; 2],
    keep_going: KeepGoing<'a>,
    state: Mutex<State<'a>>,
    moved: Condvar,
}

struct State<'a> {
    out: &'a mut dyn Output,
    /// Blocks that were given to threads, and blocks that are written.
    taken: usize,
    written: usize,
    /// Uncoded bytes of the blocks that are written.
    raw_bytes: u64,
    /// Offset of the next block.
    end: u64,
    over: Option<Over>,
}

enum Over {
    GivenUp,
    Failed(io::Error),
}

/// A block that a thread codes. Others wait for it to be written, so dropping it ends all.
struct Turn<'c, 'a> {
    coding: &'c Coding<'a>,
    at: usize,
}

// === impl Encoder ===

impl Encoder {
    /// Gets the memory before it is needed: each worker codes a block of `manifest`'s in which all changes.
    pub(crate) fn prepare(&mut self, manifest: &Manifest, threads: usize) {
        let elements = |b: &BlockSpec| b.range.len() / b.dtype.bytes();
        let Some(most) = blocks(manifest).into_iter().max_by_key(elements) else { return };
        let (old, new) = (vec![0x3C; most.range.len()], vec![0xC3; most.range.len()]);
        for Worker { scratch, coded } in self.workers(threads) {
            coded.reserve(2 * BLOCK_BYTES);
            cpu::encode(most.dtype, CHANGES, &old, &new, scratch, coded);
        }
    }

    /// Codes the delta between two images, the older first. Returns its length; `None` if it was given up.
    pub(crate) fn encode(
        &mut self,
        manifest: &Manifest,
        images: [&[u8]; 2],
        threads: usize,
        keep_going: KeepGoing<'_>,
        out: &mut dyn Output,
    ) -> io::Result<Option<u64>> {
        let blocks = blocks(manifest);
        let table = 8 + 4 * blocks.len() as u64;
        out.put(0, &MAGIC)?;
        out.put(4, &(blocks.len() as u32).to_le_bytes())?;
        let state = State { out, taken: 0, written: 0, raw_bytes: 0, end: table, over: None };
        let (state, moved) = (Mutex::new(state), Condvar::new());
        let coding = Coding { blocks: &blocks, images, keep_going, state, moved };
        std::thread::scope(|scope| {
            let (own, others) = self.workers(threads).split_first_mut().expect("there is one");
            let coding = &coding;
            for worker in others {
                scope.spawn(move || coding.run(worker));
            }
            coding.run(own);
        });
        let State { end, over, .. } = coding.state.into_inner().expect("nothing panics under it");
        match over {
            None => Ok(Some(end)),
            Some(Over::GivenUp) => Ok(None),
            Some(Over::Failed(error)) => Err(error),
        }
    }

    fn workers(&mut self, threads: usize) -> &mut [Worker] {
        self.workers.resize_with(threads.max(1), Worker::default);
        &mut self.workers
    }
}

// === impl Coding ===

impl<'a> Coding<'a> {
    fn run(&self, worker: &mut Worker) {
        let Worker { scratch, coded } = worker;
        while let Some(turn) = self.turn() {
            let BlockSpec { range, dtype } = &self.blocks[turn.at];
            let [old, new] = self.images.map(|image| &image[range.clone()]);
            let changed = cpu::encode(*dtype, CHANGES, old, new, scratch, coded);
            let parts: &[&[u8]] = match changed {
                false => &[],
                true if coded.len() <= new.len() => &[&*coded],
                true => &[&[RAW], new],
            };
            turn.write(new.len(), parts);
        }
    }

    /// The next block; `None` if there is none, or all was given up.
    fn turn(&self) -> Option<Turn<'_, 'a>> {
        let mut state = self.lock();
        if state.over.is_some() || state.taken == self.blocks.len() {
            return None;
        }
        if !(self.keep_going)(state.raw_bytes, state.end) {
            self.stop(state, Over::GivenUp);
            return None;
        }
        let at = state.taken;
        state.taken += 1;
        Some(Turn { coding: self, at })
    }

    fn stop(&self, mut state: MutexGuard<'_, State<'a>>, why: Over) {
        state.over.get_or_insert(why);
        self.moved.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().expect("nothing panics under it")
    }
}

// === impl Turn ===

impl Turn<'_, '_> {
    /// Behind the blocks before, which other threads may still be coding.
    fn write(self, raw_bytes: usize, parts: &[&[u8]]) {
        let Turn { coding, at } = self;
        let early = |state: &mut State<'_>| state.written < at && state.over.is_none();
        let state = coding.moved.wait_while(coding.lock(), early);
        let mut state = state.expect("nothing panics under it");
        if state.over.is_some() {
            return;
        }
        match state.append(at, parts) {
            Err(error) => coding.stop(state, Over::Failed(error)),
            Ok(()) => {
                state.written += 1;
                state.raw_bytes += raw_bytes as u64;
                coding.moved.notify_all();
            }
        }
    }
}

impl Drop for Turn<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.coding.stop(self.coding.lock(), Over::GivenUp);
        }
    }
}

// === impl State ===

impl State<'_> {
    fn append(&mut self, at: usize, parts: &[&[u8]]) -> io::Result<()> {
        let len = parts.iter().map(|part| part.len()).sum::<usize>() as u32;
        self.out.put(8 + 4 * at as u64, &len.to_le_bytes())?;
        for part in parts {
            self.out.put(self.end, part)?;
            self.end += part.len() as u64;
        }
        Ok(())
    }
}

impl Output for Vec<u8> {
    fn put(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let range = at as usize..at as usize + bytes.len();
        if self.len() < range.end {
            self.resize(range.end, 0);
        }
        self[range].copy_from_slice(bytes);
        Ok(())
    }
}
