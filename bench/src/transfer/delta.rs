//! Figures C and D: what a delta costs in bytes, on checkpoints of real training, beside the encodings that others
//! use; and what it costs in time, beside a copy.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use anabranch_proto::manifest::{DType, Kind, Manifest};
use anabranch_transfer::delta;
use anabranch_transfer::layout::{Layout, TensorSpec};
use anyhow::{Context, ensure};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use super::model::Model;
use super::pairs::{self, Pair};
use super::report::{Figure, median};
use crate::progress;

const ZSTD_LEVEL: i32 = 1;
/// Bytes of one changed element as an index of 32 bits and a value of 16.
const PAIR_BYTES: u64 = 4 + 2;

/// Measures figure C on the pairs in `dir`. Pairs that are not there are trained.
pub fn figure_c(dir: &Path) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for pair in pairs::pairs(dir)? {
        progress::line(&format!("figure C: {}", pair.name));
        figures.extend(sizes(&pair)?);
    }
    Ok(figures)
}

fn sizes(pair: &Pair) -> anyhow::Result<[Figure; 2]> {
    let (layout, base) = image(&pair.base)?;
    let (other, new) = image(&pair.new)?;
    ensure!(layout == other, "{} and {} differ in layout", pair.base.display(), pair.new.display());
    let manifest = manifest(&layout);
    let blob = delta::encode(&manifest, &base, &new, 1, &|_, _| true).context("given up")?;
    let mut applied = vec![0; base.len()];
    delta::apply(&manifest, &blob, &base, &mut applied)?;
    let exact = applied == new;
    let changed = base.chunks(2).zip(new.chunks(2)).filter(|(a, b)| a != b).count() as u64;
    let density = changed as f64 * 2.0 / new.len() as f64;
    let xor: Vec<u8> = base.iter().zip(&new).map(|(a, b)| a ^ b).collect();
    let xor = zstd::bulk::compress(&xor, ZSTD_LEVEL)?.len();
    let coo = changed * PAIR_BYTES;
    let bound = entropy_bytes(&base, &new);
    let sparse = density <= 0.03;
    let detail = |against: &str, bytes: u64| {
        json!({
            "pair": pair.name, "elements": new.len() / 2, "changed": changed, "density": density,
            "delta_bytes": blob.len(), "bits_per_change": blob.len() as f64 * 8.0 / changed as f64,
            "against": against, "against_bytes": bytes, "exact": exact, "entropy_bytes": bound,
            "note": format!(
                "{:.2} % changed, entropy at {:.3}{}",
                density * 100.0, bound / bytes as f64, outside(density)
            ),
        })
    };
    let figure = |id: &str, goal: f64, against: &str, bytes: u64| {
        let value = blob.len() as f64 / bytes as f64;
        let id = format!("C.{id}.{}", pair.name);
        let figure = Figure::at_most(&id, value, goal, "x", detail(against, bytes));
        if exact { figure } else { figure.spoiled("applying it gave other bytes") }
    };
    Ok([
        figure("xor", if sparse { 0.45 } else { 0.5 }, "XOR + zstd level 1", xor as u64),
        figure("coo", if sparse { 0.25 } else { 0.5 }, "int32 index + bf16 value", coo),
    ])
}

/// Remark for a density for which no goal is stated: goals are for 0.3-3 % and for more than 5 %.
fn outside(density: f64) -> &'static str {
    match density {
        d if d < 0.003 => "; sparser than the goal is for",
        d if d > 0.03 && d < 0.05 => "; between the goals' ranges",
        _ => "",
    }
}

/// Lower bound of the size, in bytes, of any code of single steps that knows each element's old exponent, and for each
/// exponent how often each step in value order occurs.
fn entropy_bytes(base: &[u8], new: &[u8]) -> f64 {
    let ordered = |b: &[u8]| match u16::from_le_bytes([b[0], b[1]]) {
        bits if bits >> 15 == 0 => i32::from(bits),
        bits => -1 - i32::from(bits & 0x7FFF),
    };
    let mut steps = vec![HashMap::<i32, u64>::new(); 256];
    for (old, new) in base.chunks_exact(2).zip(new.chunks_exact(2)) {
        let exponent = u16::from_le_bytes([old[0], old[1]]) >> 7 & 0xFF;
        let step = ordered(new) - ordered(old);
        *steps[usize::from(exponent)].entry(step).or_default() += 1;
    }
    let bits = |counts: &HashMap<i32, u64>| {
        let all = counts.values().sum::<u64>() as f64;
        counts.values().map(|n| *n as f64 * (all / *n as f64).log2()).sum::<f64>()
    };
    steps.iter().map(bits).sum::<f64>() / 8.0
}

/// Reads a safetensors file of bf16 tensors as the image of a version.
fn image(path: &Path) -> anyhow::Result<(Layout, Vec<u8>)> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes)
        .with_context(|| format!("{} is no safetensors file", path.display()))?;
    let mut tensors = file.tensors();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let bf16 = tensors.iter().all(|(_, t)| t.dtype() == Dtype::BF16);
    ensure!(bf16, "{} has tensors that are not bf16", path.display());
    let spec = |(name, t): &(String, safetensors::tensor::TensorView<'_>)| TensorSpec {
        name: name.clone(),
        dtype: DType::BF16,
        shape: t.shape().iter().map(|d| *d as u64).collect(),
    };
    let layout = Layout::new(&tensors.iter().map(spec).collect::<Vec<_>>())?;
    let mut image = layout.header().to_vec();
    tensors.iter().for_each(|(_, t)| image.extend_from_slice(t.data()));
    Ok((layout, image))
}

