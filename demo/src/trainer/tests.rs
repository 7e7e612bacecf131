use super::*;
use crate::local::{Choice, Request, generate};
use crate::model::ModelConfig;
use crate::recipe::Recipe;
use crate::rng::mix;
use crate::task::{Strand, Task};
use crate::warmup::warm_up;

fn small() -> Recipe {
    Recipe { prompts_per_step: 4, group_size: 4, rows_per_pass: 4, ..Recipe::default() }
}

fn trainer(recipe: &Recipe) -> (Strand, Trainer) {
    let task = Strand::new(1);
    let model = Model::random(ModelConfig::for_task(&task), 1).unwrap();
    let trainer = Trainer::new(model, recipe.trainer(&task)).unwrap();
    (task, trainer)
}

fn rollouts(task: &Strand, recipe: &Recipe, weights: &Weights, step: usize) -> Vec<Rollout> {
    let first = step * recipe.samples_per_step();
    let groups = (first..first + recipe.samples_per_step()).map(|i| {
        let group = (i / recipe.group_size) as u64;
        (group, mix(9, i as u64), task.train_problem(group))
    });
    let groups: Vec<_> = groups.collect();
    let requests: Vec<Request> = groups
        .iter()
        .map(|(_, seed, problem)| Request {
            prompt: problem.prompt.clone(),
            kept: Vec::new(),
            kept_logprobs: Vec::new(),
            seed: *seed,
            max_tokens: task.max_answer_tokens(),
        })
        .collect();
    let answers = generate(weights, &requests, Choice::Sampled).unwrap();
    let rollout = |((group, _, problem), answer): ((u64, u64, _), crate::local::Answer)| Rollout {
        score: task.score(&problem, &answer.tokens),
        prompt: problem.prompt,
        tokens: answer.tokens,
        logprobs: answer.logprobs,
        group,
    };
    groups.into_iter().zip(answers).map(rollout).collect()
}

/// Version 1 after one step over the same samples, `batch` of them at a time.
fn after_one_step(recipe: &Recipe, batch: usize) -> (StepStats, Vec<NamedTensor>) {
    let (task, mut trainer) = trainer(recipe);
    let weights = trainer.model().snapshot().unwrap();
    for part in rollouts(&task, recipe, &weights, 0).chunks(batch) {
        trainer.add_micro_batch(part).unwrap();
    }
    (trainer.step().unwrap(), trainer.tensors().unwrap())
}

fn values(tensor: &NamedTensor) -> impl Iterator<Item = f32> + '_ {
    tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()))
}

#[test]
fn the_split_into_micro_batches_does_not_change_the_gradient() {
    let recipe = small();
    let gradients = |batch: usize, rows_per_pass: usize| {
        let recipe = Recipe { rows_per_pass, ..recipe };
        let (task, mut trainer) = trainer(&recipe);
        let weights = trainer.model().snapshot().unwrap();
        for part in rollouts(&task, &recipe, &weights, 0).chunks(batch) {
            trainer.add_micro_batch(part).unwrap();
        }
        let flat = |t: &Option<Tensor>| {
            t.as_ref().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        trainer.gradients.sums().iter().flat_map(flat).collect::<Vec<f32>>()
    };
    let whole = gradients(16, 16);
    let scale = whole.iter().fold(0.0f32, |m, g| m.max(g.abs()));
    assert!(scale > 1e-4);
    for (batch, rows) in [(4, 4), (8, 3), (12, 5)] {
        let worst = gradients(batch, rows)
            .iter()
            .zip(&whole)
            .fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst < 1e-5 * scale.max(1.0), "batch {batch}, rows {rows}: {worst} of {scale}");
    }
}

#[test]
fn the_same_seed_makes_the_same_bytes_whatever_the_number_of_threads() {
    let one = after_one_step(&small(), 8);
    assert_eq!(one, after_one_step(&small(), 8));
    assert_eq!(one, after_one_step(&Recipe { threads: 3, ..small() }, 8));
}

#[test]
fn a_step_makes_a_new_version_and_begins_a_new_sum() {
    let (task, mut trainer) = trainer(&small());
    let before = trainer.tensors().unwrap();
    let weights = trainer.model().snapshot().unwrap();
    let samples = rollouts(&task, &small(), &weights, 0);
    let first = trainer.add_micro_batch(&samples[..8]).unwrap();
    let second = trainer.add_micro_batch(&samples[8..]).unwrap();
    let stats = trainer.step().unwrap();
    assert_eq!((stats.version, stats.batch.samples, stats.batch.micro_batches), (1, 16, 2));
    assert_eq!(stats.batch.pass.tokens, first.pass.tokens + second.pass.tokens);
    let after = trainer.tensors().unwrap();
    let moved = |(a, b): (&NamedTensor, &NamedTensor)| {
        assert_eq!((&a.name, &a.shape), (&b.name, &b.shape));
        values(a).zip(values(b)).any(|(a, b)| a != b)
    };
    assert!(before.iter().zip(&after).all(moved), "every parameter has a gradient");
    assert_eq!(trainer.step().unwrap().batch, BatchStats::default());
}

#[test]
fn an_answer_without_tokens_is_counted_and_carries_nothing() {
    let (task, mut trainer) = trainer(&small());
    let weights = trainer.model().snapshot().unwrap();
    let mut samples = rollouts(&task, &small(), &weights, 0);
    samples[0].tokens.clear();
    samples[0].logprobs.clear();
    samples[0].score.per_token.clear();
    let stats = trainer.add_micro_batch(&samples).unwrap();
    assert_eq!(stats.samples, 16);
    trainer.step().unwrap();
}

#[test]
fn a_few_steps_of_the_recipe_raise_the_reward() {
    let recipe = Recipe::default();
    let task = Strand::new(1);
    let model = Model::random(ModelConfig::for_task(&task), 1).unwrap();
    warm_up(&model, &task, &recipe.warmup).unwrap();
    let mut trainer = Trainer::new(model, recipe.trainer(&task)).unwrap();
    let mut rewards = Vec::new();
    for step in 0..8 {
        let weights = trainer.model().snapshot().unwrap();
        trainer.add_micro_batch(&rollouts(&task, &recipe, &weights, step)).unwrap();
        rewards.push(trainer.step().unwrap().batch.mean_reward());
    }
    assert!(rewards[0] < 0.3, "{rewards:?}");
    assert!(rewards[7] > rewards[0] + 0.12, "{rewards:?}");
}
