//! Versions that a trainer exported to a shared file system: a link without a peer. All of the file
//! system's work is done by a thread of its own, which reads a chunk ahead, since a read of a network file
//! system can hang for ever and no deadline ends it. Access control is the file system's.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use anabranch_proto::address::Address;
use anabranch_proto::grant::Grant;
use anabranch_proto::manifest::{ChunkHash, Kind, MAX_MANIFEST_BYTES, Manifest};
use anabranch_proto::version::{Root, Version};

use super::{Closer, Link, LinkError};
use crate::image::exported::{self, Name};
use crate::link::wire::{BlobId, FailCode, MAX_WANTED, Message};
use crate::memory::map::SharedMap;

/// Hashed while still in the cache, after it was copied.
const STRIDE: usize = 128 << 10;
/// Chunks read and not yet taken.
const AHEAD: usize = 2;

pub(crate) struct FileLink {
    dir: PathBuf,
    patience: Duration,
    closed: Arc<AtomicBool>,
    requests: SyncSender<Message>,
    answers: Receiver<Answer>,
    /// Wakes a thread that waits for an answer, for the closer.
    wake: SyncSender<Answer>,
    /// Bytes of the chunk whose header was taken.
    bulk: Option<Vec<u8>>,
    /// Buffers on their way back to the reader.
    spent: SyncSender<Vec<u8>>,
    /// Answers that are due.
    due: u32,
}

enum Answer {
    Message(Message),
    /// A chunk's header, with its bytes.
    Chunk(Message, Vec<u8>),
    Closed,
}

/// The other end, on its own thread.
struct Reader {
    dir: PathBuf,
    version: Option<Opened>,
    spare: Receiver<Vec<u8>>,
}

/// A version whose files are open: they stay readable when their names go.
struct Opened {
    version: Version,
    dir: PathBuf,
    image: Stored,
    delta: Option<Stored>,
}

struct Stored {
    path: PathBuf,
    file: File,
    encoded: Vec<u8>,
    manifest: Manifest,
}

type Refusal = (FailCode, String);

// === impl FileLink ===

impl FileLink {
    /// Starts the reader of `dir`, which is looked at only when a version is asked for.
    pub(crate) fn open(dir: &Path) -> Result<FileLink, LinkError> {
        let dir = dir.to_owned();
        let (requests, asked) = sync_channel(MAX_WANTED as usize);
        let (answering, answers) = sync_channel(AHEAD);
        let (spent, spare) = sync_channel(AHEAD + 1);
        let (wake, reader) = (answering.clone(), Reader { dir: dir.clone(), version: None, spare });
        std::thread::Builder::new()
            .name("transfer-file".into())
            .spawn(move || reader.run(&asked, &answering))
            .map_err(LinkError::Broken)?;
        let (patience, closed) = (Duration::MAX, Arc::default());
        Ok(FileLink { dir, patience, closed, requests, answers, wake, bulk: None, spent, due: 0 })
    }
}

impl Link for FileLink {
    fn peer(&self) -> String {
        Address::File(self.dir.clone()).to_string()
    }

    fn closer(&self) -> Result<Closer, LinkError> {
        let (closed, wake) = (Arc::clone(&self.closed), self.wake.clone());
        Ok(Box::new(move || {
            closed.store(true, Ordering::Release);
            // Where there is no room, nobody is waiting.
            wake.try_send(Answer::Closed).ok();
        }))
    }

    fn set_patience(&mut self, patience: Duration) -> Result<(), LinkError> {
        self.patience = patience;
        Ok(())
    }

    fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        let answers = if let Message::Want { count, .. } = message { *count } else { 1 };
        match self.requests.try_send(message.clone()) {
            Ok(()) => {
                self.due += answers;
                Ok(())
            }
            // The reader hangs, or ended.
            Err(TrySendError::Full(_)) => Err(LinkError::Stalled(self.patience)),
            Err(TrySendError::Disconnected(_)) => Err(LinkError::Closed),
        }
    }

    fn receive(&mut self) -> Result<Message, LinkError> {
        if self.closed.load(Ordering::Acquire) {
            return Err(LinkError::Closed);
        }
        // A wait of days is as good as for ever, and does not overflow the clock.
        let answer = self.answers.recv_timeout(self.patience.min(Duration::from_secs(1 << 20)));
        self.due = self.due.saturating_sub(1);
        match answer {
            Ok(Answer::Message(message)) => Ok(message),
            Ok(Answer::Chunk(header, bytes)) => {
                self.bulk = Some(bytes);
                Ok(header)
            }
            Ok(Answer::Closed) | Err(RecvTimeoutError::Disconnected) => Err(LinkError::Closed),
            Err(RecvTimeoutError::Timeout) => Err(LinkError::Stalled(self.patience)),
        }
    }

    fn receive_chunk(
        &mut self,
        map: &SharedMap,
        range: Range<u64>,
    ) -> Result<ChunkHash, LinkError> {
        let bytes = self.bulk.take().ok_or(LinkError::Closed)?;
        let hash = map.write(range, |to| {
            let mut hasher = blake3::Hasher::new();
            for (to, from) in to.chunks_mut(STRIDE).zip(bytes.chunks(STRIDE)) {
                to.copy_from_slice(from);
                hasher.update(to);
            }
            *hasher.finalize().as_bytes()
        });
        self.spent.try_send(bytes).ok();
        Ok(hash)
    }

    fn send_chunk(&mut self, _: &Message, _: &File, _: Range<u64>) -> Result<(), LinkError> {
        let why = "nothing can be sent to a directory";
        Err(LinkError::Broken(io::Error::new(io::ErrorKind::Unsupported, why)))
    }

    fn is_idle(&mut self) -> bool {
        self.due == 0 && self.bulk.is_none() && !self.closed.load(Ordering::Acquire)
    }
}

// === impl Reader ===

impl Reader {
    /// Answers requests until the link is dropped.
    fn run(mut self, requests: &Receiver<Message>, answers: &SyncSender<Answer>) {
        while let Ok(request) = requests.recv() {
            if self.answer(request, answers).is_err() {
                return;
            }
        }
    }

    /// An error: nobody takes answers any more.
    fn answer(&mut self, request: Message, answers: &SyncSender<Answer>) -> Result<(), ()> {
        let answer = match request {
            Message::Hi { base, grant, .. } => self.greet(base, &grant),
            Message::WantManifest { blob } => self.stored(blob).map(|stored| {
                Answer::Message(Message::Manifest { blob, bytes: stored.encoded.clone() })
            }),
            Message::Want { blob, first, count } => {
                for index in first..first.saturating_add(count) {
                    let chunk = self.chunk(blob, index).unwrap_or_else(fail);
                    answers.send(chunk).map_err(|_| ())?;
                }
                return Ok(());
            }
            Message::WatchHave { blob } => self.stored(blob).map(|stored| {
                let ranges = std::iter::once(0..stored.manifest.chunk_count()).collect();
                Answer::Message(Message::Have { ranges })
            }),
            other => Err((FailCode::Protocol, format!("{other:?} is not a request"))),
        };
        answers.send(answer.unwrap_or_else(fail)).map_err(|_| ())
    }

    fn greet(&mut self, base: Root, grant: &[u8]) -> Result<Answer, Refusal> {
        let granted = Grant::claims(grant)
            .ok_or_else(|| (FailCode::Grant, format!("not a grant: {} bytes", grant.len())))?;
        // The version before is let go first.
        self.version = None;
        let opened = Opened::open(&self.dir, granted.version, base)?;
        let delta_bytes = opened.delta.as_ref().map_or(0, |d| d.manifest.image_bytes);
        let (complete, delta_complete) = (true, opened.delta.is_some());
        self.version = Some(opened);
        Ok(Answer::Message(Message::Welcome { complete, delta_complete, delta_bytes }))
    }

