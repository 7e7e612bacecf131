//! Runs the demo's recipe in one process and prints its curve: `--seed N`, and `--set name=value`
//! to try other settings. `lag=1` makes half of each step's samples with the previous version,
//! `switch=1` changes the version in the middle of every other sample.

use std::time::Instant;

use anabranch_demo::grpo::Rollout;
use anabranch_demo::local::{Answer, Choice, Request, generate};
use anabranch_demo::model::{Model, ModelConfig, Weights};
use anabranch_demo::recipe::Recipe;
use anabranch_demo::rng::mix;
use anabranch_demo::task::{Problem, Strand, Task};
use anabranch_demo::trainer::Trainer;
use anabranch_demo::warmup::warm_up;
use anyhow::{Context, Result, bail};

struct Options {
    seed: u64,
    lag: bool,
    switch: bool,
    quiet: bool,
    held_out: usize,
    layers: usize,
    hidden: usize,
    heads: usize,
    theta: f64,
    micro_batches: usize,
    recipe: Recipe,
}

fn main() -> Result<()> {
    let options = options()?;
    let task = Strand::new(options.seed);
    let mut config = ModelConfig::for_task(&task);
    config.num_hidden_layers = options.layers;
    config.hidden_size = options.hidden;
    config.intermediate_size = options.hidden * 2;
    config.num_attention_heads = options.heads;
    config.rope_theta = options.theta;
    let model = Model::random(config, options.seed)?;
    let parameters = model.parameter_count();
    let clock = cpu_seconds();
    let form_loss = warm_up(&model, &task, &options.recipe.warmup)?;
    let warmup_s = cpu_seconds() - clock;
    let mut trainer = Trainer::new(model, options.recipe.trainer(&task))?;
    let started = (Instant::now(), cpu_seconds());
    let before = exact(&trainer, &task, options.held_out)?;
    let (mut train_s, mut sample_s) = (0.0, 0.0);
    let mut previous = trainer.model().snapshot()?;
    for step in 0..options.recipe.steps {
        let current = trainer.model().snapshot()?;
        let clock = cpu_seconds();
        let rollouts = rollouts(&options, &task, step, &previous, &current)?;
        sample_s += cpu_seconds() - clock;
        let clock = cpu_seconds();
        let per_batch = rollouts.len().div_ceil(options.micro_batches);
        for batch in rollouts.chunks(per_batch) {
            trainer.add_micro_batch(batch)?;
        }
        let stats = trainer.step()?;
        train_s += cpu_seconds() - clock;
        previous = current;
        if !options.quiet && (step % 4 == 3 || step == 0) {
            println!(
                "step {:3} reward {:.3} exact {:.3} entropy {:.2} clip {:.3} kl {:.4} norm {:.2} lr {:.4} greedy {:.3}",
                step + 1,
                stats.batch.mean_reward(),
                stats.batch.exact_share(),
                stats.batch.mean_entropy(),
                stats.batch.clipped_share(),
                stats.batch.mean_kl(),
                stats.update.grad_norm,
                stats.update.lr,
                exact(&trainer, &task, 128)?,
            );
        }
    }
    let after = exact(&trainer, &task, options.held_out)?;
    let steps = options.recipe.steps as f64;
    println!(
        "seed {} params {parameters} exact_before {before:.3} exact_after {after:.3} warmup {warmup_s:.1} s loss {form_loss:.3} train_cpu/step {:.3} sample_cpu/step {:.3} wall {:.1} cpu {:.1}",
        options.seed,
        train_s / steps,
        sample_s / steps,
        started.0.elapsed().as_secs_f64(),
        cpu_seconds() - started.1,
    );
    Ok(())
}

fn rollouts(
    options: &Options,
    task: &dyn Task,
    step: usize,
    previous: &Weights,
    current: &Weights,
) -> Result<Vec<Rollout>> {
    let (prompts, siblings) = (options.recipe.prompts_per_step, options.recipe.group_size);
    let problems: Vec<(u64, Problem)> = (0..prompts)
        .flat_map(|p| {
            let group = (step * prompts + p) as u64;
            std::iter::repeat_n((group, task.train_problem(group)), siblings)
        })
        .collect();
    let fresh = |(i, (group, problem)): (usize, &(u64, Problem))| Request {
        prompt: problem.prompt.clone(),
        kept: Vec::new(),
        kept_logprobs: Vec::new(),
        seed: mix(mix(options.seed, *group), i as u64),
        max_tokens: task.max_answer_tokens(),
    };
    let requests: Vec<Request> = problems.iter().enumerate().map(fresh).collect();
    let answers = if options.lag || options.switch {
        mixed_versions(options, &requests, previous, current)?
    } else {
        generate(current, &requests, Choice::Sampled)?
    };
    let rollout = |((group, problem), answer): ((u64, Problem), Answer)| Rollout {
        score: task.score(&problem, &answer.tokens),
        prompt: problem.prompt,
        tokens: answer.tokens,
        logprobs: answer.logprobs,
        group,
    };
    Ok(problems.into_iter().zip(answers).map(rollout).collect())
}

