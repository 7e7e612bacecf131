//! A publisher with made-up weights, a fetcher on /dev/shm, and a proxy that breaks what passes.
#![allow(dead_code)]

pub mod udp;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::manifest::DType;
use anabranch_proto::version::Version;
use anabranch_transfer::{
    FetchRequest, FetchRules, Fetcher, Holder, Published, Publisher, PublisherConfig, SourceRef,
    StageError, Staging, TensorRef,
};
use tokio_util::sync::CancellationToken;

pub const KEY: [u8; 32] = [42; 32];
pub const JOB: &str = "math";

pub struct Weights {
    pub tensors: Vec<(String, DType, Vec<u64>, Vec<u8>)>,
}

impl Weights {
    /// `mib` MiB in tensors of odd sizes, the same for the same seed.
    pub fn new(mib: usize, seed: u64) -> Weights {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut bytes = |len: usize| {
            let mut out = Vec::with_capacity(len + 8);
            while out.len() < len {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                out.extend_from_slice(&state.rotate_right(23).to_le_bytes());
            }
            out.truncate(len);
            out
        };
        let mut tensors = vec![("bias".to_owned(), DType::U8, vec![13], bytes(13))];
        for layer in 0..mib {
            let rows = 512 * 1024 / 64;
            let data = bytes(rows * 64 * 2);
            let shape = vec![rows as u64, 64];
            tensors.push((format!("layers.{layer}.weight"), DType::BF16, shape, data));
        }
        tensors.push(("norm".to_owned(), DType::F32, vec![7], bytes(28)));
        Weights { tensors }
    }

    pub fn refs(&self) -> Vec<TensorRef<'_>> {
        let one = |(name, dtype, shape, data)| TensorRef { name, dtype, shape, data };
        self.tensors.iter().map(|(n, d, s, b)| one((n.as_str(), *d, &s[..], &b[..]))).collect()
    }
}

pub fn publisher() -> Publisher {
    publisher_with(|_| {})
}

pub fn publisher_with(change: impl FnOnce(&mut PublisherConfig)) -> Publisher {
    let mut config = PublisherConfig::loopback(JOB, 1);
    config.chunk_bytes = 256 << 10;
    config.limits.version_wait = Duration::from_millis(200);
    change(&mut config);
    let publisher = Publisher::start(config).expect("publisher");
    publisher.set_serve_key(KEY);
    publisher
}

pub fn publish(publisher: &Publisher, number: u64, weights: &Weights) -> Published {
    publisher.publish(number, &weights.refs()).expect("publish").wait().expect("sealed")
}

pub fn grant(version: Version, receiver: &str) -> Vec<u8> {
    static NONCE: AtomicU64 = AtomicU64::new(0);
    let nonce = NONCE.fetch_add(1, Ordering::Relaxed);
    let (job, receiver) = (JOB.to_owned(), receiver.to_owned());
    Grant { job, version, receiver, role: Role::Fetch, ttl_ms: 60_000, nonce }.mint(&KEY).to_vec()
}

pub fn source(holder: &str, addr: impl ToString, version: Version) -> SourceRef {
    let addr = addr.to_string().parse().expect("an address");
    let (addrs, grant) = (vec![addr], grant(version, "engine-1"));
    let (stripes, fallback_for) = (Vec::new(), Vec::new());
    SourceRef { holder: holder.into(), addrs, grant, stripes, fallback_for, origin: String::new() }
}

pub fn from(publisher: &Publisher, version: Version) -> SourceRef {
    source("trainer", &publisher.addresses()[0], version)
}

pub fn request(version: Version, sources: Vec<SourceRef>) -> FetchRequest {
    FetchRequest {
        version,
        sources,
        streams: 4,
        stripe_count: 0,
        baseline: None,
        progress: None,
        cancel: CancellationToken::new(),
    }
}

pub struct Receiver {
    pub fetcher: Fetcher,
    pub holder: Holder,
    pub dir: Arc<tempfile::TempDir>,
}

pub fn receiver() -> Receiver {
    receiver_with(|_| {})
}

pub fn receiver_with(change: impl FnOnce(&mut FetchRules)) -> Receiver {
    let dir = tempfile::tempdir_in("/dev/shm").expect("shm");
    receiver_in(Arc::new(dir), change)
}

pub fn receiver_in(dir: Arc<tempfile::TempDir>, change: impl FnOnce(&mut FetchRules)) -> Receiver {
    let mut staging = Staging::open(dir.path(), "agent");
    while matches!(staging, Err(StageError::Locked { .. })) {
        // Threads of the receiver before it, in the same process, are on their way out.
        std::thread::yield_now();
        staging = Staging::open(dir.path(), "agent");
    }
    let staging = staging.expect("staging");
    let mut rules = FetchRules {
        connect: Duration::from_secs(2),
        progress: Duration::from_millis(700),
        slot_wait: Duration::from_millis(200),
        ..FetchRules::default()
    };
    change(&mut rules);
    let holder = Holder::new(JOB);
    holder.set_key(KEY);
    Receiver { fetcher: Fetcher::new(staging, holder.clone(), rules), holder, dir }
}

/// That the directory holds exactly these weights, as any safetensors reader sees them.
pub fn assert_holds(dir: &std::path::Path, weights: &Weights) {
    let bytes = std::fs::read(dir.join("model.safetensors")).expect("model file");
    let read = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    assert_eq!(read.len(), weights.tensors.len());
    for (name, _, _, data) in &weights.tensors {
        assert!(read.tensor(name).expect("present").data() == &data[..], "{name} differs");
    }
}

/// What the proxy does to the bytes that come from the source, counted over all streams.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    None,
    /// Flips one bit of the byte at each multiple of this.
    FlipEvery(u64),
    /// Passes nothing more after so many bytes, and keeps the streams open.
    StallAfter(u64),
    /// Closes every stream, old and new, after so many bytes.
    DieAfter(u64),
}

pub struct Proxy {
    pub addr: SocketAddr,
    pub passed: Arc<AtomicU64>,
}

impl Proxy {
    /// Threads end with the test's process.
    pub fn start(to: impl ToString, fault: Fault) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let addr = listener.local_addr().expect("addr");
        let passed = Arc::new(AtomicU64::new(0));
        let (to, count) = (to.to_string(), Arc::clone(&passed));
        std::thread::spawn(move || {
            for inbound in listener.incoming() {
                let Ok(inbound) = inbound else { return };
                let outbound = TcpStream::connect(&to).expect("source");
                let (mut up_in, mut up_out) =
                    (inbound.try_clone().expect("clone"), outbound.try_clone().expect("clone"));
                std::thread::spawn(move || {
                    std::io::copy(&mut up_in, &mut up_out).ok();
                    up_out.shutdown(Shutdown::Both).ok();
                });
                let count = Arc::clone(&count);
                std::thread::spawn(move || pass(outbound, inbound, fault, &count));
            }
        });
        Proxy { addr, passed }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, fault: Fault, count: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let before = count.fetch_add(n as u64, Ordering::SeqCst);
        match fault {
            Fault::FlipEvery(every) => {
                let next = (before / every + 1) * every;
                // Small frames are spared: the fault is for bulk.
                if n > 4096 && next < before + n as u64 {
                    buffer[(next - before) as usize] ^= 4;
                }
            }
            Fault::StallAfter(bytes) if before > bytes => {
                std::thread::park();
            }
            Fault::DieAfter(bytes) if before > bytes => break,
            _ => {}
        }
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    to.shutdown(Shutdown::Both).ok();
    from.shutdown(Shutdown::Both).ok();
}
