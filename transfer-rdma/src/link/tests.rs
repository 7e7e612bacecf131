//! Both ends of the link in this process. Without libfabric they say so and pass.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};

use anabranch_proto::manifest::{Kind, Manifest};

use anabranch_transfer::chunks::{ChunkSet, Ledger};
use anabranch_transfer::external::{Backing, Stamp};
use anabranch_transfer::wire::BlobId;

use super::*;

const CHUNK_BYTES: u32 = 1 << 20;
const CHUNKS: u32 = 4;
const BYTES: u64 = CHUNKS as u64 * CHUNK_BYTES as u64 - 999;
const PATIENCE: Duration = Duration::from_secs(20);

/// A version in memory that can change hands.
struct Memory {
    map: SharedMap,
    owner: Arc<AtomicU64>,
    blob: Blob,
}

struct Pair {
    receiver: ReadingLink,
    source: LendingLink,
}

fn memory(seed: u8) -> Memory {
    let map = SharedMap::anonymous("anabranch-test", BYTES).expect("memory");
    fill(&map, seed);
    let owner = Arc::default();
    let blob = blob(&map, &owner);
    Memory { map, owner, blob }
}

fn fill(map: &SharedMap, seed: u8) {
    map.write(0..BYTES, |bytes| {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = ((i * 31) >> 7) as u8 ^ seed;
        }
    });
}

fn blob(map: &SharedMap, owner: &Arc<AtomicU64>) -> Blob {
    let chunk_hashes = map.read(0..BYTES, |bytes| {
        bytes.chunks(CHUNK_BYTES as usize).map(|c| *blake3::hash(c).as_bytes()).collect()
    });
    let (kind, tensors) = (Kind::Full, Vec::new());
    let (chunk_bytes, image_bytes) = (CHUNK_BYTES, BYTES);
    let manifest = Arc::new(Manifest { kind, chunk_bytes, image_bytes, tensors, chunk_hashes });
    let encoded = manifest.encode().into();
    let ledger = Arc::new(Ledger::new(ChunkSet::full(CHUNKS)));
    let file = Backing::Own(Arc::clone(map.backing()));
    Blob { file, manifest, encoded, ledger, stamp: Stamp::of(owner) }
}

/// `None` where libfabric is missing or too old.
fn lendings() -> Option<Lendings> {
    let opened = Lendings::open(Some(Ipv4Addr::LOCALHOST.into()));
    opened.inspect_err(|why| drop(writeln!(io::stderr(), "skipped: {why}"))).ok()
}

/// A stream that was welcomed.
fn pair(lendings: &Lendings) -> Pair {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listening");
    let addr = listener.local_addr().expect("bound").into();
    let mut receiver = ReadingLink::connect(&addr, PATIENCE).expect("connected");
    let mut socket = listener.accept().expect("accepted").0;
    socket.read_exact(&mut [0; HELLO.len()]).expect("hello");
    let mut source = LendingLink::over(socket, lendings).expect("a lending end");
    for link in [&mut receiver as &mut dyn Link, &mut source] {
        link.set_patience(PATIENCE).expect("patience");
    }
    let welcome = Message::Welcome { complete: true, delta_complete: false, delta_bytes: 0 };
    source.send(&welcome).expect("sent");
    assert_eq!(receiver.receive().expect("the probe was read"), welcome);
    Pair { receiver, source }
}

impl Pair {
    fn announce(&mut self, blob: &Blob, index: u32) {
        let range = blob.manifest.chunk_range(index);
        let len = (range.end - range.start) as u32;
        let header = Message::Chunk { blob: BlobId::Image, index, len };
        self.source.send_blob(&header, blob, range).expect("announced");
    }

    fn take(&mut self, blob: &Blob, into: &SharedMap) -> Result<(u32, ChunkHash), LinkError> {
        let Message::Chunk { index, .. } = self.receiver.receive()? else { panic!("no chunk") };
        let hash = self.receiver.receive_chunk(into, blob.manifest.chunk_range(index))?;
        Ok((index, hash))
    }
}

