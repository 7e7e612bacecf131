//! libfabric, safely: domains, endpoints, registered memory and reads. Owns all `unsafe` of the link and
//! the rules that make it sound; which memory is read, and how long one waits, is the caller's.
//!
//! Memory that a read fills belongs to the fabric until the read completed or the endpoint is closed:
//! [`Endpoint::read`] returns only then. Memory that peers may read is mapped as long as its region.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anabranch_transfer::external::{LendingMap, SharedMap};
use memmap2::{Advice, MmapOptions, MmapRaw};

mod domain;
mod raw;
mod reads;

pub(crate) use domain::Domain;
use raw::{Access, RawEndpoint, RawError, RawRegion};
use reads::Reads;

const MAX_ADDRESS_BYTES: usize = 256;

/// Reads memory of peers, or lends its own to them.
#[derive(Debug)]
pub(crate) struct Endpoint {
    domain: Arc<Domain>,
    /// Registered memory like the domain's, for providers that want regions by endpoint.
    locals: Vec<Local>,
    opened: Option<Arc<Opened>>,
}

#[derive(Debug)]
struct Opened {
    raw: NonNull<RawEndpoint>,
    domain: Arc<Domain>,
}

/// A peer that an endpoint knows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(u64);

/// Memory of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Remote {
    pub(crate) at: u64,
    pub(crate) key: u64,
}

/// Lends memory through an endpoint that another thread serves.
#[derive(Debug)]
pub(crate) struct Lender {
    domain: Arc<Domain>,
    opened: Arc<Opened>,
}

/// Registered memory; closed before its endpoint, and before its domain, which somebody holds.
#[derive(Debug)]
struct Region {
    raw: NonNull<RawRegion>,
    _endpoint: Option<Arc<Opened>>,
}

#[derive(Debug)]
struct Local {
    /// Address of the mapping; with its length and its file, if somebody has it, it names the mapping.
    at: usize,
    len: u64,
    file: Weak<File>,
    region: Arc<Region>,
}

/// A file mapped for peers to read.
#[derive(Debug)]
pub(crate) struct ReadMap {
    // In this order: what it was noted for ends before its address can be another's.
    _noted: LendingMap,
    map: MmapRaw,
}

/// A file that peers may read as long as this lives.
#[derive(Debug)]
pub(crate) struct Lent {
    // In this order: the region is closed, then the memory unmapped.
    region: Region,
    _map: Arc<ReadMap>,
    _domain: Arc<Domain>,
    /// Address of the first byte as peers name it.
    base: u64,
}

/// Progress of a read since the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pulse {
    Moved,
    Still,
    /// The watched socket was closed.
    HungUp,
}

/// An error of the fabric.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{provider}: {text}")]
pub(crate) struct FabricError {
    pub(crate) provider: String,
    pub(crate) code: i32,
    pub(crate) text: String,
}

/// Loads libfabric.
pub(crate) fn load() -> Result<(), FabricError> {
    let mut error = RawError::default();
    // SAFETY: only writes the error.
    match unsafe { raw::fabric_load(&mut error) } {
        0 => Ok(()),
        _ => Err(error.of("libfabric")),
    }
}

// === impl Endpoint ===

impl Endpoint {
    pub(crate) fn open(domain: &Arc<Domain>) -> Result<Endpoint, FabricError> {
        let (mut raw, mut error) = (null_mut(), RawError::default());
        // SAFETY: the domain is open; the places to write to live for the call.
        unsafe { raw::fabric_endpoint_open(domain.raw.as_ptr(), &mut raw, &mut error) };
        let raw = NonNull::new(raw).ok_or_else(|| domain.failed(&error))?;
        let opened = Some(Arc::new(Opened { raw, domain: Arc::clone(domain) }));
        Ok(Endpoint { domain: Arc::clone(domain), locals: Vec::new(), opened })
    }

    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    fn raw(&self) -> Result<*mut RawEndpoint, FabricError> {
        self.opened.as_ref().map(|o| o.raw.as_ptr()).ok_or_else(|| self.closed())
    }

    fn closed(&self) -> FabricError {
        let text = "the endpoint was closed after a failure".to_owned();
        FabricError { provider: self.domain.facts.provider(), code: 0, text }
    }

