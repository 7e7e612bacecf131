//! Reading a directory of safetensors files: the table of its tensors, their bytes, and a digest of their content
//! that does not depend on how they are laid out in files. Owns no model and decides no swap.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Largest header; a larger one is a damaged length field, not a checkpoint.
const HEADER_LIMIT_BYTES: u64 = 100_000_000;
const READ_BYTES: usize = 1 << 20;

/// Reason why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The path is no directory.
    #[error("{0} is not a directory; give the directory that holds the *.safetensors files")]
    NotADirectory(PathBuf),
    /// The directory holds no tensor.
    #[error("{0} holds no *.safetensors file with a tensor in it")]
    NoTensors(PathBuf),
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    /// The header of a file is damaged.
    #[error("{path} is no safetensors file: {reason}")]
    Header { path: PathBuf, reason: String },
    /// A file is shorter or longer than its header says.
    #[error(
        "{path} has {have_bytes} bytes where its header asks for {need_bytes}: it is truncated or still being written"
    )]
    Size { path: PathBuf, have_bytes: u64, need_bytes: u64 },
    /// Two files hold the same tensor.
    #[error("tensor {name} is in both {first} and {second}")]
    Doubled { name: String, first: PathBuf, second: PathBuf },
    /// Names, types or shapes differ from the model's.
    #[error("the checkpoint does not fit the model: {0}")]
    Mismatch(String),
}

/// Place, type and shape of one tensor in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Type by its safetensors name: `F32`, `BF16`, ...
    pub dtype: String,
    /// Length of each dimension.
    pub shape: Vec<u64>,
    /// File that holds the tensor.
    pub path: PathBuf,
    /// Offset of the tensor in the file.
    pub offset_bytes: u64,
    /// Length of the tensor.
    pub len_bytes: u64,
}

/// Tensors of a directory by name.
pub type TensorTable = BTreeMap<String, TensorEntry>;

/// One tensor in memory, for [`content_digest_of`].
#[derive(Clone, Copy, Debug)]
pub struct TensorContent<'a> {
    /// Name of the tensor.
    pub name: &'a str,
    /// Type by its safetensors name.
    pub dtype: &'a str,
    /// Length of each dimension.
    pub shape: &'a [u64],
    /// The tensor's bytes, row by row.
    pub data: &'a [u8],
}

/// BLAKE3 over name, type, shape and bytes of every tensor in `dir`, in name order; sharding does not matter.
pub fn content_digest(dir: &Path) -> Result<[u8; 32], WeightsError> {
    digest_table(&list_tensors(dir)?)
}

/// The digest of [`content_digest`] over tensors in memory, in any order.
pub fn content_digest_of<'a>(tensors: impl IntoIterator<Item = TensorContent<'a>>) -> [u8; 32] {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_by_key(|tensor| tensor.name);
    let mut hasher = start_digest();
    for tensor in tensors {
        describe(&mut hasher, tensor.name, tensor.dtype, tensor.shape, tensor.data.len() as u64);
        hasher.update(tensor.data);
    }
    *hasher.finalize().as_bytes()
}

/// The table of all tensors of a directory. Fails if sizes differ from the headers, or a name occurs twice.
pub fn list_tensors(dir: &Path) -> Result<TensorTable, WeightsError> {
    if !dir.is_dir() {
        return Err(WeightsError::NotADirectory(dir.to_owned()));
    }
    let mut table = TensorTable::new();
    for path in safetensors_files(dir)? {
        for (name, entry) in read_header(&path)? {
            let second = entry.path.clone();
            if let Some(first) = table.insert(name.clone(), entry) {
                return Err(WeightsError::Doubled { name, first: first.path, second });
            }
        }
    }
    if table.is_empty() {
        return Err(WeightsError::NoTensors(dir.to_owned()));
    }
    Ok(table)
}

/// The digest of [`content_digest`] over a table that was read before. Fails if a file cannot be read.
pub fn digest_table(table: &TensorTable) -> Result<[u8; 32], WeightsError> {
    let mut hasher = start_digest();
    let mut buffer = vec![0; READ_BYTES];
    let mut open: Option<(&Path, File)> = None;
    for (name, entry) in table {
        describe(&mut hasher, name, &entry.dtype, &entry.shape, entry.len_bytes);
        if open.as_ref().is_none_or(|(path, _)| *path != entry.path) {
            open = Some((
                &entry.path,
                File::open(&entry.path).map_err(|e| read_error(&entry.path, e))?,
            ));
        }
        let (_, file) = open.as_ref().expect("opened just above");
        let mut done = 0;
        while done < entry.len_bytes {
            let take = READ_BYTES.min((entry.len_bytes - done) as usize);
            file.read_exact_at(&mut buffer[..take], entry.offset_bytes + done)
                .map_err(|e| read_error(&entry.path, e))?;
            hasher.update(&buffer[..take]);
            done += take as u64;
        }
    }
    Ok(*hasher.finalize().as_bytes())
}

