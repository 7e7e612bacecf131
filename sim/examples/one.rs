fn main() {
    let seed = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    match anabranch_sim::run(anabranch_sim::Scenario::of_seed(seed)) {
        Ok(outcome) => println!("{outcome:?}"),
        Err(failure) => println!("{}\n{}", failure.story.join("\n"), failure.what),
    }
}