fn manifest(layout: &Layout) -> Manifest {
    Manifest {
        kind: Kind::Full,
        chunk_bytes: 1 << 20,
        image_bytes: layout.image_bytes(),
        tensors: layout.tensors().to_vec(),
        chunk_hashes: Vec::new(),
    }
}

const SHARES: [(&str, f64); 2] = [("0.2%", 0.002), ("0.9%", 0.009)];
const ROUNDS: usize = 5;
const SETS: usize = 3;

/// Seconds of one copy, one encoding and one application of the same image.
struct Round {
    copy: f64,
    encode: f64,
    apply: f64,
}

/// Measures figure D on an image of `bytes`, with one thread.
pub fn figure_d(bytes: u64) -> anyhow::Result<Vec<Figure>> {
    let figures: anyhow::Result<Vec<[Figure; 2]>> =
        SHARES.iter().map(|(name, share)| speeds(bytes, name, *share)).collect();
    Ok(figures?.into_iter().flatten().collect())
}

fn speeds(bytes: u64, name: &str, share: f64) -> anyhow::Result<[Figure; 2]> {
    progress::line(&format!("figure D: {name} of {} MiB changed", bytes >> 20));
    let mut model = Model::new(bytes, 4);
    let (layout, base) = of_model(&model)?;
    let density = model.step(share, 5);
    let (_, new) = of_model(&model)?;
    let manifest = manifest(&layout);
    let blob = delta::encode(&manifest, &base, &new, 1, &|_, _| true).context("given up")?;
    let mut out = base.clone();
    let mut sets = Vec::new();
    for _ in 0..SETS {
        let round = |_| round(&manifest, (&base, &new), &blob, &mut out);
        sets.push((0..ROUNDS).map(round).collect::<anyhow::Result<Vec<Round>>>()?);
    }
    let exact = out == new;
    let figure = |id: &str, goal, of: fn(&Round) -> f64| {
        // Each set within a moment of the machine; the best one is where it was left alone.
        let of_set =
            |set: &Vec<Round>| median(set.iter().map(|r| r.copy)) / median(set.iter().map(of));
        let shares: Vec<f64> = sets.iter().map(of_set).collect();
        let best = shares.iter().copied().fold(f64::NAN, f64::max);
        let speed =
            |of: fn(&Round) -> f64| bytes as f64 / 1e9 / median(sets.iter().flatten().map(of));
        let detail = json!({
            "bytes": bytes, "density": density, "delta_bytes": blob.len(), "sets": shares,
            "gb_per_s": speed(of), "memcpy_gb_per_s": speed(|r| r.copy), "exact": exact,
            "note": format!("{:.2} % changed", density * 100.0),
        });
        let id = format!("D.{id}.{name}");
        let figure = Figure::at_least(&id, best, goal, "x memcpy", detail);
        if exact { figure } else { figure.spoiled("applying it gave other bytes") }
    };
    Ok([figure("encode", 0.25, |r| r.encode), figure("apply", 0.30, |r| r.apply)])
}

fn round(
    manifest: &Manifest,
    (base, new): (&[u8], &[u8]),
    blob: &[u8],
    out: &mut [u8],
) -> anyhow::Result<Round> {
    let ((), copy) = timed(|| out.copy_from_slice(base));
    let (coded, encode) = timed(|| delta::encode(manifest, base, new, 1, &|_, _| true));
    ensure!(coded.as_deref() == Some(blob), "two encodings of one pair differ");
    let (applied, apply) = timed(|| delta::apply(manifest, blob, base, out));
    applied?;
    Ok(Round { copy, encode, apply })
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let started = Instant::now();
    let out = work();
    (out, started.elapsed().as_secs_f64())
}

fn of_model(model: &Model) -> anyhow::Result<(Layout, Vec<u8>)> {
    let tensors = model.refs();
    let spec = |t: &anabranch_transfer::TensorRef<'_>| TensorSpec {
        name: t.name.to_owned(),
        dtype: t.dtype,
        shape: t.shape.to_vec(),
    };
    let layout = Layout::new(&tensors.iter().map(spec).collect::<Vec<_>>())?;
    let mut image = layout.header().to_vec();
    tensors.iter().for_each(|t| image.extend_from_slice(t.data));
    Ok((layout, image))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entropy_of_steps_is_that_of_their_frequencies_given_the_exponent() {
        let image =
            |values: &[u16]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let one = 0x3F80u16;
        let base = image(&[one, one, one, one, 0, 0x8000]);
        assert_eq!(entropy_bytes(&base, &base), 0.0);
        // Of four equal values two moved: a bit each. The zeros moved by one step each, the other way.
        let new = image(&[one, one, one + 1, one + 1, 0x8000, 0]);
        assert_eq!(entropy_bytes(&base, &new), (4.0 + 2.0) / 8.0);
    }
}
