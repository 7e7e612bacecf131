//! A version that is a safetensors directory as it stands: engines load that very directory, nothing is
//! copied and nobody serves it. Owns how such a directory gets its root, and the proof that it still holds
//! that version. The root is that of the same tensors in an image, so it does not matter how a version
//! travels.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anabranch_proto::manifest::{ChunkHash, DEFAULT_CHUNK_BYTES, Kind, Manifest};
use anabranch_proto::version::{Root, Version};
use tokio_util::sync::CancellationToken;

use crate::image::checkpoint::{Checkpoint, CheckpointError, StoredTensor};
use crate::image::layout::{Layout, LayoutError, TensorSpec};

/// File that the publisher leaves in the directory, if it may write there: a verifier finds with it where bytes differ.
const MANIFEST_FILE: &str = "anabranch.manifest";
/// Read, then hashed while it is still in the cache.
const STRIDE: u64 = 128 << 10;
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// A directory whose bytes were read and hashed.
pub struct DirectoryVersion {
    /// Layout and hashes of the tensors as an image.
    pub manifest: Arc<Manifest>,
    /// Root of the version that the directory holds.
    pub root: Root,
    /// The directory's files at the time of the reading.
    pub stamp: DirectoryStamp,
}

/// The files of a directory, by what tells that they were changed or replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryStamp {
    dir: PathBuf,
    files: Vec<FileStamp>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct FileStamp {
    path: PathBuf,
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

/// Options for reading a directory.
#[derive(Clone, Default)]
pub struct ReadOptions {
    /// 0: as many as there are cores, up to 4.
    pub threads: usize,
    /// Ends the reading with [`DirectoryError::Cancelled`].
    pub cancel: CancellationToken,
    /// Called with the bytes hashed so far, at most ten times a second, from any thread; must not block.
    pub progress: Option<Arc<dyn Fn(u64) + Send + Sync>>,
}

/// Why a directory is not the version that it should be.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The directory is no checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tensors make no image.
    #[error("{dir}: {error}")]
    Layout { dir: PathBuf, error: LayoutError },
    /// A chunk differs from the published one.
    #[error(
        "{dir} does not hold {version}: {what} differs from what was published (chunk {chunk}); it was \
         changed since. Write each version to a directory of its own"
    )]
    Chunk { dir: PathBuf, version: Version, chunk: u32, what: String },
    /// The tensors have another root.
    #[error(
        "{dir} does not hold {version}: its tensors have root {found}, published was {root}; it was changed \
         since, or it is another directory on this host", root = .version.root
    )]
    Root { dir: PathBuf, version: Version, found: Root },
    /// A file changed while it was used.
    #[error(
        "{path} changed while it was used; write each version to a directory of its own, and remove it \
         only when engines have left it"
    )]
    Changed { path: PathBuf },
    /// A file cannot be looked at.
    #[error("cannot look at {path}: {error}")]
    Look { path: PathBuf, error: io::Error },
    /// The reading was cancelled.
    #[error("reading {0} was cancelled")]
    Cancelled(PathBuf),
}

/// The tensors of a directory as one image, which is nowhere in memory.
struct Image {
    checkpoint: Checkpoint,
    layout: Layout,
    /// Index in `checkpoint.tensors()`, in the order of the layout.
    order: Vec<usize>,
}

// === reading ===

/// Hashes what the directory holds, and leaves the manifest there for those who verify it.
pub fn index_directory(
    dir: &Path,
    options: &ReadOptions,
) -> Result<DirectoryVersion, DirectoryError> {
    let (image, stamp) = open(dir)?;
    let manifest = image.hashed(DEFAULT_CHUNK_BYTES, None, options)?;
    stamp.check()?;
    let encoded = manifest.encode();
    let root = Root::of(&encoded);
    if let Err(error) = leave_manifest(dir, &encoded) {
        // Then a difference can be seen, but not placed.
        tracing::info!(dir = %dir.display(), %error, "no manifest is left in the directory");
    }
    Ok(DirectoryVersion { manifest: Arc::new(manifest), root, stamp })
}

