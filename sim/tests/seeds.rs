//! Seeded worlds. `ANABRANCH_SIM_SEEDS=20000 cargo test --release -p anabranch-sim` runs more of them;
//! `anabranch sim --seed N` runs one and prints its story.

use anabranch_sim::{Scenario, run};

fn seeds() -> u64 {
    std::env::var("ANABRANCH_SIM_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(200)
}

#[test]
fn every_promise_holds_under_faults() {
    let (mut migrations, mut tokens, mut delivered) = (0, 0, 0);
    let mut failures = Vec::new();
    for seed in 0..seeds() {
        match run(Scenario::of_seed(seed)) {
            Ok(outcome) => {
                migrations += outcome.migrations;
                tokens += outcome.checked_tokens;
                delivered += outcome.delivered;
            }
            Err(failure) => failures.push(failure),
        }
    }
    for failure in &failures {
        println!("seed {} at {} ms: {}", failure.seed, failure.at_ms, failure.what);
    }
    if let Some(first) = failures.first() {
        let story = &first.story[first.story.len().saturating_sub(60)..];
        panic!(
            "{} seeds failed; the story of seed {}:\n{}",
            failures.len(),
            first.seed,
            story.join("\n")
        );
    }
    println!("{delivered} trajectories, {tokens} tokens checked, {migrations} migrations");
    assert!(migrations > seeds(), "the faults must really cut samples");
}

#[test]
fn a_world_without_faults_moves_nothing_and_makes_nothing_twice() {
    for seed in 0..40 {
        let mut scenario = Scenario::of_seed(seed).calm();
        scenario.colocated = false;
        scenario.trainer.overlaps = false;
        scenario.trainer.deadlines = 0;
        scenario.on_running = anabranch_manager::event::OnRunning::Continue;
        let outcome =
            run(scenario).unwrap_or_else(|failure| panic!("seed {seed}: {}", failure.what));
        assert_eq!((outcome.migrations, outcome.regenerated_tokens), (0, 0), "seed {seed}");
    }
}

#[test]
fn a_seed_reproduces_exactly() {
    for seed in [3, 17, 99] {
        let twice = [(); 2].map(|()| match run(Scenario::of_seed(seed)) {
            Ok(outcome) => outcome.digest,
            Err(failure) => failure.what,
        });
        assert_eq!(twice[0], twice[1]);
    }
}
