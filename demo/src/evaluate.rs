//! Held-out greedy exact match, through the fleet: what the engines answer at one version, not what
//! the trainer's own copy would.

use anabranch_trainer::{Sampling, Version};

use crate::rollouts::{Ask, RolloutError, Rollouts};
use crate::task::{Problem, Task};

/// Share of the first `count` held-out problems that are answered exactly at `version`. Takes one whole step of the
/// job.
pub async fn exact_match(
    rollouts: &mut Rollouts,
    task: &dyn Task,
    (step, count): (u64, usize),
    version: Version,
) -> Result<f64, RolloutError> {
    let problems = task.held_out(count);
    let max_tokens = task.max_answer_tokens() as u32;
    let ask = |(i, problem): (usize, &Problem)| Ask {
        key: key(step, i),
        prompt: problem.prompt.clone(),
        n: 1,
        sampling: Sampling::greedy(max_tokens),
        pin: Some(version),
    };
    rollouts.submit(step, problems.iter().enumerate().map(ask).collect()).await?;
    let mut exact = 0;
    while let Some(batch) = rollouts.next(step).await? {
        for trajectory in batch {
            let at = trajectory.key.rsplit('-').next().and_then(|i| i.parse::<usize>().ok());
            let problem = at.and_then(|at| problems.get(at));
            exact += usize::from(problem.is_some_and(|p| task.score(p, &trajectory.tokens).exact));
        }
    }
    rollouts.commit(step, version).await?;
    Ok(exact as f64 / problems.len().max(1) as f64)
}

fn key(step: u64, problem: usize) -> String {
    format!("eval{step:04}-{problem:05}")
}