#[test]
fn chunks_arrive_in_place_with_their_hashes_however_many_were_announced_ahead() {
    let Some(lendings) = lendings() else { return };
    let (memory, mut pair) = (memory(0), pair(&lendings));
    let into = SharedMap::anonymous("anabranch-test", BYTES).expect("memory");
    for index in [3, 0, 2, 1] {
        pair.announce(&memory.blob, index);
    }
    for expected in [3, 0, 2, 1] {
        let (index, hash) = pair.take(&memory.blob, &into).expect("read");
        assert_eq!((index, hash), (expected, memory.blob.manifest.chunk_hashes[index as usize]));
    }
    into.read(0..BYTES, |got| memory.map.read(0..BYTES, |sent| assert!(got == sent)));
    // What was taken is not what the source hears: its next message is the receiver's next request.
    let request = Message::Want { blob: BlobId::Image, first: 0, count: 1 };
    pair.receiver.send(&request).expect("sent");
    assert_eq!(pair.source.receive().expect("heard"), request);
    assert!(pair.receiver.is_idle() && pair.source.is_idle());
}

#[test]
fn a_key_is_void_soon_after_its_memory_changed_hands_and_the_next_version_has_another() {
    let Some(lendings) = lendings() else { return };
    let mut memory = memory(0);
    let into = SharedMap::anonymous("anabranch-test", BYTES).expect("memory");
    let mut late = pair(&lendings);
    late.announce(&memory.blob, 0);
    memory.owner.fetch_add(1, Ordering::AcqRel);
    fill(&memory.map, 0xff);
    let void = Instant::now() + PATIENCE;
    let Message::Chunk { index: 0, .. } = late.receiver.receive().expect("announced") else {
        panic!("no chunk")
    };
    let announced = late.receiver.next;
    let range = || memory.blob.manifest.chunk_range(0);
    // The sweep is a matter of a moment; until then a read finds torn bytes, whose hash is wrong.
    loop {
        late.receiver.next = announced;
        match late.receiver.receive_chunk(&into, range()) {
            Ok(hash) => assert_ne!(hash, memory.blob.manifest.chunk_hashes[0]),
            Err(LinkError::Fabric { .. }) => break,
            Err(other) => panic!("{other}"),
        }
        assert!(Instant::now() < void, "the key is still good");
    }
    memory.blob = blob(&memory.map, &memory.owner);
    let mut next = pair(&lendings);
    next.announce(&memory.blob, 0);
    let (_, hash) = next.take(&memory.blob, &into).expect("read");
    assert_eq!(hash, memory.blob.manifest.chunk_hashes[0]);
}

#[test]
fn a_source_that_hangs_up_or_falls_silent_ends_the_read_and_the_slot_is_written_no_more() {
    let Some(lendings) = lendings() else { return };
    let memory = memory(0);
    let into = SharedMap::anonymous("anabranch-test", BYTES).expect("memory");
    for silent in [false, true] {
        let mut pair = pair(&lendings);
        pair.announce(&memory.blob, 0);
        let Message::Chunk { .. } = pair.receiver.receive().expect("announced") else {
            panic!("no chunk")
        };
        // A place of which nothing comes: the source's endpoint is there, and answers nobody.
        let (index, from) = pair.receiver.next.expect("announced");
        let mute = Endpoint::open(pair.receiver.endpoint.domain()).expect("endpoint");
        let address = mute.address().expect("address");
        pair.receiver.source = Some(pair.receiver.endpoint.insert(&address).expect("peer"));
        pair.receiver.next = Some((index, from));
        pair.receiver.set_patience(Duration::from_millis(300)).expect("patience");
        let Pair { mut receiver, source } = pair;
        let _open = Some(source).filter(|_| silent);
        let ended = receiver.receive_chunk(&into, memory.blob.manifest.chunk_range(0));
        match ended {
            Err(LinkError::Stalled(_)) if silent => {}
            Err(LinkError::Closed) if !silent => {}
            other => panic!("silent {silent}: {other:?}"),
        }
        assert!(receiver.endpoint.insert(&address).is_err(), "closed");
    }
}

#[test]
fn a_receiver_that_leaves_chunks_unread_is_dropped_by_the_patience_for_bulk() {
    let Some(lendings) = lendings() else { return };
    let (memory, mut pair) = (memory(0), pair(&lendings));
    pair.source.set_patience(Duration::from_millis(200)).expect("patience");
    pair.announce(&memory.blob, 0);
    // As a server does between requests: the stream may idle for long, but not with unread chunks.
    pair.source.set_patience(PATIENCE).expect("patience");
    let started = Instant::now();
    let ended = pair.source.receive();
    assert!(matches!(ended, Err(LinkError::Stalled(_))), "{ended:?}");
    assert!(started.elapsed() < PATIENCE / 2);
}
