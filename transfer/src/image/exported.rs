//! Names of exported versions on a shared file system, as the exporter writes them and receivers read them.
//!
//! ```text
//!   <dir>/v<number>-e<epoch>-<root>/   model.safetensors  manifest  [delta  delta.manifest]
//! ```

use std::io;
use std::path::{Path, PathBuf};

use anabranch_proto::version::{Root, Version};

use super::blob::BlobId;

/// The image's file inside a version's directory: the one that engines load.
pub const MODEL_FILE: &str = "model.safetensors";

const MANIFEST_FILE: &str = "manifest";
const DELTA_FILE: &str = "delta";
const DELTA_MANIFEST_FILE: &str = "delta.manifest";

/// Name of a version's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name {
    epoch: u32,
    number: u64,
    /// The first bytes of the root.
    root: [u8; ROOT_BYTES],
}

const ROOT_BYTES: usize = 6;

/// The versions in an export directory, in no order. Entries with other names are left out.
pub(crate) fn list(dir: &Path) -> io::Result<Vec<Name>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        names.extend(entry?.file_name().to_str().and_then(Name::parse));
    }
    Ok(names)
}

/// Paths of a blob in its version's directory: the manifest, then the bytes.
pub(crate) fn files(version_dir: &Path, blob: BlobId) -> (PathBuf, PathBuf) {
    let (manifest, bytes) = match blob {
        BlobId::Image => (MANIFEST_FILE, MODEL_FILE),
        BlobId::Delta => (DELTA_MANIFEST_FILE, DELTA_FILE),
    };
    (version_dir.join(manifest), version_dir.join(bytes))
}

// === impl Name ===

impl Name {
    /// The name of `version`'s directory.
    pub(crate) fn of(version: Version) -> Name {
        let Version { epoch, number, root: Root(root) } = version;
        let root = root[..ROOT_BYTES].try_into().expect("a root is longer");
        Name { epoch, number, root }
    }

    fn parse(text: &str) -> Option<Name> {
        let mut parts = text.splitn(3, '-');
        let number = parts.next()?.strip_prefix('v')?.parse().ok()?;
        let epoch = parts.next()?.strip_prefix('e')?.parse().ok()?;
        let mut root = [0; ROOT_BYTES];
        hex::decode_to_slice(parts.next()?, &mut root).ok()?;
        let name = Name { epoch, number, root };
        // Names that would be written in another way are somebody else's.
        (name.to_string() == text).then_some(name)
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "v{}-e{}-{}", self.number, self.epoch, hex::encode(self.root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_those_of_others_are_left_alone() {
        let version = Version { epoch: 2, number: 17, root: Root([0xab; 32]) };
        let name = Name::of(version);
        assert_eq!(name.to_string(), "v17-e2-abababababab");
        assert_eq!(Name::parse(&name.to_string()), Some(name));
        for other in ["v17", "v017-e2-abababababab", "v17-e2-ABABABABABAB", ".part-x", "v1-e1-ab"] {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }
}