/// Checks by every byte of the tensors that the directory holds exactly `version`.
pub fn verify_directory(
    dir: &Path,
    version: Version,
    options: &ReadOptions,
) -> Result<DirectoryVersion, DirectoryError> {
    let (image, stamp) = open(dir)?;
    let left = fs::read(dir.join(MANIFEST_FILE)).ok().filter(|b| Root::of(b) == version.root);
    let expected = left.and_then(|bytes| Manifest::decode(&bytes).ok());
    let expected = expected.filter(|m| m.tensors == image.layout.tensors());
    let chunk_bytes = expected.as_ref().map_or(DEFAULT_CHUNK_BYTES, |m| m.chunk_bytes);
    let manifest = image.hashed(chunk_bytes, expected.as_ref().map(|m| (version, m)), options)?;
    let root = manifest.root();
    if root != version.root {
        let dir = dir.to_owned();
        return Err(DirectoryError::Root { dir, version, found: root });
    }
    // What was read may have been removed, or replaced, under its name meanwhile.
    stamp.check()?;
    Ok(DirectoryVersion { manifest: Arc::new(manifest), root, stamp })
}

fn open(dir: &Path) -> Result<(Image, DirectoryStamp), DirectoryError> {
    // Before the headers are read: what changes from here on is seen.
    let stamp = DirectoryStamp::of(dir)?;
    Ok((Image::open(dir)?, stamp))
}

/// Writes the manifest, which gets its name only when it is complete.
fn leave_manifest(dir: &Path, encoded: &[u8]) -> io::Result<()> {
    let part = dir.join(format!(".{MANIFEST_FILE}.{}", std::process::id()));
    let left = fs::write(&part, encoded);
    left.and_then(|()| fs::rename(&part, dir.join(MANIFEST_FILE))).inspect_err(|_| {
        fs::remove_file(&part).ok();
    })
}

// === impl Image ===

impl Image {
    fn open(dir: &Path) -> Result<Image, DirectoryError> {
        let checkpoint = Checkpoint::open(dir)?;
        let tensors = checkpoint.tensors();
        let spec = |t: &StoredTensor| TensorSpec {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
        };
        let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
        let layout = Layout::new(&specs)
            .map_err(|error| DirectoryError::Layout { dir: dir.to_owned(), error })?;
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        order.sort_by_key(|&ix| layout.tensor(ix).offset);
        Ok(Image { checkpoint, layout, order })
    }

    /// The manifest of what is there. A chunk that differs from `expected` ends it.
    fn hashed(
        &self,
        chunk_bytes: u32,
        expected: Option<(Version, &Manifest)>,
        options: &ReadOptions,
    ) -> Result<Manifest, DirectoryError> {
        let image_bytes = self.layout.image_bytes();
        let count = image_bytes.div_ceil(chunk_bytes.into()) as usize;
        let mut manifest = Manifest {
            kind: Kind::Full,
            chunk_bytes,
            image_bytes,
            tensors: self.layout.tensors().to_vec(),
            chunk_hashes: vec![[0; 32]; count],
        };
        let hashes = Mutex::new(std::mem::take(&mut manifest.chunk_hashes));
        let pass = Pass {
            image: self,
            chunk_bytes,
            expected,
            options,
            hashes,
            next: AtomicU32::new(0),
            hashed_bytes: AtomicU64::new(0),
            told: Mutex::default(),
            failed: AtomicBool::new(false),
        };
        let cores = || std::thread::available_parallelism().map_or(1, usize::from).min(4);
        let threads = if options.threads == 0 { cores() } else { options.threads };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(|| pass.share())).collect();
            let mut outcome = pass.share();
            for other in others {
                outcome = outcome.and(other.join().expect("hashing does not panic"));
            }
            outcome
        })?;
        manifest.chunk_hashes = pass.hashes.into_inner().expect("hashing does not panic");
        Ok(manifest)
    }

    /// The bytes from `at` on, as far as `out` reaches.
    fn read(&self, mut at: u64, mut out: &mut [u8]) -> Result<(), DirectoryError> {
        let header = self.layout.header();
        if at < header.len() as u64 {
            let len = out.len().min(header.len() - at as usize);
            let (head, rest) = out.split_at_mut(len);
            head.copy_from_slice(&header[at as usize..at as usize + len]);
            (at, out) = (at + len as u64, rest);
        }
        let tensors = self.layout.tensors();
        let mut place = tensors.partition_point(|t| t.offset + t.len <= at);
        while !out.is_empty() {
            let tensor = &tensors[place];
            let from = at - tensor.offset;
            let (part, rest) = out.split_at_mut((out.len() as u64).min(tensor.len - from) as usize);
            let stored = &self.checkpoint.tensors()[self.order[place]];
            self.checkpoint.read_part(stored, from, part)?;
            (at, out) = (at + part.len() as u64, rest);
            place += 1;
        }
        Ok(())
    }

    /// Names of the tensors in a range of the image, for messages.
    fn names(&self, range: std::ops::Range<u64>) -> String {
        let inside = |t: &&anabranch_proto::manifest::Tensor| {
            t.offset < range.end && t.offset + t.len > range.start
        };
        let mut found = self.layout.tensors().iter().filter(inside);
        let first =
            found.next().map_or("the header".to_owned(), |t| format!("tensor `{}`", t.name));
        match found.count() {
            0 => first,
            more => format!("{first} or one of the {more} after it"),
        }
    }
}