    /// The endpoint's address; only peers with the same address format can use it.
    pub(crate) fn address(&self) -> Result<Vec<u8>, FabricError> {
        let mut address = vec![0u8; MAX_ADDRESS_BYTES];
        let (mut len, mut error) = (address.len(), RawError::default());
        let (endpoint, at) = (self.raw()?, address.as_mut_ptr().cast());
        // SAFETY: an open endpoint, and room for `len` bytes.
        let code = unsafe { raw::fabric_endpoint_address(endpoint, at, &mut len, &mut error) };
        if code != 0 {
            return Err(self.domain.failed(&error));
        }
        address.truncate(len);
        Ok(address)
    }

    pub(crate) fn insert(&mut self, address: &[u8]) -> Result<Peer, FabricError> {
        let (mut peer, mut error) = (0, RawError::default());
        let (endpoint, at, len) = (self.raw()?, address.as_ptr().cast(), address.len());
        // SAFETY: an open endpoint that is ours alone (`&mut`); the C side checks the length.
        let code = unsafe { raw::fabric_endpoint_insert(endpoint, at, len, &mut peer, &mut error) };
        if code == 0 { Ok(Peer(peer)) } else { Err(self.domain.failed(&error)) }
    }

    /// A lender, which lends memory while another thread serves the endpoint.
    pub(crate) fn lender(&self) -> Result<Lender, FabricError> {
        let opened = self.opened.clone().ok_or_else(|| self.closed())?;
        Ok(Lender { domain: Arc::clone(&self.domain), opened })
    }

    /// Fills `into` with a peer's memory, in pieces that may come in any order. `step` is called again
    /// and again with what is complete from the front, and whether anything moved since; it says how long
    /// to sleep if nothing did, or ends the read. After an error the endpoint is closed. `watched` wakes
    /// it when it is closed.
    ///
    /// `into` lies in `map`, or in memory that no other read will use.
    pub(crate) fn read<E: From<FabricError>>(
        &mut self,
        (peer, from): (Peer, Remote),
        into: &mut [u8],
        map: Option<&SharedMap>,
        watched: BorrowedFd<'_>,
        mut step: impl FnMut(&[u8], Pulse) -> Result<Duration, E>,
    ) -> Result<(), E> {
        let local = self.local(into, map)?;
        // Dropped before `local`, and in a panic of `step` too: the fabric never writes to memory that
        // is ours again.
        let mut guard = CloseUnlessDone { endpoint: self, done: false };
        let mut reads =
            Reads::new(into, peer, from, local.as_deref(), guard.endpoint.domain.facts());
        let mut hung_up = false;
        loop {
            let moved = reads.advance(guard.endpoint)?;
            let pulse = match (moved, hung_up) {
                (true, _) => Pulse::Moved,
                (false, true) => Pulse::HungUp,
                (false, false) => Pulse::Still,
            };
            let patience = step(reads.front(), pulse)?;
            if reads.is_done() {
                guard.done = true;
                return Ok(());
            }
            if !moved {
                hung_up = guard.endpoint.wait(Some(watched), patience)?;
            }
        }
    }

    /// The region that a read's memory needs, if the provider wants one.
    fn local(
        &mut self,
        into: &mut [u8],
        map: Option<&SharedMap>,
    ) -> Result<Option<Arc<Region>>, FabricError> {
        let (domain, opened) = (&self.domain, self.opened.as_ref());
        if !domain.facts.register_local {
            return Ok(None);
        }
        let Some(map) = map else {
            let (at, len) = (into.as_mut_ptr().cast(), into.len());
            let region = domain.register(opened, at, len, Access::FilledByReads)?;
            return Ok(Some(Arc::new(region)));
        };
        let mut shared = domain.locals.lock().expect("no holder of the lock panics");
        let by_endpoint = domain.facts.region_by_endpoint;
        let locals = if by_endpoint { &mut self.locals } else { &mut *shared };
        let file = Arc::downgrade(map.backing());
        let (at, len) = (map.address(), map.len());
        let is_it = |l: &&Local| l.at == at && l.len == len && l.file.ptr_eq(&file);
        if let Some(known) = locals.iter().find(is_it) {
            return Ok(Some(Arc::clone(&known.region)));
        }
        locals.retain(|l| l.file.strong_count() > 0);
        let memory = at as *mut c_void;
        let region = domain.register(opened, memory, len as usize, Access::FilledByReads)?;
        let region = Arc::new(region);
        locals.push(Local { at, len, file, region: Arc::clone(&region) });
        Ok(Some(region))
    }

