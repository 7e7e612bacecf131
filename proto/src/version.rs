//! Weight versions: their names, and when two of them can be compared.

use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::invalid::Invalid;
use crate::pb;

/// BLAKE3 root of a manifest: a name for every byte of a version. All zeros: not known. In JSON it is 64
/// hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Root(pub [u8; 32]);

/// Name of a weight version. `number` orders versions within one epoch only: a restarted trainer opens a
/// new epoch and may publish any number again.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
pub struct Version {
    /// Epoch of the job, counted by the trainer.
    pub epoch: u32,
    /// Number within the epoch; 0 stands for the weights that an engine was started with.
    pub number: u64,
    /// Root of the version's full manifest; zeros for number 0, and until the version is sealed.
    pub root: Root,
}

/// Error of a version whose root has the wrong length.
#[derive(Debug, thiserror::Error)]
#[error("version {epoch}.{number}: root has {len} bytes, expected 32 (or none for number 0)")]
pub struct BadVersion {
    epoch: u32,
    number: u64,
    len: usize,
}

// === impl Version ===

impl Version {
    /// Version that an engine serves before anything was published.
    pub fn base(epoch: u32) -> Self {
        Self { epoch, number: 0, root: Root::default() }
    }

    /// True for the weights that an engine was started with.
    pub fn is_base(&self) -> bool {
        self.number == 0
    }

    /// Number of versions that `self` is behind `current`; `None` if they are of two epochs. The start-up
    /// weights belong to every epoch.
    pub fn lag_behind(&self, current: &Version) -> Option<u64> {
        if self.is_base() || current.is_base() || self.epoch == current.epoch {
            Some(current.number.saturating_sub(self.number))
        } else {
            None
        }
    }

    /// Reads the version in `field` of a message, which must be set.
    pub fn required(field: &str, wire: Option<pb::Version>) -> Result<Self, Invalid> {
        let missing = || Invalid::missing(field, "name the version");
        Self::read(field, wire.ok_or_else(missing)?)
    }

    /// Reads the version in `field` of a message.
    pub fn read(field: &str, wire: pb::Version) -> Result<Self, Invalid> {
        Self::try_from(wire).map_err(|error| Invalid::rule(field, error))
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
    /// Root of the manifest with the encoding `bytes`.
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

impl<'de> Deserialize<'de> for Root {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut root = [0; 32];
        hex::decode_to_slice(&text, &mut root)
            .map_err(|error| D::Error::custom(format!("root {text:?}: {error}")))?;
        Ok(Root(root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(epoch: u32, number: u64) -> Version {
        Version { epoch, number, root: Root([7; 32]) }
    }

    #[test]
    fn versions_are_compared_within_one_epoch_only() {
        assert_eq!(version(0, 3).lag_behind(&version(0, 5)), Some(2));
        assert_eq!(version(0, 5).lag_behind(&version(0, 3)), Some(0));
        assert_eq!(version(0, 3).lag_behind(&version(1, 5)), None);
        assert_eq!(Version::base(0).lag_behind(&version(1, 5)), Some(5));
    }

    #[test]
    fn a_version_goes_over_the_wire_and_through_json_and_back() {
        for named in [version(2, 3), Version::base(1)] {
            assert_eq!(Version::required("v", Some(named.into())), Ok(named));
            let json = serde_json::to_string(&named).expect("plain data");
            assert_eq!(serde_json::from_str::<Version>(&json).expect("read back"), named);
        }
        assert_eq!(version(2, 3).to_string(), "v3@2");
    }

    #[test]
    fn a_version_that_is_missing_or_has_half_a_root_is_refused_by_field() {
        let missing = Version::required("pin", None).expect_err("missing").to_string();
        assert_eq!(missing, "pin: missing; name the version");
        let half = pb::Version { number: 1, root: vec![1; 5].into(), ..Default::default() };
        let refused = Version::read("pin", half).expect_err("half").to_string();
        assert_eq!(
            refused,
            "pin: version 0.1: root has 5 bytes, expected 32 (or none for number 0)"
        );
        assert!(serde_json::from_str::<Root>("\"00\"").is_err());
    }
}