    fn stored(&self, blob: BlobId) -> Result<&Stored, Refusal> {
        let opened = self.version.as_ref();
        let opened = opened.ok_or((FailCode::Protocol, "no Hi came before".to_owned()))?;
        match blob {
            BlobId::Image => Ok(&opened.image),
            BlobId::Delta => opened.delta.as_ref().ok_or_else(|| {
                let (version, dir) = (opened.version, opened.dir.display());
                let text = format!("no delta to {version} from the asked base in {dir}");
                (FailCode::UnknownVersion, text)
            }),
        }
    }

    fn chunk(&self, blob: BlobId, index: u32) -> Result<Answer, Refusal> {
        let Stored { path, file, manifest, .. } = self.stored(blob)?;
        if index >= manifest.chunk_count() {
            let text = format!("chunk {index} of {}", manifest.chunk_count());
            return Err((FailCode::Protocol, text));
        }
        let range = manifest.chunk_range(index);
        let len = range.end - range.start;
        let mut bytes = self.spare.try_recv().unwrap_or_default();
        bytes.resize(len as usize, 0);
        file.read_exact_at(&mut bytes, range.start).map_err(|error| gone(path, &error))?;
        Ok(Answer::Chunk(Message::Chunk { blob, index, len: len as u32 }, bytes))
    }
}

fn fail((code, text): Refusal) -> Answer {
    Answer::Message(Message::Fail { code, text })
}

/// Removed, cut, or out of reach: another try may find it whole, or say what is there.
fn gone(path: &Path, error: &io::Error) -> Refusal {
    (FailCode::NotHeld, format!("cannot read {}: {error}", path.display()))
}

// === impl Opened ===

impl Opened {
    fn open(dir: &Path, version: Version, base: Root) -> Result<Opened, Refusal> {
        // Listing asks the server of a network file system; a look-up may be answered by an old cache.
        let names = exported::list(dir).map_err(|error| {
            let text = format!("cannot read the exported versions in {}: {error}", dir.display());
            (FailCode::UnknownVersion, text)
        })?;
        let name = Name::of(version);
        if !names.contains(&name) {
            return Err((FailCode::UnknownVersion, absent(dir, name, names)));
        }
        let dir = dir.join(name.to_string());
        let image = Stored::open(&dir, BlobId::Image)?;
        let delta = match Stored::open(&dir, BlobId::Delta) {
            Ok(delta) => Some(delta).filter(
                |d| matches!(d.manifest.kind, Kind::Delta { base: from, .. } if from == base),
            ),
            Err(_) => None,
        };
        Ok(Opened { version, dir, image, delta })
    }
}

fn absent(dir: &Path, name: Name, mut there: Vec<Name>) -> String {
    there.sort();
    let there: Vec<String> = there.iter().map(Name::to_string).collect();
    let there = if there.is_empty() { "no version".to_owned() } else { there.join(", ") };
    format!("no {name} in {}: there is {there}", dir.display())
}

// === impl Stored ===

impl Stored {
    fn open(dir: &Path, blob: BlobId) -> Result<Stored, Refusal> {
        let (manifest_path, path) = exported::files(dir, blob);
        let encoded = read_bounded(&manifest_path).map_err(|e| gone(&manifest_path, &e))?;
        let manifest = Manifest::decode(&encoded).map_err(|error| {
            (FailCode::UnknownVersion, format!("{} is damaged: {error}", manifest_path.display()))
        })?;
        let file = File::open(&path).map_err(|e| gone(&path, &e))?;
        let have = file.metadata().map_err(|e| gone(&path, &e))?.len();
        let want = manifest.image_bytes;
        if have != want {
            let at = path.display();
            let text = format!("{at} is damaged: it has {have} bytes, its manifest says {want}");
            return Err((FailCode::UnknownVersion, text));
        }
        Ok(Stored { path, file, encoded, manifest })
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, MAX_MANIFEST_BYTES as u64), &mut bytes)?;
    Ok(bytes)
}
