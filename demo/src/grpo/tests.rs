use super::*;
use crate::local::{Choice, Request, generate};
use crate::model::{Model, ModelConfig};
use crate::task::{Strand, Task};

const PROCESS: GrpoConfig = GrpoConfig {
    clip_low: 0.2,
    clip_high: 0.28,
    entropy_bonus: 0.0,
    outcome_weight: 0.0,
    process_weight: 1.0,
};

/// Advantages need only the group, the length and the score.
fn graded(group: u64, per_token: &[f32], reward: f32) -> Rollout {
    let score = Score { per_token: per_token.to_vec(), reward, exact: false };
    let len = per_token.len();
    Rollout { prompt: vec![1], tokens: vec![3; len], logprobs: vec![0.0; len], group, score }
}

/// Real samples of a random policy, two groups of four.
fn sampled(model: &Model, task: &Strand) -> Vec<Rollout> {
    let weights = model.snapshot().unwrap();
    let make = |i: u64| {
        let problem = task.train_problem(i / 4);
        let request = Request {
            prompt: problem.prompt.clone(),
            kept: Vec::new(),
            kept_logprobs: Vec::new(),
            seed: i,
            max_tokens: task.max_answer_tokens(),
        };
        let answer = generate(&weights, &[request], Choice::Sampled).unwrap().remove(0);
        let score = task.score(&problem, &answer.tokens);
        let (tokens, logprobs) = (answer.tokens, answer.logprobs);
        Rollout { prompt: problem.prompt, tokens, logprobs, group: i / 4, score }
    };
    (0..8).map(make).collect()
}

fn model(task: &Strand) -> Model {
    Model::random(ModelConfig::for_task(task), 5).unwrap()
}

#[test]
fn process_advantages_compare_siblings_at_the_same_position() {
    let group = [graded(1, &[1.0, 0.0], 0.5), graded(1, &[0.0], 0.0), graded(1, &[0.0, 1.0], 0.5)];
    let advantages = advantages(&group, &PROCESS);
    assert!((advantages[0][0] - 2.0f32.sqrt()).abs() < 1e-5, "{advantages:?}");
    assert!((advantages[1][0] + 0.5f32.sqrt()).abs() < 1e-5, "{advantages:?}");
    assert_eq!((advantages[0][1], advantages[2][1]), (-1.0, 1.0), "the ended one is not counted");
}

#[test]
fn outcome_advantages_are_the_same_for_each_token_and_stay_within_their_group() {
    let config = GrpoConfig { outcome_weight: 1.0, process_weight: 0.0, ..PROCESS };
    let rollouts = [
        graded(1, &[0.0; 3], 1.0),
        graded(2, &[0.0; 2], 0.3),
        graded(1, &[0.0; 2], 0.0),
        graded(2, &[0.0; 2], 0.3),
    ];
    let advantages = advantages(&rollouts, &config);
    assert_eq!(advantages[0], [1.0; 3]);
    assert_eq!(advantages[2], [-1.0; 2]);
    assert_eq!(advantages[1], [0.0; 2], "equal rewards carry no signal");
}

#[test]
fn on_the_policy_that_sampled_nothing_is_clipped_and_the_divergence_is_nil() {
    let task = Strand::new(1);
    let model = model(&task);
    let rollouts = sampled(&model, &task);
    let advantages = advantages(&rollouts, &PROCESS);
    let (_, stats) = surrogate(&model.live(), &rollouts, &advantages, &PROCESS, 100.0).unwrap();
    assert_eq!(stats.clipped, 0);
    assert_eq!(stats.tokens, rollouts.iter().map(|r| r.tokens.len()).sum::<usize>());
    assert!(stats.kl_sum / (stats.tokens as f64) < 1e-6, "{stats:?}");
}

#[test]
fn a_token_beyond_the_clip_range_gives_no_gradient_in_its_own_direction() {
    let task = Strand::new(1);
    let model = model(&task);
    let mut rollouts = sampled(&model, &task);
    // As if the rollout policy had found every token 1.5 times less likely than this one does.
    rollouts.iter_mut().flat_map(|r| &mut r.logprobs).for_each(|l| *l -= 1.5f32.ln());
    let norm = |advantage: f32| {
        let advantages: Vec<Vec<f32>> =
            rollouts.iter().map(|r| vec![advantage; r.tokens.len()]).collect();
        let (loss, stats) =
            surrogate(&model.live(), &rollouts, &advantages, &PROCESS, 100.0).unwrap();
        assert_eq!(stats.clipped, stats.tokens);
        let head = model.vars().pop().unwrap();
        let gradient = loss.backward().unwrap().remove(&head).unwrap();
        gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
    };
    assert_eq!(norm(1.0), 0.0, "already 1.5 times likelier: no further");
    assert!(norm(-1.0) > 1e-6, "the way back stays open");
}

#[test]
fn the_gradient_agrees_with_finite_differences() {
    let task = Strand::new(1);
    let model = model(&task);
    let config = GrpoConfig { entropy_bonus: 0.05, ..PROCESS };
    let rollouts = sampled(&model, &task);
    let advantages = advantages(&rollouts, &config);
    let loss = || surrogate(&model.live(), &rollouts, &advantages, &config, 10.0).unwrap().0;
    let store = loss().backward().unwrap();
    for parameter in &model.parameters {
        let var = &parameter.var;
        let gradient = store.get(var).unwrap();
        // Along the gradient itself the derivative is its squared norm.
        let expected = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        let (origin, step) = (var.as_detached_tensor().copy().unwrap(), 1e-2 / expected.sqrt());
        let at = |sign: f64| {
            let shift = (gradient * (sign * f64::from(step))).unwrap();
            var.set(&(&origin + shift).unwrap()).unwrap();
            loss().to_scalar::<f32>().unwrap()
        };
        let measured = (at(1.0) - at(-1.0)) / (2.0 * step);
        var.set(&origin).unwrap();
        let error = (measured - expected).abs() / expected;
        assert!(error < 0.05, "{}: {measured} measured, {expected} expected", parameter.name);
    }
}
