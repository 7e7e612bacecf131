//! Weight versions: what they are called, and when two of them can be compared.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::pb;

/// BLAKE3 root of a manifest: names every byte of a version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Root(pub [u8; 32]);

/// A weight version. `number` orders versions within one epoch only: a restarted trainer opens a new
/// epoch and may publish any number again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Default)]
pub struct Version {
    pub epoch: u32,
    /// 0 = the weights an engine was started with.
    pub number: u64,
    pub root: Root,
}

/// A version's root has the wrong length.
#[derive(Debug, thiserror::Error)]
#[error("version {epoch}.{number}: root has {len} bytes, expected 32 (or none for number 0)")]
pub struct BadVersion {
    epoch: u32,
    number: u64,
    len: usize,
}

// === impl Version ===

impl Version {
    /// What an engine serves before anything was published.
    pub fn base(epoch: u32) -> Self {
        Self { epoch, number: 0, root: Root::default() }
    }

    pub fn is_base(&self) -> bool {
        self.number == 0
    }

    /// How many versions `self` is behind `current`; `None` where they cannot be compared.
    /// The start-up weights belong to every epoch.
    pub fn lag_behind(&self, current: &Version) -> Option<u64> {
        if self.is_base() || current.is_base() || self.epoch == current.epoch {
            Some(current.number.saturating_sub(self.number))
        } else {
            None
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.epoch {
            0 => write!(f, "v{}", self.number),
            epoch => write!(f, "v{}@{epoch}", self.number),
        }
    }
}

impl From<Version> for pb::Version {
    fn from(v: Version) -> Self {
        let root = if v.is_base() {
            bytes::Bytes::new()
        } else {
            bytes::Bytes::copy_from_slice(&v.root.0)
        };
        Self { epoch: v.epoch, number: v.number, root }
    }
}

impl TryFrom<pb::Version> for Version {
    type Error = BadVersion;

    fn try_from(pb: pb::Version) -> Result<Self, BadVersion> {
        let root = match pb.root.len() {
            0 => Root::default(),
            32 => Root(pb.root.as_ref().try_into().expect("length was checked")),
            len => return Err(BadVersion { epoch: pb.epoch, number: pb.number, len }),
        };
        Ok(Self { epoch: pb.epoch, number: pb.number, root })
    }
}

// === impl Root ===

impl Root {
    pub fn of(bytes: &[u8]) -> Root {
        Root(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0[..6]))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Root({self})")
    }
}

impl Serialize for Root {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(self.0))
    }
}
