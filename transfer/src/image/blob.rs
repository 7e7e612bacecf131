//! One image, or one delta, in a file: its manifest, the chunks of it that are verified, and the stamp that
//! tells whether the file's memory still belongs to it.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use anabranch_proto::manifest::Manifest;

use super::chunks::Ledger;

/// Kind of a version's blob. The numbers are those of the data plane's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum BlobId {
    /// The full image.
    Image = 0,
    /// The delta against the base that the receiver named in its `Hi`.
    Delta = 1,
}

/// An image or a delta that lies in a file. Valid as long as its stamp is.
#[derive(Clone, Debug)]
pub struct Blob {
    /// The file with the bytes, from offset 0.
    pub file: Backing,
    /// Length, chunks and hashes of the bytes.
    pub manifest: Arc<Manifest>,
    /// The manifest as it is sent: its hash is the version's root.
    pub encoded: Arc<[u8]>,
    /// The chunks that are in the file and verified.
    pub ledger: Arc<Ledger>,
    /// Says whether the file's memory still belongs to this blob.
    pub stamp: Stamp,
}

/// The file that a blob's bytes are in.
#[derive(Clone, Debug)]
pub enum Backing {
    /// A file of this process.
    Own(Arc<File>),
    /// Memory of another process. The process gets it back when its adopter lets go, even while somebody
    /// still reads it here.
    Lent(Weak<File>),
}

/// The generation of a slot at the time when a blob was made. Once the slot has another generation, its
/// memory holds other bytes.
#[derive(Clone, Debug)]
pub struct Stamp {
    cell: Arc<AtomicU64>,
    seen: u64,
}

// === impl Backing ===

impl Backing {
    /// The file; `None` once the memory was given back.
    pub fn get(&self) -> Option<Arc<File>> {
        match self {
            Backing::Own(file) => Some(Arc::clone(file)),
            Backing::Lent(file) => file.upgrade(),
        }
    }
}

// === impl Stamp ===

impl Stamp {
    /// A stamp of the slot whose generation is in `cell`, as it is now.
    pub fn of(cell: &Arc<AtomicU64>) -> Stamp {
        Stamp { cell: Arc::clone(cell), seen: cell.load(Ordering::Acquire) }
    }

    /// True if both stamps are of one slot in one generation.
    pub fn is(&self, other: &Stamp) -> bool {
        Arc::ptr_eq(&self.cell, &other.cell) && self.seen == other.seen
    }

    /// False once the memory belongs to another version: bytes read from it since may be torn.
    pub fn is_valid(&self) -> bool {
        self.cell.load(Ordering::Acquire) == self.seen
    }
}
