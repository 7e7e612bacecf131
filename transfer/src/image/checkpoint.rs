//! Safetensors directories: their headers, strictly read, and whether two sets of tensors are the same
//! in names, shapes and dtypes. An engine that is told to load a directory that is not may die, or
//! silently mix old and new weights, so nothing reaches it unchecked.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anabranch_proto::manifest::{DType, Manifest, tensor_bytes};

/// Largest header that is read, the same as in the safetensors crate.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A directory's tensors, in the order of files and offsets.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    tensors: Vec<StoredTensor>,
    files: Vec<File>,
}

/// A tensor of a checkpoint, with the place of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Name, as in the header.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// Length in bytes.
    pub len: u64,
    file: usize,
    offset: u64,
}

/// The tensors that an engine was started with: name, dtype and shape.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Baseline {
    tensors: BTreeMap<String, (DType, Vec<u64>)>,
}

/// Differences between a version's tensors and the baseline.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct LayoutDiff {
    /// Tensors of the baseline that the version lacks.
    pub missing: Vec<String>,
    /// Tensors of the version that the baseline lacks.
    pub extra: Vec<String>,
    /// Tensors of another shape.
    pub shapes: Vec<Mismatch<Vec<u64>>>,
    /// Tensors of another element type.
    pub dtypes: Vec<Mismatch<DType>>,
}

/// A tensor that differs in one property.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch<T> {
    /// Name of the tensor.
    pub tensor: String,
    /// The value that the engine was started with.
    pub baseline: T,
    /// The value in the version.
    pub version: T,
}

/// Why a directory is no checkpoint, or a tensor of it cannot be read.
#[allow(missing_docs, reason = "the fields are the facts of the messages")]
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file or the directory cannot be read.
    #[error("cannot read {path}: {error}")]
    Read { path: PathBuf, error: io::Error },
    /// The directory has no safetensors file.
    #[error("{0} holds no *.safetensors file; give a checkpoint directory")]
    NoFiles(PathBuf),
    /// A file ends before its last tensor.
    #[error("{path} is truncated: its header promises {promised} bytes, the file has {len}")]
    Truncated { path: PathBuf, promised: u64, len: u64 },
    /// A file goes on after its last tensor.
    #[error("{path} has {extra} bytes after its last tensor")]
    Trailing { path: PathBuf, extra: u64 },
    /// A header is malformed.
    #[error("{path} is not a safetensors file: {why}")]
    Header { path: PathBuf, why: String },
    /// A tensor of a header is malformed.
    #[error("tensor `{tensor}` of {path}: {why}")]
    Tensor { path: PathBuf, tensor: String, why: String },
    /// Two files have a tensor of one name.
    #[error("tensor `{tensor}` is in {path} and in another file of the directory")]
    Duplicate { path: PathBuf, tensor: String },
}

// === impl Checkpoint ===

impl Checkpoint {
    /// Opens every `*.safetensors` of `dir` and reads the headers, sharded or not.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let failed = |error| CheckpointError::Read { path: dir.to_owned(), error };
        let entries = std::fs::read_dir(dir).map_err(failed)?;
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                paths.push(path);
            }
        }
        paths.sort();
        if paths.is_empty() {
            return Err(CheckpointError::NoFiles(dir.to_owned()));
        }
        let (mut tensors, mut files) = (Vec::new(), Vec::new());
        let mut seen = BTreeMap::new();
        for path in paths {
            let file = File::open(&path)
                .map_err(|error| CheckpointError::Read { path: path.clone(), error })?;
            for tensor in read_header(&path, &file, files.len())? {
                if seen.insert(tensor.name.clone(), ()).is_some() {
                    return Err(CheckpointError::Duplicate { path, tensor: tensor.name });
                }
                tensors.push(tensor);
            }
            files.push(file);
        }
        Ok(Checkpoint { dir: dir.to_owned(), tensors, files })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tensors, in the order of files and offsets.
    pub fn tensors(&self) -> &[StoredTensor] {
        &self.tensors
    }

    /// Names, shapes and dtypes, as the baseline of versions.
    pub fn baseline(&self) -> Baseline {
        let entry = |t: &StoredTensor| (t.name.clone(), (t.dtype, t.shape.clone()));
        Baseline { tensors: self.tensors.iter().map(entry).collect() }
    }

    /// Reads a tensor's bytes into `out`, which has its length.
    pub fn read_into(&self, tensor: &StoredTensor, out: &mut [u8]) -> Result<(), CheckpointError> {
        self.read_part(tensor, 0, out)
    }

    /// Reads a tensor's bytes from the `from`th on; `out` does not reach beyond its end.
    pub(crate) fn read_part(
        &self,
        tensor: &StoredTensor,
        from: u64,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let read = self.files[tensor.file].read_exact_at(out, tensor.offset + from);
        read.map_err(|error| CheckpointError::Read { path: self.dir.clone(), error })
    }
}