/// One pass over an image, shared by its threads.
struct Pass<'a> {
    image: &'a Image,
    chunk_bytes: u32,
    expected: Option<(Version, &'a Manifest)>,
    options: &'a ReadOptions,
    hashes: Mutex<Vec<ChunkHash>>,
    next: AtomicU32,
    hashed_bytes: AtomicU64,
    told: Mutex<Option<Instant>>,
    failed: AtomicBool,
}

impl Pass<'_> {
    fn share(&self) -> Result<(), DirectoryError> {
        let mut buffer = vec![0; STRIDE as usize];
        let image_bytes = self.image.layout.image_bytes();
        let count = image_bytes.div_ceil(self.chunk_bytes.into()) as u32;
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= count || self.failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            if let Err(error) = self.chunk(index, &mut buffer) {
                self.failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
    }

    fn chunk(&self, index: u32, buffer: &mut [u8]) -> Result<(), DirectoryError> {
        let dir = || self.image.checkpoint.dir().to_owned();
        if self.options.cancel.is_cancelled() {
            return Err(DirectoryError::Cancelled(dir()));
        }
        let image_bytes = self.image.layout.image_bytes();
        let range = anabranch_proto::manifest::chunk_range(self.chunk_bytes, image_bytes, index);
        let (mut at, mut hasher) = (range.start, blake3::Hasher::new());
        while at < range.end {
            let stride = &mut buffer[..(range.end - at).min(STRIDE) as usize];
            self.image.read(at, stride)?;
            hasher.update(stride);
            at += stride.len() as u64;
        }
        let hash = *hasher.finalize().as_bytes();
        if let Some((version, manifest)) = self.expected
            && manifest.chunk_hashes.get(index as usize) != Some(&hash)
        {
            let what = self.image.names(range);
            return Err(DirectoryError::Chunk { dir: dir(), version, chunk: index, what });
        }
        self.hashes.lock().expect("hashing does not panic")[index as usize] = hash;
        let len = range.end - range.start;
        let hashed = self.hashed_bytes.fetch_add(len, Ordering::Relaxed) + len;
        self.tell(hashed);
        Ok(())
    }

    fn tell(&self, hashed: u64) {
        let Some(progress) = &self.options.progress else { return };
        let mut told = self.told.lock().expect("hashing does not panic");
        if told.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
            *told = Some(Instant::now());
            drop(told);
            progress(hashed);
        }
    }
}

// === impl DirectoryStamp ===

impl DirectoryStamp {
    fn of(dir: &Path) -> Result<DirectoryStamp, DirectoryError> {
        let failed = |error| DirectoryError::Look { path: dir.to_owned(), error };
        let mut files = Vec::new();
        for entry in fs::read_dir(dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                files.push(FileStamp::of(path)?);
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(DirectoryStamp { dir: dir.to_owned(), files })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `Ok` if the same files are there with the same times.
    pub fn check(&self) -> Result<(), DirectoryError> {
        let now = DirectoryStamp::of(&self.dir)?;
        if now == *self {
            return Ok(());
        }
        let same = |old: &FileStamp| now.files.iter().any(|new| new == old);
        let changed = self.files.iter().find(|old| !same(old)).map(|old| old.path.clone());
        Err(DirectoryError::Changed { path: changed.unwrap_or(now.dir) })
    }
}

impl FileStamp {
    fn of(path: PathBuf) -> Result<FileStamp, DirectoryError> {
        let meta = match fs::metadata(&path) {
            Ok(meta) => meta,
            Err(error) => return Err(DirectoryError::Look { path, error }),
        };
        Ok(FileStamp {
            path,
            device: meta.dev(),
            inode: meta.ino(),
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        })
    }
}

#[cfg(test)]
mod tests;
