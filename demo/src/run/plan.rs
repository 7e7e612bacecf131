//! The plan of a run, derived from its flags: task, recipe, engines' pace, script. Pure.

use anabranch_trainer::{JobConfig, OnRunning, Roll, Sampling, Staleness, Trajectory};

use super::DemoArgs;
use crate::cluster::EngineFlags;
use crate::grpo::Rollout;
use crate::recipe::Recipe;
use crate::rollouts::Ask;
use crate::script::{Act, Cue, SCRIPT};
use crate::task::Task;

/// The id of the engine on the trainer's own GPU.
pub const COLOCATED: &str = "colocated";

/// The plan of a run, derived from its flags.
pub struct Plan {
    /// Seed of weights, problems and sampling.
    pub seed: u64,
    /// Task that the policy learns.
    pub task: Box<dyn Task>,
    /// Settings of the training.
    pub recipe: Recipe,
    /// True if each step's version is published.
    pub publish: bool,
    /// True if one weight version makes each sample, and training takes the samples in one order.
    pub deterministic: bool,
    /// Settings of every engine.
    pub engines: EngineFlags,
    /// Joins, kills and drains of the run.
    pub cues: Vec<Cue>,
    /// Held-out problems of one evaluation.
    pub held_out: usize,
    /// Share of a step's samples after which the trainer takes its GPU back.
    pub take_back_share: f64,
}

impl Plan {
    /// Derives the plan from the flags.
    pub fn new(args: &DemoArgs, task: Box<dyn Task>, recipe: Recipe) -> Self {
        let steps = args.steps.map_or(recipe.steps, |steps| steps as usize);
        let quiet_script = |cue: &&Cue| !args.deterministic || cue.act == Act::Attach;
        Self {
            seed: args.seed,
            task,
            recipe: Recipe { steps, ..recipe },
            publish: !args.no_publish,
            deterministic: args.deterministic,
            engines: EngineFlags { rate: 30.0, chunk: 1, max_running: 32 },
            cues: SCRIPT.iter().filter(quiet_script).copied().collect(),
            held_out: 256,
            take_back_share: 0.5,
        }
    }

    /// Optimizer steps of the run.
    pub fn steps(&self) -> u64 {
        self.recipe.steps as u64
    }

    /// Number of the job's step after training, for the last evaluation.
    pub fn last_evaluation(&self) -> u64 {
        self.steps() + 1
    }

    /// Settings of the job, as the trainer opens it.
    pub fn job(&self) -> JobConfig {
        let staleness = match self.deterministic {
            true => Staleness::ON_POLICY,
            false => Staleness::bounded(1),
        };
        JobConfig {
            staleness,
            on_running: OnRunning::Continue,
            roll: Roll::AllAtOnce,
            seed: self.seed,
            ..JobConfig::new("demo")
        }
    }

    /// The prompts of a training step.
    pub fn asks(&self, step: u64) -> Vec<Ask> {
        let sampling = Sampling::new(self.task.max_answer_tokens() as u32);
        let ask = |at: u64| Ask {
            key: format!("step{step:04}-{at:05}"),
            prompt: self.task.train_problem(self.problem(step, at)).prompt,
            n: self.recipe.group_size as u32,
            sampling: sampling.clone(),
            pin: None,
        };
        (0..self.recipe.prompts_per_step as u64).map(ask).collect()
    }

    /// Grades a trajectory. `None` if it answers no prompt of `step`.
    pub fn grade(&self, step: u64, trajectory: Trajectory) -> Option<Rollout> {
        let at = trajectory.key.rsplit('-').next()?.parse().ok()?;
        let group = self.problem(step, at);
        let problem = self.task.train_problem(group);
        Some(Rollout {
            score: self.task.score(&problem, &trajectory.tokens),
            prompt: problem.prompt,
            tokens: trajectory.tokens,
            logprobs: trajectory.logprobs,
            group,
        })
    }

    fn problem(&self, step: u64, at: u64) -> u64 {
        (step - 1) * self.recipe.prompts_per_step as u64 + at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::Strand;
    use anabranch_trainer::{Finish, Version};

    fn plan(deterministic: bool) -> Plan {
        let args = DemoArgs { deterministic, steps: Some(9), ..DemoArgs::default() };
        Plan::new(&args, Box::new(Strand::new(1)), Recipe::default())
    }

    fn answer(key: &str, tokens: Vec<u32>) -> Trajectory {
        Trajectory {
            key: key.to_owned(),
            index: 0,
            logprobs: vec![-0.1; tokens.len()],
            tokens,
            spans: Vec::new(),
            columns: Vec::new(),
            finish: Finish::Length,
            attempts: 1,
            meta: Default::default(),
            seed: 0,
            offered_at: Version::default(),
            numerics: Vec::new(),
            discarded_tokens: 0,
        }
    }

    #[test]
    fn what_is_asked_is_what_is_graded() {
        let plan = plan(false);
        let (first, later) = (plan.asks(1), plan.asks(3));
        assert_eq!(first.len(), plan.recipe.prompts_per_step);
        assert!(first.iter().all(|ask| later.iter().all(|other| other.key != ask.key)));
        let ask = &later[5];
        let problem = plan.task.train_problem(plan.problem(3, 5));
        assert_eq!(ask.prompt, problem.prompt);
        let graded = plan.grade(3, answer(&ask.key, problem.expected)).unwrap();
        assert!(graded.score.exact);
        assert_eq!(graded.prompt, ask.prompt);
        assert_eq!(plan.grade(3, answer("no number", vec![1])), None);
    }

    #[test]
    fn the_deterministic_mode_is_on_policy_and_kills_nobody() {
        let plan = plan(true);
        assert!(plan.cues.iter().all(|cue| cue.act == Act::Attach));
        assert_eq!(plan.job().staleness, Staleness::ON_POLICY);
        assert_eq!(plan.steps(), 9);
    }
}
