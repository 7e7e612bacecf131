//! The pieces of one read of a peer's memory. Knows what was started and what came; that they end before
//! their memory is anybody else's is the endpoint's.

use std::ffi::c_int;
use std::ptr::null;

use super::raw::{self, Facts, RawEndpoint, RawError};
use super::{Endpoint, FabricError, Peer, Region, Remote};

/// Reads of a chunk overlap with the hash of the pieces before.
const PIECE_BYTES: usize = 256 << 10;
/// Completions taken in at once.
const BATCH: usize = 16;

/// The pieces of one read: some arrived, some are under way, the rest still to be started.
pub(crate) struct Reads<'a> {
    into: *mut u8,
    len: usize,
    piece: usize,
    peer: Peer,
    from: Remote,
    local: Option<&'a Region>,
    started: usize,
    arrived: Vec<bool>,
    /// Pieces from the front that arrived.
    front: usize,
}

// === impl Reads ===

impl<'a> Reads<'a> {
    pub(crate) fn new(
        into: &'a mut [u8],
        peer: Peer,
        from: Remote,
        local: Option<&'a Region>,
        facts: &Facts,
    ) -> Reads<'a> {
        let (len, into) = (into.len(), into.as_mut_ptr());
        let most = usize::try_from(facts.max_read_bytes).unwrap_or(PIECE_BYTES);
        let piece = most.clamp(1, PIECE_BYTES);
        let arrived = vec![false; len.div_ceil(piece)];
        Reads { into, len, piece, peer, from, local, started: 0, arrived, front: 0 }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.front == self.arrived.len()
    }

    pub(crate) fn front(&self) -> &[u8] {
        let complete = self.len.min(self.front * self.piece);
        // SAFETY: inside the memory that `new` borrowed; the fabric is done with these pieces.
        unsafe { std::slice::from_raw_parts(self.into, complete) }
    }

    /// Starts what can start and takes in what came; true if there was any of either.
    pub(crate) fn advance(&mut self, endpoint: &mut Endpoint) -> Result<bool, FabricError> {
        let raw = endpoint.raw()?;
        let mut error = RawError::default();
        let before = self.started;
        while self.started < self.arrived.len() {
            match self.start(raw, self.started, &mut error) {
                0 => self.started += 1,
                1.. => break,
                _ => return Err(endpoint.domain.failed(&error)),
            }
        }
        let mut tags = [0u64; BATCH];
        // SAFETY: an open endpoint that is ours alone (`&mut`), and room for that many tags.
        let came = unsafe { raw::fabric_poll(raw, tags.as_mut_ptr(), tags.len(), &mut error) };
        let came = usize::try_from(came).map_err(|_| endpoint.domain.failed(&error))?;
        for tag in &tags[..came] {
            self.arrived[*tag as usize] = true;
        }
        self.front += self.arrived[self.front..].iter().take_while(|a| **a).count();
        Ok(came > 0 || self.started > before)
    }

    fn start(&self, raw: *mut RawEndpoint, index: usize, error: &mut RawError) -> c_int {
        let at = index * self.piece;
        let len = self.piece.min(self.len - at);
        let local = self.local.map_or(null(), |r| r.raw.as_ptr().cast_const());
        let remote = self.from.at.wrapping_add(at as u64);
        // SAFETY: the piece lies inside the memory that `new` borrowed, and that is not touched before
        // its completion; if that does not come, the endpoint is closed (`CloseUnlessDone`).
        unsafe {
            let into = self.into.add(at).cast();
            let (peer, key) = (self.peer.0, self.from.key);
            raw::fabric_read(raw, into, len, local, peer, remote, key, index as u64, error)
        }
    }
}
