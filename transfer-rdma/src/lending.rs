//! Memory that a source lends over the fabric: each file mapped once, registered for as long as its memory
//! belongs to one version. Owns the endpoint that peers read from and the thread that serves it.
//!
//! ```text
//!   file:  unknown ── lend ──► Lent{key} ── memory changes hands ──► Mapped ── lend ──► Lent{another key}
//!          any ── nobody has the file any more ──► unknown
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anabranch_transfer::external::{Blob, LinkError, SharedMap, Stamp};

use crate::fabric::{self, Domain, Endpoint, Lender, Lent, ReadMap, Remote};

/// New connections wake nobody in some providers: they wait for so long.
const SERVE_TICK: Duration = Duration::from_millis(20);
/// Time until a key becomes void after its memory changed hands.
const SWEEP_EVERY: Duration = Duration::from_millis(100);

/// The endpoints of a listener, one per interface that receivers come in by.
#[derive(Debug, Default)]
pub(crate) struct Lendings {
    /// Endpoints by interface; as many as the host has interfaces.
    open: Mutex<BTreeMap<IpAddr, Arc<Lending>>>,
}

/// An endpoint that peers read from.
#[derive(Debug)]
pub(crate) struct Lending {
    shared: Arc<Shared>,
    address: Vec<u8>,
    probe: Lent,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    lender: Lender,
    closing: AtomicBool,
    /// Mapped files by device and inode. Bounded by the files that the holder lends: two slots and a delta each.
    files: Mutex<BTreeMap<(u64, u64), Mapped>>,
}

/// A file of the holder, mapped.
#[derive(Debug)]
struct Mapped {
    file: Weak<File>,
    len: u64,
    stamp: Stamp,
    /// While the memory belongs to the version that it was registered for.
    lent: Option<Lent>,
    map: Arc<ReadMap>,
}

/// Address by which receivers reach an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceAddress {
    pub(crate) format: u32,
    pub(crate) provider: String,
    pub(crate) bytes: Vec<u8>,
}

// === impl Lendings ===

impl Lendings {
    /// Fails if there is no libfabric, or if it has no provider for the interface.
    pub(crate) fn open(interface: Option<IpAddr>) -> Result<Lendings, LinkError> {
        fabric::load()?;
        let lendings = Lendings::default();
        if let Some(interface) = interface {
            lendings.at(interface)?;
        }
        Ok(lendings)
    }

    pub(crate) fn at(&self, interface: IpAddr) -> Result<Arc<Lending>, LinkError> {
        let mut open = self.open.lock().expect("no holder of the lock panics");
        if let Some(lending) = open.get(&interface) {
            return Ok(Arc::clone(lending));
        }
        let lending = Arc::new(Lending::open(interface)?);
        open.insert(interface, Arc::clone(&lending));
        Ok(lending)
    }
}

// === impl Lending ===

impl Lending {
    fn open(interface: IpAddr) -> Result<Lending, LinkError> {
        let domain = Domain::at(interface)?;
        let endpoint = Endpoint::open(&domain)?;
        let facts = domain.facts();
        let (format, provider) = (facts.address_format, facts.provider());
        let address = SourceAddress { format, provider, bytes: endpoint.address()? }.encode();
        let lender = endpoint.lender()?;
        let probe = probe(&lender, &address)?;
        let (closing, files) = (AtomicBool::new(false), Mutex::default());
        let shared = Arc::new(Shared { lender, closing, files });
        let serving = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("transfer-fabric".into())
            .spawn(move || serving.serve(endpoint))
            .map_err(LinkError::Broken)?;
        Ok(Lending { shared, address, probe, thread: Some(thread) })
    }

    /// Address and key with which a new peer reads the address once more, and the address.
    pub(crate) fn introduction(&self) -> (Remote, Vec<u8>) {
        (self.probe.remote(0), self.address.clone())
    }

    /// Address and key with which peers read the blob's file from `offset` on.
    pub(crate) fn lend(&self, blob: &Blob, offset: u64) -> Result<Remote, LinkError> {
        self.shared.lend(blob, offset)
    }
}

