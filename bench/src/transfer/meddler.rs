//! A source that lies: a proxy in front of an honest one that knows the data plane's frames and spoils some of them.
//! Owns its listener and connections, and counts what it did.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anabranch_transfer::wire::{HEADER_BYTES, Header, Message};
use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// One chunk in this many is spoiled.
const EVERY: u64 = 5;
/// Time for which a frame is held back for the next one to overtake it.
const HOLD: Duration = Duration::from_millis(300);
/// Pause before each chunk of a slow source.
const SLOW: Duration = Duration::from_millis(100);

/// Kind of the source's misbehaviour.
#[derive(Clone, Debug)]
pub enum Fault {
    /// One bit of a chunk's bytes is wrong.
    FlipBit,
    /// One bit of a chunk's header is wrong.
    FlipHeader,
    /// The stream ends inside a chunk.
    Truncate,
    /// The bytes of two chunks change places.
    SwapBytes,
    /// Two chunks come in the other order.
    SwapFrames,
    /// A chunk comes twice.
    Duplicate,
    /// Every chunk has the bytes of this older image.
    Stale(Arc<Vec<u8>>),
    /// Every chunk has the right size and wrong bytes.
    Rubbish,
    /// The manifest has one byte changed.
    Manifest,
    /// Nothing is spoiled, but chunks come late.
    Slow,
}

/// A lying source that listens.
pub struct Meddler {
    /// Address of the lying source.
    pub addr: String,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    source: String,
    fault: Fault,
    chunks: AtomicU64,
    injected: AtomicU64,
}

/// A frame as it was received.
struct Frame {
    message: Message,
    head: Vec<u8>,
    bulk: Vec<u8>,
}

// === impl Meddler ===

impl Meddler {
    /// Starts a proxy in front of `source`.
    pub async fn start(source: &str, fault: Fault) -> anyhow::Result<Meddler> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let addr = listener.local_addr()?.to_string();
        let (chunks, injected) = (AtomicU64::new(0), AtomicU64::new(0));
        let shared = Arc::new(Shared { source: source.to_owned(), fault, chunks, injected });
        let mut tasks = JoinSet::new();
        let accepting = Arc::clone(&shared);
        tasks.spawn(async move {
            // They end with the set, and that with the meddler.
            let mut streams = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let shared = Arc::clone(&accepting);
                streams.spawn(async move { shared.stream(client).await.unwrap_or(()) });
            }
        });
        Ok(Meddler { addr, shared, _tasks: tasks })
    }

    /// Number of faults so far.
    pub fn injected(&self) -> u64 {
        self.shared.injected.load(Ordering::Relaxed)
    }
}

impl Shared {
    async fn stream(&self, client: TcpStream) -> anyhow::Result<()> {
        let server = TcpStream::connect(&self.source).await?;
        let (mut from_client, to_client) = client.into_split();
        let (from_server, mut to_server) = server.into_split();
        tokio::select! {
            _ = copy(&mut from_client, &mut to_server) => Ok(()),
            ended = self.meddle(from_server, to_client) => ended,
        }
    }

    async fn meddle(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> anyhow::Result<()> {
        loop {
            let mut frame = read(&mut from).await?;
            let hit = match frame.message {
                Message::Chunk { .. } => {
                    let nth = self.chunks.fetch_add(1, Ordering::Relaxed);
                    let always =
                        matches!(self.fault, Fault::Stale(_) | Fault::Rubbish | Fault::Slow);
                    always || nth % EVERY == 1
                }
                Message::Manifest { .. } => matches!(self.fault, Fault::Manifest),
                _ => false,
            };
            if hit && !self.spoil(&mut frame, &mut from, &mut to).await? {
                return Ok(());
            }
            write(&mut to, &frame).await?;
        }
    }

    /// Spoils a frame, or not. False if the stream ends here.
    async fn spoil(
        &self,
        frame: &mut Frame,
        from: &mut OwnedReadHalf,
        to: &mut OwnedWriteHalf,
    ) -> anyhow::Result<bool> {
        let nth = self.chunks.load(Ordering::Relaxed) as usize;
        match &self.fault {
            Fault::FlipBit => {
                let at = nth * 7919 % frame.bulk.len();
                frame.bulk[at] ^= 1 << (nth % 8);
            }
            Fault::FlipHeader => frame.head[nth % HEADER_BYTES] ^= 1 << (nth % 8),
            Fault::Truncate => {
                frame.bulk.truncate(frame.bulk.len() / 2);
                self.injected.fetch_add(1, Ordering::Relaxed);
                write(to, frame).await?;
                return Ok(false);
            }
            Fault::Duplicate => write(to, frame).await?,
            Fault::SwapBytes | Fault::SwapFrames => {
                if tokio::time::timeout(HOLD, from.peek(&mut [0])).await.is_err() {
                    // It was asked for one chunk only: there is nothing to swap it with.
                    return Ok(true);
                }
                let mut next = read(from).await?;
                // The receiver may hang up at the first wrong frame, which ends this too.
                self.injected.fetch_add(1, Ordering::Relaxed);
                if matches!(self.fault, Fault::SwapBytes) && next.bulk.len() == frame.bulk.len() {
                    std::mem::swap(&mut next.bulk, &mut frame.bulk);
                    write(to, frame).await?;
                    *frame = next;
                } else {
                    write(to, &next).await?;
                }
                return Ok(true);
            }
            Fault::Stale(old) => {
                if let Message::Chunk { index, .. } = frame.message {
                    let at = (index as usize) << 20;
                    let end = (at + frame.bulk.len()).min(old.len());
                    frame.bulk[..end - at].copy_from_slice(&old[at..end]);
                }
            }
            Fault::Rubbish => frame.bulk.fill(0xa5),
            Fault::Manifest => {
                let at = frame.head.len() / 2;
                frame.head[at] ^= 1;
            }
            Fault::Slow => tokio::time::sleep(SLOW).await,
        }
        self.injected.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }
}

async fn read(from: &mut OwnedReadHalf) -> anyhow::Result<Frame> {
    let mut head = vec![0; HEADER_BYTES];
    from.read_exact(&mut head).await?;
    let header = Header::decode(head[..].try_into().context("a header's length")?)?;
    let mut body = vec![0; header.body_bytes()];
    from.read_exact(&mut body).await?;
    let message = header.finish(&body)?;
    head.extend_from_slice(&body);
    let mut bulk = Vec::new();
    if let Message::Chunk { len, .. } = message {
        bulk.resize(len as usize, 0);
        from.read_exact(&mut bulk).await?;
    }
    Ok(Frame { message, head, bulk })
}

async fn write(to: &mut OwnedWriteHalf, frame: &Frame) -> anyhow::Result<()> {
    to.write_all(&frame.head).await?;
    to.write_all(&frame.bulk).await?;
    Ok(())
}
