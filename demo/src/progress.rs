//! The display of a running demo: a few live lines on a terminal, plain lines elsewhere. Owns the drawing, not the
//! meaning of the numbers.

use std::fmt::Write;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anabranch_runtime::Drain;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::Phase;
use crate::watch::{EngineStory, Story, Watcher};

const REDRAW: Duration = Duration::from_millis(200);
/// Time over which tokens per second are averaged.
const WINDOW: Duration = Duration::from_secs(4);
const SPARKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const SPARK_WIDTH: usize = 30;

/// Figures that the run knows and the manager's story does not.
#[derive(Debug, Clone, Default)]
pub struct Numbers {
    /// Step in progress, from 1.
    pub step: u64,
    /// Current activity of the run, in words.
    pub doing: String,
    /// Mean reward of each finished step.
    pub rewards: Vec<f64>,
    /// Tokens received so far.
    pub tokens: u64,
    /// Times that a sample moved to another engine.
    pub migrations: u64,
}

/// The screen output of the run. Clones draw on the same lines.
#[derive(Clone)]
pub struct View {
    lines: Option<Lines>,
    numbers: Arc<Mutex<Numbers>>,
}

#[derive(Clone)]
struct Lines {
    all: MultiProgress,
    steps: ProgressBar,
    work: ProgressBar,
    fleet: ProgressBar,
}

/// Tokens over time, for the last `WINDOW`.
struct Rate {
    marks: std::collections::VecDeque<(Instant, u64)>,
}

impl View {
    /// Makes the output for a run of `steps` steps, on stderr. `quiet` shows nothing at all.
    pub fn new(steps: u64, quiet: bool) -> Self {
        let live = !quiet && std::io::stderr().is_terminal();
        let lines = match (quiet, live) {
            (true, _) => Some(Lines::new(steps, ProgressDrawTarget::hidden())),
            (false, true) => Some(Lines::new(steps, ProgressDrawTarget::stderr())),
            (false, false) => None,
        };
        Self { lines, numbers: Arc::default() }
    }

    /// Redraws the live lines until the run ends; without a terminal, does nothing.
    pub fn follow(&self, watcher: Watcher, drain: &Drain) {
        let Some(lines) = self.lines.clone() else { return };
        let (numbers, stop) = (self.numbers.clone(), drain.clone());
        drain.spawn("live view", async move {
            let mut rate = Rate::new();
            let mut every = tokio::time::interval(REDRAW);
            loop {
                tokio::select! {
                    _ = every.tick() => {}
                    () = stop.cancelled() => return,
                }
                let numbers = lock(&numbers).clone();
                let tokens_per_s = rate.mark(Instant::now(), numbers.tokens);
                lines.draw(&numbers, tokens_per_s, &watcher.with(fleet));
            }
        });
    }

    /// Changes the figures of the live lines.
    pub fn update(&self, change: impl FnOnce(&mut Numbers)) {
        change(&mut lock(&self.numbers));
    }

    /// Prints a line that stays.
    pub fn say(&self, line: &str) {
        match &self.lines {
            // A terminal that went away cannot be told so.
            Some(lines) => drop(lines.all.println(line)),
            None => eprintln!("{line}"),
        }
    }

    /// Prints a line that stays, unless live lines tell the same.
    pub fn say_plain(&self, line: &str) {
        if self.lines.is_none() {
            eprintln!("{line}");
        }
    }

    /// Takes the live lines away.
    pub fn finish(&self) {
        if let Some(lines) = &self.lines {
            for bar in [&lines.steps, &lines.work, &lines.fleet] {
                bar.finish_and_clear();
            }
        }
    }
}

impl Lines {
    fn new(steps: u64, target: ProgressDrawTarget) -> Self {
        let all = MultiProgress::with_draw_target(target);
        let style = |template: &str| {
            ProgressStyle::with_template(template).expect("the templates here are valid")
        };
        let bar = |length: u64, template: &str| {
            let bar = all.add(ProgressBar::new(length));
            bar.set_style(style(template).progress_chars("━╸─"));
            bar
        };
        let steps = bar(steps, "step {pos}/{len} {bar:24} {elapsed}  {msg}");
        let (work, fleet) = (bar(0, "  {wide_msg}"), bar(0, "  {wide_msg}"));
        Self { all, steps, work, fleet }
    }

    fn draw(&self, numbers: &Numbers, tokens_per_s: f64, fleet: &str) {
        self.steps.set_position(numbers.step);
        self.steps.set_message(numbers.doing.clone());
        let reward = numbers.rewards.last().copied().unwrap_or(0.0);
        self.work.set_message(format!(
            "reward {reward:.3} {}  {tokens_per_s:.0} tokens/s  {} migrations",
            sparkline(&numbers.rewards),
            numbers.migrations,
        ));
        self.fleet.set_message(fleet.to_owned());
    }
}

/// The engines in one line, such as "engine-1 v7 · engine-2 loads v8 · colocated trains".
pub fn fleet(story: &Story) -> String {
    let mut text = String::new();
    for (id, engine) in story.engines.iter().filter(|(_, engine)| engine.left.is_none()) {
        if !text.is_empty() {
            text.push_str(" · ");
        }
        write!(text, "{id} {}", phase(engine)).expect("a String takes everything");
    }
    text
}

fn phase(engine: &EngineStory) -> String {
    match engine.phase() {
        Some(Phase::Serving { version }) => format!("v{version}"),
        Some(Phase::Loading { version }) => format!("loads v{version}"),
        Some(Phase::Released) => "trains".to_owned(),
        Some(Phase::Suspect) => "is silent".to_owned(),
        Some(Phase::Draining) => "drains".to_owned(),
        Some(Phase::Joining) | None => "joins".to_owned(),
    }
}

/// The last rewards, between 0 and 1, as a line of bars.
fn sparkline(rewards: &[f64]) -> String {
    let shown = &rewards[rewards.len().saturating_sub(SPARK_WIDTH)..];
    let top = (SPARKS.len() - 1) as f64;
    shown.iter().map(|r| SPARKS[(r.clamp(0.0, 1.0) * top).round() as usize]).collect()
}

fn lock(numbers: &Mutex<Numbers>) -> MutexGuard<'_, Numbers> {
    numbers.lock().expect("no code panics while it holds this lock")
}

impl Rate {
    fn new() -> Self {
        Self { marks: std::collections::VecDeque::new() }
    }

    fn mark(&mut self, now: Instant, tokens: u64) -> f64 {
        self.marks.push_back((now, tokens));
        while self.marks.len() > 2 && now.duration_since(self.marks[0].0) > WINDOW {
            self.marks.pop_front();
        }
        let (since, first) = self.marks[0];
        (tokens - first) as f64 / now.duration_since(since).as_secs_f64().max(1e-3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_of_the_window() {
        let mut rate = Rate::new();
        let start = Instant::now();
        rate.mark(start, 0);
        assert!((rate.mark(start + Duration::from_secs(2), 200) - 100.0).abs() < 1e-9);
        rate.mark(start + Duration::from_secs(4), 200);
        assert!((rate.mark(start + Duration::from_secs(6), 200) - 0.0).abs() < 1e-9);
    }

    #[test]
    fn a_sparkline_keeps_the_newest_and_stays_in_range() {
        assert_eq!(sparkline(&[0.0, 0.5, 1.0, 7.0]), "▁▅██");
        assert_eq!(sparkline(&[0.1; 99]).chars().count(), SPARK_WIDTH);
    }
}
