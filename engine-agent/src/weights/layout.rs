//! Names, types and shapes of the tensors that an engine was started with: every new version must
//! have the same.

use std::collections::BTreeMap;
use std::path::Path;

use anabranch_proto::manifest::{DType, Manifest};
use anabranch_transfer::checkpoint::{Checkpoint, LayoutDiff, Mismatch};

pub type Table = BTreeMap<String, (DType, Vec<u64>)>;

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

pub fn table_of(checkpoint: &Checkpoint) -> Table {
    let row = |t: &anabranch_transfer::checkpoint::StoredTensor| {
        (t.name.clone(), (t.dtype, t.shape.clone()))
    };
    checkpoint.tensors().iter().map(row).collect()
}

pub fn table_of_manifest(manifest: &Manifest) -> Table {
    manifest.tensors.iter().map(|t| (t.name.clone(), (t.dtype, t.shape.clone()))).collect()
}

pub fn image_bytes(table: &Table) -> u64 {
    let bytes = |(dtype, shape): &(DType, Vec<u64>)| {
        anabranch_proto::manifest::tensor_bytes(*dtype, shape).unwrap_or(u64::MAX)
    };
    table.values().map(bytes).fold(0, u64::saturating_add)
}

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
