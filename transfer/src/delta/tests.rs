use anabranch_proto::manifest::{Kind, Manifest};
use proptest::prelude::*;

use super::*;
use crate::image::layout::{Layout, TensorSpec};

fn manifest(tensors: &[(DType, u64)]) -> Manifest {
    let spec = |(ix, (dtype, len)): (usize, &(DType, u64))| TensorSpec {
        name: format!("t{ix}"),
        dtype: *dtype,
        shape: vec![*len],
    };
    let specs: Vec<TensorSpec> = tensors.iter().enumerate().map(spec).collect();
    let layout = Layout::new(&specs).expect("layout");
    Manifest {
        kind: Kind::Full,
        chunk_bytes: 1 << 20,
        image_bytes: layout.image_bytes(),
        tensors: layout.tensors().to_vec(),
        chunk_hashes: Vec::new(),
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 ^ self.0 >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 11
    }

    fn unit(&mut self) -> f64 {
        self.next() as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().max(1e-12).ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

/// Weights with an f32 master, before and after steps of about `step`.
fn trained(len: usize, step: f64, seed: u64) -> (Vec<u8>, Vec<u8>) {
    let mut random = Random(seed);
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for _ in 0..len {
        let master = (random.normal() * 0.02) as f32;
        let moved = master + (random.normal() * step) as f32;
        old.extend_from_slice(&bf16(master).to_le_bytes());
        new.extend_from_slice(&bf16(moved).to_le_bytes());
    }
    (old, new)
}

/// (bytes, bits per changed element, density)
fn measure(step: f64) -> (usize, f64, f64) {
    let len = 1 << 20;
    let m = manifest(&[(DType::BF16, len)]);
    let head = (m.image_bytes - 2 * len) as usize;
    let (old, new) = trained(len as usize, step, 7);
    let image = |data: &[u8]| [vec![0; head].as_slice(), data].concat();
    let (old, new) = (image(&old), image(&new));
    let mut out = vec![0xAA; new.len()];
    let blob = encode(&m, &old, &new, 1, &|_, _| true).expect("encoded");
    apply(&m, &blob, &old, &mut out).expect("applied");
    assert!(out == new, "bit-exact");
    let changed = old.chunks(2).zip(new.chunks(2)).filter(|(a, b)| a != b).count();
    (blob.len(), blob.len() as f64 * 8.0 / changed as f64, changed as f64 / len as f64)
}

#[test]
fn sparse_steps_cost_less_than_a_quarter_of_index_and_value_pairs() {
    for step in [2e-8, 6e-8, 2e-7, 6e-7] {
        let (bytes, bits, density) = measure(step);
        eprintln!("density {:.2}%: {bytes} bytes, {bits:.2} bits per change", density * 100.0);
        assert!(bits <= 0.25 * 48.0, "{bits} bits at {density}");
    }
}

#[test]
fn where_nearly_all_changed_by_a_step_an_element_costs_little_more_than_its_sign() {
    let m = manifest(&[(DType::BF16, 1 << 18)]);
    let mut random = Random(5);
    let old: Vec<u8> = (0..m.image_bytes).map(|at| [0x40, 0x3f][at as usize % 2]).collect();
    let mut new = old.clone();
    for element in new.chunks_exact_mut(2) {
        element[0] = match random.unit() {
            u if u < 0.04 => 0x40,
            u if u < 0.5 => 0x41,
            _ => 0x3f,
        };
    }
    let blob = encode(&m, &old, &new, 1, &|_, _| true).expect("encoded");
    let mut out = vec![0; new.len()];
    apply(&m, &blob, &old, &mut out).expect("applied");
    assert!(out == new);
    let bits = blob.len() as f64 * 8.0 / f64::from(1 << 18);
    assert!(bits < 1.3, "{bits} bits an element; a gap for each change would be one more");
}

#[test]
fn every_dtype_comes_back_bit_by_bit() {
    let tensors: Vec<(DType, u64)> = DType::ALL.into_iter().map(|d| (d, 70_001)).collect();
    let m = manifest(&tensors);
    let mut random = Random(3);
    for density in [0.0, 0.003, 0.3, 1.0] {
        let old: Vec<u8> = (0..m.image_bytes).map(|_| random.next() as u8).collect();
        let mut new = old.clone();
        for byte in &mut new {
            if random.unit() < density {
                *byte = random.next() as u8;
            }
        }
        let blob = encode(&m, &old, &new, 3, &|_, _| true).expect("encoded");
        let mut out = vec![0; new.len()];
        apply(&m, &blob, &old, &mut out).expect("applied");
        assert!(out == new, "at {density}");
        assert!(blob.len() <= new.len() + new.len() / 1000 + 4096, "never much more than raw");
    }
}

#[test]
fn an_unchanged_version_costs_four_bytes_a_block() {
    let m = manifest(&[(DType::BF16, 1 << 20)]);
    let image = vec![1; m.image_bytes as usize];
    let blob = encode(&m, &image, &image, 1, &|_, _| true).expect("encoded");
    assert_eq!(blob.len(), 8 + 4 * 9);
    assert_eq!(encode(&m, &image, &image, 2, &|_, _| false), None);
}

/// Fate of an element.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// The bytes as drawn.
    Any,
    /// A few steps from the old value.
    Near,
    Same,
}

/// An image with the tensors of `m`, and one that differs from it at `density` as `fate` says.
fn pair(m: &Manifest, seed: u64, density: f64, fate: Fate) -> (Vec<u8>, Vec<u8>) {
    let mut random = Random(seed);
    let old: Vec<u8> = (0..m.image_bytes).map(|_| random.next() as u8).collect();
    let mut new = old.clone();
    for t in &m.tensors {
        let tensor = &mut new[t.offset as usize..(t.offset + t.len) as usize];
        for element in tensor.chunks_mut(t.dtype.bytes()) {
            if random.unit() >= density {
                continue;
            }
            match fate {
                Fate::Any => element.iter_mut().for_each(|b| *b = random.next() as u8),
                Fate::Near => {
                    element[0] = element[0].wrapping_add(random.next() as u8 % 5).wrapping_sub(2)
                }
                Fate::Same => {}
            }
        }
    }
    (old, new)
}

/// Newest first.
fn chained(deltas: &[(Root, &Vec<u8>)]) -> Vec<u8> {
    let link = |(base, blob): &(Root, &Vec<u8>)| {
        [&chain::head(*base, blob.len() as u64)[..], blob.as_slice()].concat()
    };
    deltas.iter().flat_map(link).collect()
}

fn apply_chain(m: &Manifest, from: Root, bytes: &[u8], base: &[u8]) -> Result<Vec<u8>, DeltaError> {
    let read = |r: Range<u64>| bytes.get(r.start as usize..r.end as usize).map(<[u8]>::to_vec);
    let chain = chain::Chain::parse(m, from, bytes.len() as u64, &mut { read })?;
    let mut out = vec![0x33; base.len()];
    let mut workspace = Workspace::default();
    for at in 0..chain.block_count() {
        let range = chain.range(at).start as usize..chain.range(at).end as usize;
        let (mut old, block) = (Some(&base[range.clone()]), &mut out[range]);
        for payload in chain.payloads(at) {
            let payload = &bytes[payload.start as usize..payload.end as usize];
            chain.apply_payload(at, payload, old.take(), block, &mut workspace)?;
        }
    }
    Ok(out)
}

#[test]
fn a_chain_leads_from_any_of_its_bases_and_from_no_other() {
    let m = manifest(&[(DType::BF16, 200_000), (DType::U8, 77)]);
    let root = |n: u8| Root([n; 32]);
    let (mut versions, mut deltas) = (Vec::new(), Vec::new());
    let (mut now, _) = pair(&m, 1, 0.0, Fate::Same);
    for step in 0..4u64 {
        versions.push(now.clone());
        let mut random = Random(step + 9);
        for byte in &mut now {
            *byte ^= if random.next().is_multiple_of(300) { 3 } else { 0 };
        }
        let base = versions.last().expect("pushed");
        deltas
            .insert(0, (root(step as u8), encode(&m, base, &now, 1, &|_, _| true).expect("coded")));
    }
    let all: Vec<(Root, &Vec<u8>)> = deltas.iter().map(|(r, d)| (*r, d)).collect();
    let whole = chained(&all);
    for behind in 1..=4 {
        let from = 4 - behind;
        let part = &whole[..chained(&all[..behind]).len()];
        let led = apply_chain(&m, root(from as u8), part, &versions[from]).expect("applied");
        assert!(led == now, "{behind} versions behind");
        let other = apply_chain(&m, root(99), part, &versions[from]);
        assert_eq!(other, Err(DeltaError::Base { from: root(from as u8), base: root(99) }));
        for cut in [0, 1, 39, 41, part.len() / 2, part.len() - 1] {
            let cut = apply_chain(&m, root(from as u8), &part[..cut], &versions[from]);
            assert!(cut.is_err(), "cut off");
        }
    }
    let endless = chain::head(root(0), 0).repeat(1000);
    assert!(apply_chain(&m, root(0), &endless, &now).is_err());
}

fn images() -> impl Strategy<Value = (Manifest, Vec<u8>, Vec<u8>)> {
    let dtype = proptest::sample::select(DType::ALL.to_vec());
    let tensors = proptest::collection::vec((dtype, 1u64..700), 1..6);
    let fate = prop_oneof![Just(Fate::Any), Just(Fate::Near), Just(Fate::Same)];
    (tensors, any::<u64>(), 0.0..1.0f64, fate).prop_map(|(tensors, seed, density, fate)| {
        let m = manifest(&tensors);
        // Squared: sparse changes are the usual case.
        let (old, new) = pair(&m, seed, density * density, fate);
        (m, old, new)
    })
}

proptest! {
    #[test]
    fn any_two_images_of_any_kinds_come_back((m, old, new) in images(), threads in 1usize..3) {
        let blob = encode(&m, &old, &new, threads, &|_, _| true).expect("encoded");
        let mut out = vec![0x55; new.len()];
        apply(&m, &blob, &old, &mut out).expect("applied");
        prop_assert!(out == new);
        let chain = chained(&[(Root([1; 32]), &blob)]);
        let in_place = apply_chain(&m, Root([1; 32]), &chain, &old).expect("applied");
        prop_assert!(in_place == new);
    }

    #[test]
    fn a_delta_that_is_cut_or_has_more_behind_it_is_an_error(
        (m, old, new) in images(),
        cut in any::<prop::sample::Index>(),
        more in proptest::collection::vec(any::<u8>(), 1..20),
    ) {
        let blob = encode(&m, &old, &new, 1, &|_, _| true).expect("encoded");
        let mut out = vec![0; new.len()];
        prop_assert!(apply(&m, &blob[..cut.index(blob.len())], &old, &mut out).is_err());
        prop_assert!(apply(&m, &[blob, more].concat(), &old, &mut out).is_err());
    }

    #[test]
    fn a_block_of_any_bytes_never_panics_and_a_longer_one_is_an_error(
        kind in proptest::sample::select(DType::ALL.to_vec()),
        payload: Vec<u8>,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let old: Vec<u8> = (0..130 * kind.bytes()).map(|_| random.next() as u8).collect();
        let spec = BlockSpec { range: 0..old.len(), dtype: kind };
        let (mut out, mut workspace) = (old.clone(), Workspace::default());
        let coded = [&[CHANGES], payload.as_slice()].concat();
        let applied = apply_block(7, &spec, &coded, Some(&old), &mut out, &mut workspace);
        if applied.is_ok() {
            let longer = [coded.as_slice(), &[0]].concat();
            let applied = apply_block(7, &spec, &longer, Some(&old), &mut out, &mut workspace);
            prop_assert_eq!(applied, Err(DeltaError::Block(7)));
        }
    }

    #[test]
    fn every_processor_writes_the_same_bytes(
        seed: u64, len in 1u64..1000, density in 0.0..0.2f64,
    ) {
        use super::cpu::Any;
        let m = manifest(&[(DType::BF16, len)]);
        let (old, new) = pair(&m, seed, density, Fate::Near);
        let mut scratch = Scratch::default();
        let (mut plain, mut best) = (Vec::new(), Vec::new());
        let changed =
            block::encode::<Any, super::element::Bf16>(1, &old, &new, &mut scratch, &mut plain);
        let also = cpu::encode(DType::BF16, 1, &old, &new, &mut scratch, &mut best);
        prop_assert_eq!((changed, plain), (also, best));
    }

    #[test]
    fn damaged_deltas_never_panic(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let m = manifest(&[(DType::BF16, 3000), (DType::F32, 100), (DType::U8, 100)]);
        let mut random = Random(5);
        let old: Vec<u8> = (0..m.image_bytes).map(|_| random.next() as u8).collect();
        let mut new = old.clone();
        for at in (0..new.len()).step_by(37) { new[at] ^= 1; }
        let mut blob = encode(&m, &old, &new, 1, &|_, _| true).expect("encoded");
        for (at, value) in damage {
            let at = at.index(blob.len());
            blob[at] = value;
        }
        if cut.index(3) == 0 {
            blob.truncate(cut.index(blob.len()));
        }
        let mut out = vec![0; new.len()];
        let _ = apply(&m, &blob, &old, &mut out);
    }
}
