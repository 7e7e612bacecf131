use super::*;
use crate::task::Strand;

fn model(seed: u64) -> Model {
    Model::random(ModelConfig::for_task(&Strand::new(1)), seed).unwrap()
}

#[test]
fn a_saved_model_loads_with_the_same_bytes_and_hugging_face_names() {
    let dir = tempfile::tempdir().unwrap();
    let saved = model(4);
    saved.save(dir.path()).unwrap();
    let loaded = Model::load(dir.path()).unwrap();
    assert_eq!(loaded.config, saved.config);
    assert_eq!(loaded.tensors().unwrap(), saved.tensors().unwrap());
    let names: Vec<String> = saved.tensors().unwrap().into_iter().map(|t| t.name).collect();
    assert!(names.contains(&"model.layers.1.self_attn.q_proj.weight".to_owned()));
    let down = saved.tensors().unwrap();
    let down = down.iter().find(|t| t.name.ends_with("0.mlp.down_proj.weight")).unwrap();
    assert_eq!(down.shape, [64, 128], "on disk it is [out, in]");
}

#[test]
fn a_checkpoint_of_another_shape_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    model(4).save(dir.path()).unwrap();
    let path = dir.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"intermediate_size\": 128", "\"intermediate_size\": 96"))
        .unwrap();
    let error = Model::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("mlp.gate_proj.weight") && error.contains("[96, 64]"), "{error}");
}

#[test]
fn the_seed_alone_decides_the_weights_and_snapshots_stand_still() {
    let (one, same, other) = (model(1), model(1), model(2));
    assert_eq!(one.tensors().unwrap(), same.tensors().unwrap());
    assert_ne!(one.tensors().unwrap(), other.tensors().unwrap());
    let snapshot = one.snapshot().unwrap();
    let norm = |weights: &Weights| {
        weights.head.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
    };
    let before = norm(&snapshot);
    let head = &one.parameters.last().unwrap().var;
    head.set(&head.zeros_like().unwrap()).unwrap();
    assert_eq!(norm(&snapshot), before);
    assert_eq!(norm(&one.live()), 0.0);
}

#[test]
fn padding_on_the_right_does_not_change_what_stands_before_it() {
    let weights = model(1).snapshot().unwrap();
    let rows = Tensor::new(&[3u32], &Device::Cpu).unwrap();
    let logits = |ids: Vec<u32>| {
        let len = ids.len();
        let ids = id_tensor(ids, len).unwrap();
        weights.logits_at(&ids, &rows).unwrap().to_vec2::<f32>().unwrap()
    };
    let (short, padded) = (logits(vec![1, 4, 5, 6]), logits(vec![1, 4, 5, 6, 0, 0, 0]));
    for (a, b) in short[0].iter().zip(&padded[0]) {
        assert!((a - b).abs() < 1e-5);
    }
}