impl Drop for Lending {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// The address itself, as memory that proves that the fabric works.
fn probe(lender: &Lender, address: &[u8]) -> Result<Lent, LinkError> {
    let len = address.len() as u64;
    let memory = SharedMap::anonymous("anabranch-probe", len).map_err(LinkError::Broken)?;
    memory.write(0..len, |out| out.copy_from_slice(address));
    let map = ReadMap::of(memory.backing(), len).map_err(LinkError::Broken)?;
    Ok(lender.lend(&Arc::new(map))?)
}

// === impl Shared ===

impl Shared {
    /// The progress that some providers need to answer reads, and the end of keys that are void.
    fn serve(&self, mut endpoint: Endpoint) {
        let mut swept = Instant::now();
        while !self.closing.load(Ordering::Acquire) {
            if let Err(error) = endpoint.serve(SERVE_TICK) {
                // Of one peer's connection: the others are served on.
                tracing::debug!(%error, "a peer's reads failed");
            }
            if swept.elapsed() >= SWEEP_EVERY {
                swept = Instant::now();
                sweep(&mut self.lock());
            }
        }
    }

    fn lend(&self, blob: &Blob, offset: u64) -> Result<Remote, LinkError> {
        let opened = blob.file.get().ok_or(LinkError::Closed)?;
        let meta = opened.metadata().map_err(LinkError::Broken)?;
        let (at, len) = ((meta.dev(), meta.ino()), blob.manifest.image_bytes);
        let file = Arc::downgrade(&opened);
        let mut files = self.lock();
        // An inode's number is used again once nobody has the file.
        let known = files.get(&at).filter(|m| m.len == len && m.file.ptr_eq(&file));
        if let Some(lent) = known.filter(|m| m.stamp.is(&blob.stamp)).and_then(|m| m.lent.as_ref())
        {
            return Ok(lent.remote(offset));
        }
        let map = match known {
            Some(mapped) => Arc::clone(&mapped.map),
            None => Arc::new(ReadMap::of(&opened, len).map_err(LinkError::Broken)?),
        };
        // The key of the version before ends here, if the sweep has not found it yet.
        sweep(&mut files);
        let lent = self.lender.lend(&map)?;
        let remote = lent.remote(offset);
        let stamp = blob.stamp.clone();
        files.insert(at, Mapped { file, len, stamp, lent: Some(lent), map });
        Ok(remote)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(u64, u64), Mapped>> {
        self.files.lock().expect("no holder of the lock panics")
    }
}

fn sweep(files: &mut BTreeMap<(u64, u64), Mapped>) {
    files.retain(|_, mapped| mapped.file.strong_count() > 0);
    for mapped in files.values_mut().filter(|m| !m.stamp.is_valid()) {
        mapped.lent = None;
    }
}

// === impl SourceAddress ===

impl SourceAddress {
    /// format u32, length of the provider's name u8, the name, the address
    fn encode(&self) -> Vec<u8> {
        let mut out = self.format.to_le_bytes().to_vec();
        let name = &self.provider.as_bytes()[..self.provider.len().min(u8::MAX.into())];
        out.push(name.len() as u8);
        out.extend_from_slice(name);
        out.extend_from_slice(&self.bytes);
        out
    }

    pub(crate) fn decode(encoded: &[u8]) -> Option<SourceAddress> {
        let (format, rest) = encoded.split_first_chunk::<4>()?;
        let (len, rest) = rest.split_first()?;
        let (name, bytes) = rest.split_at_checked(usize::from(*len))?;
        let provider = String::from_utf8_lossy(name).into_owned();
        Some(SourceAddress { format: u32::from_le_bytes(*format), provider, bytes: bytes.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_address_comes_back_as_it_was_and_a_cut_one_does_not() {
        let provider = "tcp;ofi_rxm".to_owned();
        let address = SourceAddress { format: 2, provider, bytes: vec![2, 0, 9] };
        let encoded = address.encode();
        assert_eq!(SourceAddress::decode(&encoded), Some(address));
        assert_eq!(SourceAddress::decode(&encoded[..10]), None);
    }
}
