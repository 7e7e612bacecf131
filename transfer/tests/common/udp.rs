//! A UDP path that loses what it shall lose.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Clone, Copy, Debug)]
pub enum UdpFault {
    /// One datagram in so many is lost, in either direction.
    DropEvery(u64),
    /// Nothing passes after so many bytes from the source.
    SilentAfter(u64),
}

pub struct UdpProxy {
    pub addr: SocketAddr,
    /// Bytes from the source.
    pub passed: Arc<AtomicU64>,
}

struct Path {
    fault: UdpFault,
    bytes: Arc<AtomicU64>,
    datagrams: AtomicU64,
}

impl UdpProxy {
    /// Threads end with the test's process.
    pub fn start(to: impl ToString, fault: UdpFault) -> UdpProxy {
        let front = UdpSocket::bind("127.0.0.1:0").expect("port");
        let (addr, to) = (front.local_addr().expect("addr"), to.to_string());
        let passed = Arc::new(AtomicU64::new(0));
        let bytes = Arc::clone(&passed);
        let path = Arc::new(Path { fault, bytes, datagrams: AtomicU64::new(0) });
        std::thread::spawn(move || {
            let mut upstreams: BTreeMap<SocketAddr, UdpSocket> = BTreeMap::new();
            let mut buffer = vec![0; 64 << 10];
            while let Ok((n, client)) = front.recv_from(&mut buffer) {
                let upstream = upstreams.entry(client).or_insert_with(|| {
                    let upstream = UdpSocket::bind("127.0.0.1:0").expect("port");
                    upstream.connect(&to).expect("source");
                    let back = upstream.try_clone().expect("clone");
                    let (front, path) = (front.try_clone().expect("clone"), Arc::clone(&path));
                    std::thread::spawn(move || answers(&back, &front, client, &path));
                    upstream
                });
                if path.passes(0) {
                    upstream.send(&buffer[..n]).ok();
                }
            }
        });
        UdpProxy { addr, passed }
    }
}

fn answers(back: &UdpSocket, front: &UdpSocket, client: SocketAddr, path: &Path) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        // A port that is closed for a moment is an error here, and no end.
        let Ok(n) = back.recv(&mut buffer) else { continue };
        if path.passes(n as u64) {
            front.send_to(&buffer[..n], client).ok();
        }
    }
}

impl Path {
    fn passes(&self, bytes: u64) -> bool {
        let before = self.bytes.load(Ordering::SeqCst);
        let datagram = self.datagrams.fetch_add(1, Ordering::SeqCst);
        let passes = match self.fault {
            UdpFault::DropEvery(every) => datagram % every != every - 1,
            UdpFault::SilentAfter(limit) => before < limit,
        };
        if passes {
            self.bytes.fetch_add(bytes, Ordering::SeqCst);
        }
        passes
    }
}