fn safetensors_files(dir: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| read_error(dir, e))? {
        let path = entry.map_err(|e| read_error(dir, e))?.path();
        if path.extension().is_some_and(|ext| ext == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read_header(path: &Path) -> Result<Vec<(String, TensorEntry)>, WeightsError> {
    let file = File::open(path).map_err(|e| read_error(path, e))?;
    let have_bytes = file.metadata().map_err(|e| read_error(path, e))?.len();
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(|e| read_error(path, e))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_LIMIT_BYTES || header_bytes + 8 > have_bytes {
        let reason =
            format!("it names a header of {header_bytes} bytes and has {have_bytes} in all");
        return Err(WeightsError::Header { path: path.to_owned(), reason });
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact_at(&mut header, 8).map_err(|e| read_error(path, e))?;
    let metadata: safetensors::tensor::Metadata = serde_json::from_slice(&header)
        .map_err(|e| WeightsError::Header { path: path.to_owned(), reason: e.to_string() })?;
    let need_bytes = 8 + header_bytes + metadata.data_len() as u64;
    if have_bytes != need_bytes {
        return Err(WeightsError::Size { path: path.to_owned(), have_bytes, need_bytes });
    }
    let tensors = metadata.tensors().into_iter().map(|(name, info)| {
        let entry = TensorEntry {
            dtype: info.dtype.to_string(),
            shape: info.shape.iter().map(|&n| n as u64).collect(),
            path: path.to_owned(),
            offset_bytes: 8 + header_bytes + info.data_offsets.0 as u64,
            len_bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
        };
        (name, entry)
    });
    Ok(tensors.collect())
}

fn start_digest() -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"anabranch tensor content, 1\n");
    hasher
}

/// Hashes name, type and shape, each with its length in front, so that no two listings have the same bytes.
fn describe(hasher: &mut blake3::Hasher, name: &str, dtype: &str, shape: &[u64], len_bytes: u64) {
    for text in [name, dtype] {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.update(&(shape.len() as u64).to_le_bytes());
    for dim in shape {
        hasher.update(&dim.to_le_bytes());
    }
    hasher.update(&len_bytes.to_le_bytes());
}

fn read_error(path: &Path, source: std::io::Error) -> WeightsError {
    WeightsError::Read { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

    fn write(path: &Path, tensors: &[(&str, &[f32])]) {
        let bytes: Vec<Vec<u8>> =
            tensors.iter().map(|(_, v)| v.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
        let views: Vec<_> = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, v), b)| (*name, TensorView::new(Dtype::F32, vec![v.len()], b).unwrap()))
            .collect();
        serialize_to_file(views, None, path).unwrap();
    }

    #[test]
    fn the_digest_depends_on_content_and_not_on_sharding() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        std::fs::create_dir(&one).unwrap();
        std::fs::create_dir(&two).unwrap();
        write(&one.join("all.safetensors"), &[("a", &[1.0, 2.0]), ("b", &[3.0])]);
        write(&two.join("part-1.safetensors"), &[("b", &[3.0])]);
        write(&two.join("part-2.safetensors"), &[("a", &[1.0, 2.0])]);
        let digest = content_digest(&one).unwrap();
        assert_eq!(digest, content_digest(&two).unwrap());
        let (a, b): (Vec<u8>, Vec<u8>) = (
            [1f32, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect(),
            3f32.to_le_bytes().to_vec(),
        );
        let memory = [
            TensorContent { name: "b", dtype: "F32", shape: &[1], data: &b },
            TensorContent { name: "a", dtype: "F32", shape: &[2], data: &a },
        ];
        assert_eq!(digest, content_digest_of(memory));
        write(&two.join("part-1.safetensors"), &[("b", &[3.5])]);
        assert_ne!(digest, content_digest(&two).unwrap());
    }

    #[test]
    fn damaged_directories_are_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        assert!(matches!(content_digest(&path), Err(WeightsError::NotADirectory(_))));
        assert!(matches!(content_digest(dir.path()), Err(WeightsError::NoTensors(_))));
        write(&path, &[("a", &[1.0, 2.0])]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(matches!(content_digest(dir.path()), Err(WeightsError::Size { .. })));
        std::fs::write(&path, [0xff; 64]).unwrap();
        assert!(matches!(content_digest(dir.path()), Err(WeightsError::Header { .. })));
        std::fs::write(&path, &bytes).unwrap();
        std::fs::copy(&path, dir.path().join("n.safetensors")).unwrap();
        assert!(matches!(content_digest(dir.path()), Err(WeightsError::Doubled { .. })));
    }
}
