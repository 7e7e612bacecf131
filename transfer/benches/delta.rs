//! Encoding and applying a delta on one core, beside the copy of the same bytes.
//! `cargo bench -p anabranch-transfer --bench delta`

use anabranch_proto::manifest::{DType, Kind, Manifest, Tensor};
use anabranch_transfer::delta;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const ELEMENTS: usize = 32 << 20;

fn speed(c: &mut Criterion) {
    let manifest = manifest();
    let mut group = c.benchmark_group("delta");
    group.sample_size(10).throughput(Throughput::Bytes(manifest.image_bytes));
    for per_mille in [2, 10] {
        let (old, new) = images(per_mille);
        let mut out = old.clone();
        let blob = delta::encode(&manifest, &old, &new, 1, &|_, _| true).expect("not given up");
        let name = |what| format!("{what}/{per_mille}_per_mille");
        group.bench_function(name("memcpy"), |b| b.iter(|| out.copy_from_slice(&old)));
        group.bench_function(name("encode"), |b| {
            b.iter(|| delta::encode(&manifest, &old, &new, 1, &|_, _| true));
        });
        group.bench_function(name("apply"), |b| {
            b.iter(|| delta::apply(&manifest, &blob, &old, &mut out).expect("its own delta"));
        });
        assert!(out == new, "bit by bit");
    }
    group.finish();
}

fn manifest() -> Manifest {
    let len = 2 * ELEMENTS as u64;
    let (name, shape) = ("w".to_owned(), vec![ELEMENTS as u64]);
    let tensor = Tensor { name, dtype: DType::BF16, shape, offset: 0, len };
    Manifest {
        kind: Kind::Full,
        chunk_bytes: 1 << 20,
        image_bytes: len,
        tensors: vec![tensor],
        chunk_hashes: Vec::new(),
    }
}

/// Weights whose exponents are spread as those of a normal distribution; the smaller an element, the
/// likelier it moved, by one step of bf16.
fn images(per_mille: u64) -> (Vec<u8>, Vec<u8>) {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    };
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for _ in 0..ELEMENTS {
        let below = u64::from(random().trailing_zeros().min(20));
        let bits = ((122 - below) << 7 | random() & 0x807F) as u16;
        // Each binade has half the elements of the one above, and they move twice as often.
        let moved = random() % 10_000 < (per_mille * 16) << below >> 4;
        old.extend_from_slice(&bits.to_le_bytes());
        new.extend_from_slice(&bits.wrapping_add(u16::from(moved)).to_le_bytes());
    }
    (old, new)
}

criterion_group!(benches, speed);
criterion_main!(benches);