    /// Makes progress on what peers read here: without it, some providers answer no peer.
    pub(crate) fn serve(&mut self, patience: Duration) -> Result<(), FabricError> {
        let (mut tags, mut error) = ([0; 1], RawError::default());
        let endpoint = self.raw()?;
        // SAFETY: an open endpoint that is ours alone (`&mut`), and room for one tag.
        let code = unsafe { raw::fabric_poll(endpoint, tags.as_mut_ptr(), 1, &mut error) };
        if code < 0 {
            return Err(self.domain.failed(&error));
        }
        self.wait(None, patience).map(drop)
    }

    /// True if `watched` was hung up.
    fn wait(
        &mut self,
        watched: Option<BorrowedFd<'_>>,
        patience: Duration,
    ) -> Result<bool, FabricError> {
        let ms = patience.as_millis().clamp(1, 1000) as c_int;
        let fd = watched.map_or(-1, |fd| fd.as_raw_fd());
        // SAFETY: an open endpoint that is ours alone (`&mut`), and an open descriptor or none.
        Ok(unsafe { raw::fabric_wait(self.raw()?, fd, ms) } == 1)
    }

    /// Ends its reads: what they wrote to is the caller's again.
    fn close(&mut self) {
        self.locals.clear();
        self.opened = None;
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut error = RawError::default();
        // SAFETY: the last owner; regions of the endpoint hold an `Arc` of it, so none is open.
        let code = unsafe { raw::fabric_endpoint_close(self.raw.as_ptr(), &mut error) };
        if code != 0 {
            let error = self.domain.failed(&error);
            tracing::error!(%error, "a fabric endpoint does not close and may still write to memory");
            std::process::abort();
        }
    }
}

// SAFETY: what the C side changes in it is changed through `&mut Endpoint`; registering from other
// threads is allowed by FI_THREAD_SAFE.
unsafe impl Send for Opened {}
// SAFETY: as above.
unsafe impl Sync for Opened {}

struct CloseUnlessDone<'a> {
    endpoint: &'a mut Endpoint,
    done: bool,
}

impl Drop for CloseUnlessDone<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.endpoint.close();
        }
    }
}

// === impl Region ===

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: open, and owned by this alone.
        unsafe { raw::fabric_region_close(self.raw.as_ptr()) }
    }
}

// SAFETY: a handle that is only read (its key, its descriptor) until it is closed.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

// === impl ReadMap ===

impl ReadMap {
    /// The first `len` bytes of the file. Every page is touched: none faults when a peer reads it.
    pub(crate) fn of(file: &File, len: u64) -> std::io::Result<ReadMap> {
        if file.metadata()?.len() < len {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let len = usize::try_from(len).map_err(std::io::Error::other)?;
        let map = MmapOptions::new().len(len.max(1)).map_raw_read_only(file)?;
        // Kernels before 5.14 do not know it; then pages fault in as they are read.
        map.advise(Advice::PopulateRead).ok();
        Ok(ReadMap { _noted: LendingMap::at(map.as_ptr() as usize), map })
    }
}

// === impl Lender ===

impl Lender {
    /// Lends a mapped file to peers that are told where it is.
    pub(crate) fn lend(&self, map: &Arc<ReadMap>) -> Result<Lent, FabricError> {
        let (at, len) = (map.map.as_mut_ptr().cast(), map.map.len());
        let region = self.domain.register(Some(&self.opened), at, len, Access::ReadByPeers)?;
        let base = if self.domain.facts.address_by_virtual { at as u64 } else { 0 };
        Ok(Lent { region, _map: Arc::clone(map), _domain: Arc::clone(&self.domain), base })
    }
}

// === impl Lent ===

impl Lent {
    /// Address and key with which peers read from the byte at `offset` on.
    pub(crate) fn remote(&self, offset: u64) -> Remote {
        // SAFETY: an open region.
        let key = unsafe { raw::fabric_region_key(self.region.raw.as_ptr()) };
        Remote { at: self.base + offset, key }
    }
}

#[cfg(test)]
mod tests;