/// Even samples begin with the previous version, and stay there or change in the middle.
fn mixed_versions(
    options: &Options,
    requests: &[Request],
    previous: &Weights,
    current: &Weights,
) -> Result<Vec<Answer>> {
    let mut early: Vec<Request> = requests.iter().step_by(2).cloned().collect();
    if options.switch {
        early.iter_mut().for_each(|r| r.max_tokens /= 2);
    }
    let mut begun = generate(previous, &early, Choice::Sampled)?.into_iter();
    let mut resumed = requests.to_vec();
    for request in resumed.iter_mut().step_by(2) {
        let answer = begun.next().context("one answer per request")?;
        request.kept = answer.tokens;
        request.kept_logprobs = answer.logprobs;
    }
    if options.lag && !options.switch {
        // Whole answers of the previous version: nothing is left to generate for them.
        for request in resumed.iter_mut().step_by(2) {
            request.max_tokens = request.kept.len();
        }
    }
    Ok(generate(current, &resumed, Choice::Sampled)?)
}

fn exact(trainer: &Trainer, task: &dyn Task, count: usize) -> Result<f64> {
    let problems = task.held_out(count);
    let request = |p: &Problem| Request {
        prompt: p.prompt.clone(),
        kept: Vec::new(),
        kept_logprobs: Vec::new(),
        seed: 0,
        max_tokens: task.max_answer_tokens(),
    };
    let requests: Vec<Request> = problems.iter().map(request).collect();
    let answers = generate(&trainer.model().snapshot()?, &requests, Choice::Greedy)?;
    let right = problems.iter().zip(&answers).filter(|(p, a)| task.score(p, &a.tokens).exact);
    Ok(right.count() as f64 / count as f64)
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks: f64 =
        after_name.split_whitespace().skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum();
    ticks / 100.0
}

fn options() -> Result<Options> {
    let mut options = Options {
        seed: 1,
        lag: false,
        switch: false,
        quiet: false,
        held_out: 256,
        layers: 2,
        hidden: 64,
        heads: 8,
        theta: 10.0,
        micro_batches: 4,
        recipe: Recipe::default(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let value = args.next().with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--seed" => options.seed = value.parse()?,
            "--set" => set(&mut options, &value)?,
            other => bail!("unknown flag {other}; use --seed N and --set name=value"),
        }
    }
    Ok(options)
}

fn set(options: &mut Options, pair: &str) -> Result<()> {
    let (name, value) = pair.split_once('=').context("--set takes name=value")?;
    let recipe = &mut options.recipe;
    match name {
        "lag" => options.lag = value == "1",
        "switch" => options.switch = value == "1",
        "quiet" => options.quiet = value == "1",
        "layers" => options.layers = value.parse()?,
        "hidden" => options.hidden = value.parse()?,
        "heads" => options.heads = value.parse()?,
        "theta" => options.theta = value.parse()?,
        "micro_batches" => options.micro_batches = value.parse()?,
        "warm" => recipe.warmup.steps = value.parse()?,
        "warm_lr" => recipe.warmup.lr = value.parse()?,
        "warm_rows" => recipe.warmup.rows = value.parse()?,
        "steps" => recipe.steps = value.parse()?,
        "prompts" => recipe.prompts_per_step = value.parse()?,
        "group" => recipe.group_size = value.parse()?,
        "lr" => recipe.lr = value.parse()?,
        "rise" => recipe.lr_rise_steps = value.parse()?,
        "fall" => recipe.lr_fall_share = value.parse()?,
        "floor" => recipe.lr_floor = value.parse()?,
        "beta1" => recipe.beta1 = value.parse()?,
        "beta2" => recipe.beta2 = value.parse()?,
        "clip_norm" => recipe.clip_norm = value.parse()?,
        "entropy" => recipe.grpo.entropy_bonus = value.parse()?,
        "outcome" => recipe.grpo.outcome_weight = value.parse()?,
        "process" => recipe.grpo.process_weight = value.parse()?,
        "clip_low" => recipe.grpo.clip_low = value.parse()?,
        "clip_high" => recipe.grpo.clip_high = value.parse()?,
        "rows" => recipe.rows_per_pass = value.parse()?,
        "threads" => recipe.threads = value.parse()?,
        other => bail!("unknown setting {other}"),
    }
    Ok(())
}
