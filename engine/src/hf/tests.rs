use serde_json::Value;

use super::decoder::apply;
use super::load::Linear;
use super::*;

fn testdata(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn open(name: &str) -> Hf {
    let dir = testdata(name);
    let config =
        EngineConfig::new(crate::ModelSpec::Hf(dir.clone()), "127.0.0.1:0".parse().unwrap());
    Hf::open(&dir, &config).unwrap().0
}

fn sampling(temperature: f32, seed: u64) -> Arc<Sampling> {
    Arc::new(Sampling {
        max_new_tokens: 100,
        min_new_tokens: 0,
        temperature,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        stop_token_ids: vec![],
        ignore_eos: true,
        seed: Some(seed),
    })
}

/// Runs sequences together until each has `count` tokens, as the scheduler would.
fn generate(
    model: &mut Hf,
    prompts: &[(Vec<u32>, Arc<Sampling>)],
    count: usize,
) -> Vec<Vec<(u32, u32)>> {
    let mut kvs: Vec<HfKv> =
        prompts.iter().map(|(p, s)| model.prefill(s, &p[..p.len() - 1]).unwrap()).collect();
    let mut last: Vec<u32> = prompts.iter().map(|(p, _)| *p.last().unwrap()).collect();
    let mut out = vec![Vec::new(); prompts.len()];
    for _ in 0..count {
        let mut made = Vec::new();
        let mut lanes: Vec<_> =
            kvs.iter_mut().zip(&last).map(|(kv, &last)| Lane { kv, last, may_end: true }).collect();
        model.decode(&mut lanes, &mut made).unwrap();
        for (i, made) in made.iter().enumerate() {
            last[i] = made.token;
            out[i].push((made.token, made.logprob.to_bits()));
        }
    }
    out
}

fn prompt(seed: u64, len: usize) -> Vec<u32> {
    (0..len as u64).map(|i| ((seed * 7919 + i * i * 31 + 5) % 128) as u32).collect()
}

#[test]
fn greedy_tokens_and_log_probabilities_are_hugging_faces() {
    for name in ["qwen2", "llama", "qwen3"] {
        let reference: Value =
            serde_json::from_slice(&std::fs::read(testdata(name).join("reference.json")).unwrap())
                .unwrap();
        let mut model = open(name);
        let mut worst = 0.0f32;
        for case in reference["greedy"].as_array().unwrap() {
            let ids =
                |key: &str| -> Vec<u32> { serde_json::from_value(case[key].clone()).unwrap() };
            let want: Vec<f32> = serde_json::from_value(case["logprobs"].clone()).unwrap();
            let got =
                generate(&mut model, &[(ids("prompt"), sampling(0.0, 0))], want.len()).remove(0);
            assert_eq!(got.iter().map(|made| made.0).collect::<Vec<_>>(), ids("ids"), "{name}");
            for (made, want) in got.iter().zip(&want) {
                worst = worst.max((f32::from_bits(made.1) - want).abs());
            }
        }
        assert!(worst < 1e-4, "{name}: {worst}");
        println!("{name}: worst difference of a log-probability {worst:e}");
    }
}

#[test]
fn a_resume_from_any_cut_takes_the_same_path_to_the_bit() {
    for name in ["qwen2", "llama", "qwen3"] {
        let mut model = open(name);
        for temperature in [0.0, 1.0, 0.7] {
            let sampling = sampling(temperature, 11);
            let start = prompt(3, 9);
            let whole = generate(&mut model, &[(start.clone(), sampling.clone())], 40).remove(0);
            for cut in [1, 2, 7, 19, 39] {
                let mut kept = start.clone();
                kept.extend(whole[..cut].iter().map(|made| made.0));
                let rest = generate(&mut model, &[(kept, sampling.clone())], 40 - cut).remove(0);
                assert_eq!(rest, whole[cut..], "{name}, temperature {temperature}, cut {cut}");
            }
        }
    }
}

#[test]
fn a_ragged_batch_gives_each_sequence_what_it_gets_alone() {
    for name in ["qwen2", "llama", "qwen3"] {
        let mut model = open(name);
        let prompts: Vec<_> = (0..13)
            .map(|i| (prompt(i, 1 + i as usize * 3), sampling((i % 3) as f32 * 0.5, i)))
            .collect();
        let together = generate(&mut model, &prompts, 20);
        for (one, together) in prompts.iter().zip(&together) {
            assert_eq!(&generate(&mut model, std::slice::from_ref(one), 20)[0], together, "{name}");
        }
    }
}

#[test]
fn a_rows_product_does_not_depend_on_its_batch_for_wide_layers_either() {
    for k in [48, 512, 896, 1024, 2048, 4864] {
        let n = 96;
        let noise = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        let weight: Vec<f32> = (0..k * n).map(noise).collect();
        let weight =
            candle_core::Tensor::from_vec(weight, (k, n), &candle_core::Device::Cpu).unwrap();
        let linear = Linear { weight, bias: None, inputs: k, outputs: n };
        let x: Vec<f32> = (0..300 * k).map(|i| noise(i + 17)).collect();
        let all = apply(&linear, &x).unwrap();
        for rows in [1, 2, 3, 7, 33, 64, 256] {
            let some = apply(&linear, &x[..rows * k]).unwrap();
            assert!(some == all[..rows * n], "K {k}, {rows} rows");
        }
    }
}

#[test]
fn ends_are_not_chosen_before_the_minimum() {
    let mut model = open("qwen2");
    let sampling = sampling(0.0, 0);
    let mut kv = model.prefill(&sampling, &[5]).unwrap();
    let mut made = Vec::new();
    model.decode(&mut [Lane { kv: &mut kv, last: 9, may_end: true }], &mut made).unwrap();
    let stop = Arc::new(Sampling { stop_token_ids: vec![made[0].token], ..(*sampling).clone() });
    let mut kv = model.prefill(&stop, &[5]).unwrap();
    model.decode(&mut [Lane { kv: &mut kv, last: 9, may_end: false }], &mut made).unwrap();
    assert_ne!(made[0].token, made[1].token);
}

#[test]
fn checkpoints_that_do_not_fit_are_refused_with_what_is_wrong() {
    let model = open("qwen2");
    let load = model.loader();
    let refusal = |dir: &Path| load(dir).err().expect("refused").to_string();
    let other = refusal(&testdata("llama"));
    assert!(other.contains("tensors are missing") && other.contains("shape [32]"), "{other}");
    let dir = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(testdata("qwen2").join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let write = |keep: &dyn Fn(&str) -> bool, rename: &str| {
        let kept = tensors.iter().filter(|(name, _)| keep(name)).map(|(name, view)| {
            (if name == "model.norm.weight" { rename.to_owned() } else { name.to_owned() }, view)
        });
        safetensors::serialize_to_file(
            kept.collect::<Vec<_>>(),
            None,
            &dir.path().join("m.safetensors"),
        )
        .unwrap();
    };
    write(&|name| name != "lm_head.weight", "model.norm.weight");
    assert!(refusal(dir.path()).contains("1 tensors are missing: lm_head.weight"));
    write(&|_| true, "model.norm.wait");
    let renamed = refusal(dir.path());
    assert!(
        renamed.contains("missing: model.norm.weight")
            && renamed.contains("unknown: model.norm.wait"),
        "{renamed}"
    );
    write(&|_| true, "model.norm.weight");
    assert_eq!(load(dir.path()).unwrap().digest, model.digest());
}
