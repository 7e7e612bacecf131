//! The transfer bench: each figure a ratio within one run, over real sockets and processes. Owns the list of figures
//! and the run's course; a figure's course is its own file's.
//!
//! In reading order:

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::json;

use crate::progress;

// the answer's form
pub mod report;
// a host, from both ends
mod host;
mod model;
pub mod node;
mod order;
mod raw;
mod usage;
// what they stand on
mod fleet;
mod lab;
mod machine;
mod meddler;
mod netns;
// figures
mod deaths;
mod delta;
mod engines;
mod fan_out;
mod faults;
mod late;
mod line_rate;
mod pairs;
mod stall;
mod steady;

use lab::Lab;
use report::{Figure, Report};

/// Flags of `anabranch bench transfer`.
#[derive(Clone, Debug, clap::Args)]
pub struct TransferArgs {
    /// Letters of figures, separated by commas, or `all`
    #[arg(long, default_value = "all")]
    pub figure: String,
    /// File for the report, as JSON
    #[arg(long)]
    pub report: Option<PathBuf>,
    /// Pairs of checkpoints for C and D, as training left them
    #[arg(long)]
    pub pairs: Option<PathBuf>,
    /// The report on stdout in place of the table
    #[arg(long)]
    pub json: bool,
    /// Divides all sizes: for a look, not for the goals
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub divide: u64,
    /// Keep the nodes' logs here
    #[arg(long)]
    pub dir: Option<PathBuf>,
}

/// Letters of all figures.
const LETTERS: &str = "ABCDEFGHIJ";

/// Runs the figures, prints and writes the report; true if every figure met its goal.
#[allow(clippy::print_stdout)]
pub async fn run(args: TransferArgs) -> anyhow::Result<bool> {
    let letters = letters(&args.figure)?;
    if let Some(file) = &args.report {
        // Before the figures, which take minutes.
        std::fs::write(file, "").with_context(|| format!("writing {}", file.display()))?;
    }
    let lab = Lab::new(args.dir.as_deref(), args.divide)?;
    let mut figures = Vec::new();
    for letter in &letters {
        progress::line(&format!("figure {letter}: starts"));
        match figure(*letter, &lab, args.pairs.as_deref()).await {
            Ok(rows) => figures.extend(rows),
            Err(error) => {
                let why = format!("{error:#}");
                figures.push(Figure::absent(&letter.to_string(), f64::NAN, "", why));
            }
        }
    }
    progress::line("");
    let run = json!({"figures": letters, "divide": args.divide});
    let report = Report::new(figures, machine::facts(), run);
    lab.close(report.pass)?;
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{}", report.table()),
    }
    if let Some(file) = &args.report {
        report.write(file)?;
    }
    Ok(report.pass)
}

async fn figure(letter: char, lab: &Lab, pairs: Option<&Path>) -> anyhow::Result<Vec<Figure>> {
    match letter {
        'A' => Box::pin(line_rate::figures(lab)).await,
        'B' => Box::pin(fan_out::figures(lab)).await,
        'C' => {
            let dir = pairs.map_or_else(|| lab.scratch().join("pairs"), Path::to_owned);
            blocking(move || delta::figure_c(&dir)).await
        }
        'D' => {
            let bytes = lab.size(DELTA_BYTES);
            blocking(move || delta::figure_d(bytes)).await
        }
        'E' => Box::pin(engines::figures(lab)).await,
        'F' => Box::pin(deaths::figures(lab)).await,
        'G' => Box::pin(late::figures(lab)).await,
        'H' => Box::pin(stall::figures(lab)).await,
        'I' => Box::pin(faults::figures(lab)).await,
        'J' => Box::pin(steady::figures(lab)).await,
        other => bail!("there is no figure {other}"),
    }
}

/// Size of figure D's image: larger than the cache of any core.
const DELTA_BYTES: u64 = 128 << 20;

/// Runs a figure that computes all the time on a thread of its own.
async fn blocking(
    work: impl FnOnce() -> anyhow::Result<Vec<Figure>> + Send + 'static,
) -> anyhow::Result<Vec<Figure>> {
    tokio::task::spawn_blocking(work).await.context("the figure's thread ended early")?
}

fn letters(asked: &str) -> anyhow::Result<Vec<char>> {
    if asked.eq_ignore_ascii_case("all") {
        return Ok(LETTERS.chars().collect());
    }
    let one = |part: &str| match part.trim().to_ascii_uppercase().as_str() {
        letter if letter.len() == 1 && LETTERS.contains(letter) => Ok(letter.chars().collect()),
        other => bail!("no figure `{other}`; there are {LETTERS}, separated by commas, or `all`"),
    };
    let parts: anyhow::Result<Vec<Vec<char>>> = asked.split(',').map(one).collect();
    Ok(parts?.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_asked_for_by_letters_and_a_wrong_one_is_named() {
        assert_eq!(letters("a").unwrap(), ['A']);
        assert_eq!(letters("all").unwrap().len(), LETTERS.len());
        assert!(letters("A,x").unwrap_err().to_string().contains("`X`"));
    }
}