fn read_header(
    path: &Path,
    file: &File,
    file_ix: usize,
) -> Result<Vec<StoredTensor>, CheckpointError> {
    let failed = |error| CheckpointError::Read { path: path.to_owned(), error };
    let bad = |why: String| CheckpointError::Header { path: path.to_owned(), why };
    let len = file.metadata().map_err(failed)?.len();
    let short = |promised| CheckpointError::Truncated { path: path.to_owned(), promised, len };
    if len < 8 {
        return Err(short(8));
    }
    let mut prefix = [0; 8];
    file.read_exact_at(&mut prefix, 0).map_err(failed)?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER_BYTES {
        return Err(bad(format!("a header of {header_len} bytes")));
    }
    if len < 8 + header_len {
        return Err(short(8 + header_len));
    }
    let mut json = vec![0; header_len as usize];
    file.read_exact_at(&mut json, 8).map_err(failed)?;
    let json: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&json).map_err(|e| bad(e.to_string()))?;
    let mut tensors = Vec::with_capacity(json.len());
    for (name, info) in json.into_iter().filter(|(name, _)| name != "__metadata__") {
        let why = |why| CheckpointError::Tensor { path: path.into(), tensor: name.clone(), why };
        let info: Info = serde_json::from_value(info).map_err(|e| why(e.to_string()))?;
        let tensor = info.place(&name, file_ix, 8 + header_len).map_err(why)?;
        tensors.push(tensor);
    }
    tensors.sort_by_key(|t| (t.offset, t.len));
    let mut end = 8 + header_len;
    for t in &tensors {
        if t.offset != end {
            return Err(bad(format!("`{}` overlaps another tensor or leaves a hole", t.name)));
        }
        end += t.len;
    }
    match len.cmp(&end) {
        std::cmp::Ordering::Less => Err(short(end)),
        std::cmp::Ordering::Equal => Ok(tensors),
        std::cmp::Ordering::Greater => {
            Err(CheckpointError::Trailing { path: path.to_owned(), extra: len - end })
        }
    }
}

#[derive(serde::Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Info {
    fn place(self, name: &str, file: usize, data_at: u64) -> Result<StoredTensor, String> {
        let Info { dtype, shape, data_offsets: (start, end) } = self;
        let dtype = DType::from_name(&dtype).ok_or_else(|| {
            format!("dtype {dtype} is not supported (sub-byte types must be packed as U8)")
        })?;
        let len = end.checked_sub(start).ok_or("it ends before it starts")?;
        if tensor_bytes(dtype, &shape) != Some(len) {
            return Err(format!("shape {shape:?} of {dtype} does not give {len} bytes"));
        }
        let offset = data_at.checked_add(start).filter(|o| o.checked_add(len).is_some());
        let offset = offset.ok_or("its place overflows 64 bits")?;
        Ok(StoredTensor { name: name.to_owned(), dtype, shape, len, file, offset })
    }
}

// === impl Baseline ===

impl Baseline {
    /// The tensors of a version.
    pub fn of_manifest(manifest: &Manifest) -> Baseline {
        let entry =
            |t: &anabranch_proto::manifest::Tensor| (t.name.clone(), (t.dtype, t.shape.clone()));
        Baseline { tensors: manifest.tensors.iter().map(entry).collect() }
    }

    /// A baseline from names, dtypes and shapes.
    pub fn from_tensors(tensors: impl IntoIterator<Item = (String, DType, Vec<u64>)>) -> Baseline {
        Baseline { tensors: tensors.into_iter().map(|(n, d, s)| (n, (d, s))).collect() }
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// True without tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// `Ok` if the version has exactly the baseline's names, shapes and dtypes.
    pub fn compare(&self, manifest: &Manifest) -> Result<(), LayoutDiff> {
        let version = Baseline::of_manifest(manifest);
        let mut diff = LayoutDiff::default();
        for (name, (dtype, shape)) in &self.tensors {
            let Some((new_dtype, new_shape)) = version.tensors.get(name) else {
                diff.missing.push(name.clone());
                continue;
            };
            if new_dtype != dtype {
                let (baseline, version) = (*dtype, *new_dtype);
                diff.dtypes.push(Mismatch { tensor: name.clone(), baseline, version });
            }
            if new_shape != shape {
                let (baseline, version) = (shape.clone(), new_shape.clone());
                diff.shapes.push(Mismatch { tensor: name.clone(), baseline, version });
            }
        }
        let extra = version.tensors.keys().filter(|name| !self.tensors.contains_key(*name));
        diff.extra.extend(extra.cloned());
        if diff == LayoutDiff::default() { Ok(()) } else { Err(diff) }
    }
}

// === impl LayoutDiff ===

/// Tensors of each kind that a message names; the rest is counted.
const NAMED: usize = 5;

impl fmt::Display for LayoutDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape = |m: &Mismatch<Vec<u64>>| {
            format!("`{}` is {:?}, the engine has {:?}", m.tensor, m.version, m.baseline)
        };
        let dtype = |m: &Mismatch<DType>| {
            format!("`{}` is {}, the engine has {}", m.tensor, m.version, m.baseline)
        };
        let quoted = |n: &String| format!("`{n}`");
        let parts = [
            ("missing", list(&self.missing, quoted)),
            ("extra", list(&self.extra, quoted)),
            ("other shape", list(&self.shapes, shape)),
            ("other dtype", list(&self.dtypes, dtype)),
        ];
        let mut first = true;
        for (what, text) in parts {
            if let Some(text) = text {
                write!(f, "{}{what}: {text}", if first { "" } else { "; " })?;
                first = false;
            }
        }
        Ok(())
    }
}

impl std::error::Error for LayoutDiff {}

fn list<T>(items: &[T], show: impl Fn(&T) -> String) -> Option<String> {
    let mut text: Vec<String> = items.iter().take(NAMED).map(show).collect();
    if items.len() > NAMED {
        text.push(format!("and {} more", items.len() - NAMED));
    }
    (!text.is_empty()).then(|| text.join(", "))
}

#[cfg(test)]
mod tests;
