//! Layout of the engine's tensors: every new version must have the same names, types and shapes.

use std::collections::BTreeMap;
use std::path::Path;

use anabranch_proto::manifest::{DType, Manifest};
use anabranch_transfer::checkpoint::{Checkpoint, LayoutDiff, Mismatch};

/// Type and shape of each tensor, by name.
pub type Table = BTreeMap<String, (DType, Vec<u64>)>;

/// Checks that the checkpoint in `directory` has the layout `baseline`.
pub fn fits(directory: &Path, baseline: Option<&Table>) -> Result<(), String> {
    let checkpoint = Checkpoint::open(directory).map_err(|error| error.to_string())?;
    let Some(baseline) = baseline else { return Ok(()) };
    let diff = differences(baseline, &table_of(&checkpoint));
    if diff == LayoutDiff::default() {
        return Ok(());
    }
    let at = directory.display();
    Err(format!("{at} does not fit this engine, which keeps its old weights: {diff}"))
}

/// Layout of a checkpoint.
pub fn table_of(checkpoint: &Checkpoint) -> Table {
    let row = |t: &anabranch_transfer::checkpoint::StoredTensor| {
        (t.name.clone(), (t.dtype, t.shape.clone()))
    };
    checkpoint.tensors().iter().map(row).collect()
}

/// Layout of a manifest.
pub fn table_of_manifest(manifest: &Manifest) -> Table {
    manifest.tensors.iter().map(|t| (t.name.clone(), (t.dtype, t.shape.clone()))).collect()
}

/// Size of all tensors together, in bytes.
pub fn image_bytes(table: &Table) -> u64 {
    let bytes = |(dtype, shape): &(DType, Vec<u64>)| {
        anabranch_proto::manifest::tensor_bytes(*dtype, shape).unwrap_or(u64::MAX)
    };
    table.values().map(bytes).fold(0, u64::saturating_add)
}

/// Differences of `version` from `baseline`.
pub fn differences(baseline: &Table, version: &Table) -> LayoutDiff {
    let mut diff = LayoutDiff::default();
    for (tensor, (dtype, shape)) in baseline {
        let Some((new_dtype, new_shape)) = version.get(tensor) else {
            diff.missing.push(tensor.clone());
            continue;
        };
        let tensor = || tensor.clone();
        if new_dtype != dtype {
            diff.dtypes.push(Mismatch { tensor: tensor(), baseline: *dtype, version: *new_dtype });
        }
        if new_shape != shape {
            let (baseline, version) = (shape.clone(), new_shape.clone());
            diff.shapes.push(Mismatch { tensor: tensor(), baseline, version });
        }
    }
    diff.extra.extend(version.keys().filter(|name| !baseline.contains_key(*name)).cloned());
    diff
}
