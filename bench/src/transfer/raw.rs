//! The baseline of the transfer engine: `sendfile` into a socket, `recv` into shared memory that was touched before, in
//! equal slices, nothing framed and nothing verified. Owns its memory, its listener and its threads.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;
use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, memfd_create, sendfile};

use super::order::RawFetched;
use super::usage;

/// Bytes that are sent over and over: more than any cache, less than the arena.
const SOURCE_BYTES: u64 = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves slices from a thread of its own until the process ends.
pub fn serve(ip: IpAddr, bytes: u64) -> anyhow::Result<SocketAddr> {
    let source = memory("bench-raw-source", SOURCE_BYTES.min(bytes))?.0;
    let listener = TcpListener::bind((ip, 0)).context("listening for the raw transfer")?;
    let addr = listener.local_addr()?;
    std::thread::Builder::new().name("raw-accept".into()).spawn(move || {
        std::thread::scope(|scope| {
            // As many at once as the one receiver opens.
            for stream in listener.incoming().flatten() {
                scope.spawn(|| send(stream, &source));
            }
        });
    })?;
    Ok(addr)
}

/// The arena of the receiver, kept from one round to the next.
#[derive(Default)]
pub struct Receiver {
    arena: Mutex<Option<MmapMut>>,
}

impl Receiver {
    /// Receives so many bytes over `streams` connections.
    pub fn fetch(&self, addr: &str, bytes: u64, streams: usize) -> anyhow::Result<RawFetched> {
        let mut arena = self.arena.lock().expect("nothing panics under it");
        if arena.as_ref().is_none_or(|a| a.len() as u64 != bytes) {
            *arena = Some(memory("bench-raw-arena", bytes)?.1);
        }
        let arena = arena.as_mut().expect("just made");
        let (started, cpu) = (Instant::now(), usage::cpu_ns());
        let slice = arena.len().div_ceil(streams.max(1));
        std::thread::scope(|scope| {
            let one = |part| scope.spawn(move || receive(addr, part));
            let threads: Vec<_> = arena.chunks_mut(slice).map(one).collect();
            threads.into_iter().try_for_each(|t| t.join().expect("receiving does not panic"))
        })
        .with_context(|| format!("receiving from {addr}"))?;
        let took_ms = started.elapsed().as_secs_f64() * 1e3;
        Ok(RawFetched { took_ms, cpu_ns: usage::cpu_ns() - cpu })
    }

    /// CPU time, in nanoseconds, of hashing so many bytes of the arena on this thread.
    pub fn hash(&self, bytes: u64) -> anyhow::Result<u64> {
        let arena = self.arena.lock().expect("nothing panics under it");
        let arena = arena.as_ref().context("nothing was received yet")?;
        let cpu = usage::cpu_ns();
        let mut left = bytes;
        for chunk in arena.chunks(1 << 20).cycle() {
            std::hint::black_box(blake3::hash(chunk));
            left = left.saturating_sub(chunk.len() as u64);
            if left == 0 {
                break;
            }
        }
        Ok(usage::cpu_ns() - cpu)
    }
}

fn receive(addr: &str, part: &mut [u8]) -> io::Result<()> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&(part.len() as u64).to_le_bytes())?;
    stream.read_exact(part)
}

fn send(mut stream: TcpStream, source: &File) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut want = [0; 8];
    stream.read_exact(&mut want)?;
    let (mut left, size) = (u64::from_le_bytes(want), source.metadata()?.len());
    while left > 0 {
        let mut at = 0;
        while at < size.min(left) {
            let count = (size.min(left) - at) as usize;
            if sendfile(&stream, source, Some(&mut at), count)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        left -= at;
    }
    Ok(())
}

/// Makes shared memory with every page touched, as in the arenas of the transfer engine.
fn memory(name: &str, bytes: u64) -> anyhow::Result<(File, MmapMut)> {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.set_len(bytes)?;
    // SAFETY: the memory file was made here and is known to this process only, which never cuts it.
    let mut map = unsafe { MmapMut::map_mut(&file) }?;
    map.chunks_mut(4096)
        .zip(1u64..)
        .for_each(|(page, n)| page[..8].copy_from_slice(&n.to_le_bytes()));
    Ok((file, map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_transfer_moves_all_bytes_whatever_the_slices_are() {
        let addr = serve([127, 0, 0, 1].into(), 5 << 20).unwrap();
        let receiver = Receiver::default();
        receiver.fetch(&addr.to_string(), (5 << 20) + 12, 3).unwrap();
        let arena = receiver.arena.lock().unwrap();
        let first = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let slice = arena.as_ref().unwrap().len().div_ceil(3);
        assert!(arena.as_ref().unwrap().chunks(slice).all(|part| first(part) == 1));
        drop(arena);
        assert!(receiver.hash(1 << 20).unwrap() > 0);
    }
}
