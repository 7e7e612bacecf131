//! The form of the transfer bench's answers: one row per figure, a table of them, one JSON file. Owns no number.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use serde_json::{Value, json};

/// One measured ratio and what it should be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Letter of the figure, followed by a part if the figure has several: `B.egress`.
    pub id: String,
    /// The ratio; NaN (`null` in JSON) if it could not be measured, with the reason in `detail.why`.
    pub value: f64,
    /// The goal, in the same unit.
    pub goal: f64,
    /// Unit of the ratio.
    pub unit: String,
    /// True if the goal was met.
    pub pass: bool,
    /// Numbers behind the ratio; `goal_is` says which side of the goal is good.
    pub detail: Value,
}

/// All figures of one run and the machine that they were made on.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The figures, in the order of the table.
    pub figures: Vec<Figure>,
    /// True if every figure met its goal.
    pub pass: bool,
    /// Facts of the machine: ratios are comparable only on the same one.
    pub machine: Value,
    /// Flags of the run.
    pub run: Value,
}

const AT_MOST: &str = "at most";
const AT_LEAST: &str = "at least";

// === impl Figure ===

impl Figure {
    /// A figure of which lower is better.
    pub fn at_most(id: &str, value: f64, goal: f64, unit: &str, detail: Value) -> Figure {
        Figure::new(id, value, goal, unit, value <= goal, with(detail, AT_MOST))
    }

    /// A figure of which higher is better.
    pub fn at_least(id: &str, value: f64, goal: f64, unit: &str, detail: Value) -> Figure {
        Figure::new(id, value, goal, unit, value >= goal, with(detail, AT_LEAST))
    }

    /// A figure that could not be measured here, because of `why`; it fails.
    pub fn absent(id: &str, goal: f64, unit: &str, why: impl ToString) -> Figure {
        Figure::new(id, f64::NAN, goal, unit, false, json!({"why": why.to_string()}))
    }

    /// Makes the figure fail because of `why`, however good its value is.
    pub fn spoiled(mut self, why: impl ToString) -> Figure {
        self.pass = false;
        self.detail["why"] = why.to_string().into();
        self
    }

    fn new(id: &str, value: f64, goal: f64, unit: &str, pass: bool, detail: Value) -> Figure {
        Figure { id: id.to_owned(), value, goal, unit: unit.to_owned(), pass, detail }
    }

    fn row(&self) -> [String; 5] {
        let goal = match self.detail["goal_is"].as_str() {
            Some(AT_LEAST) => format!(">= {}", short(self.goal)),
            _ => format!("<= {}", short(self.goal)),
        };
        let note = self.detail["why"].as_str().or(self.detail["note"].as_str());
        let verdict = if self.pass { "ok" } else { "MISSED" };
        let value = if self.value.is_nan() { "-".to_owned() } else { short(self.value) };
        let verdict = format!("{verdict}  {}", note.unwrap_or("")).trim_end().to_owned();
        [self.id.clone(), value, goal, self.unit.clone(), verdict]
    }
}

// === impl Report ===

impl Report {
    /// Makes a report; it passes if there are figures and all of them pass.
    pub fn new(figures: Vec<Figure>, machine: Value, run: Value) -> Report {
        let pass = !figures.is_empty() && figures.iter().all(|f| f.pass);
        Report { figures, pass, machine, run }
    }

    /// Writes the report as JSON.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self).context("forming the report")?;
        std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))
    }

    /// The report as a table for people.
    pub fn table(&self) -> String {
        let head = ["figure", "value", "goal", "unit", ""].map(str::to_owned);
        let rows: Vec<[String; 5]> =
            std::iter::once(head).chain(self.figures.iter().map(Figure::row)).collect();
        let width = |at: usize| rows.iter().map(|r| r[at].chars().count()).max().unwrap_or(0);
        let widths = [0, 1, 2, 3].map(width);
        let mut out = String::new();
        for [id, value, goal, unit, note] in &rows {
            let [a, b, c, d] = widths;
            let line = format!("{id:<a$}  {value:>b$}  {goal:<c$}  {unit:<d$}  {note}");
            // Writing to a String does not fail.
            let _ = writeln!(out, "{}", line.trim_end());
        }
        out
    }
}

/// Median of the values; NaN if there are none.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let at = |ix: usize| values.get(ix).copied().unwrap_or(f64::NAN);
    (at(values.len() / 2) + at(values.len().saturating_sub(1) / 2)) / 2.0
}

fn with(detail: Value, goal_is: &str) -> Value {
    let mut detail = if detail.is_object() { detail } else { json!({"note": detail}) };
    detail["goal_is"] = goal_is.into();
    detail
}

/// A number with three or four significant digits.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 0.1 => format!("{value:.3}"),
        _ => format!("{value:.5}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_which_side_of_the_goal_is_good_and_what_spoiled_it() {
        let figures = vec![
            Figure::at_most("B.last", 1.1, 1.15, "x", json!({"note": "K = 8"})),
            Figure::at_least("A.wall", 0.5, 0.7, "x", json!({})),
            Figure::absent("G.time", 1.1, "x", "needs root"),
            Figure::at_most("G.bytes", 0.0, 0.0, "bytes", Value::Null).spoiled("a wrong byte"),
        ];
        let report = Report::new(figures, Value::Null, Value::Null);
        assert!(!report.pass);
        let table = report.table();
        for part in ["<= 1.150", ">= 0.700", "MISSED  needs root", "MISSED  a wrong byte", "ok  K"]
        {
            assert!(table.contains(part), "{part}:\n{table}");
        }
    }

    #[test]
    fn a_figure_that_could_not_be_measured_is_null_in_json_and_no_run_of_nothing_passes() {
        let absent = Figure::absent("F", 0.02, "x", "needs root");
        let json = serde_json::to_value(&absent).unwrap();
        assert_eq!((&json["value"], &json["pass"]), (&Value::Null, &Value::Bool(false)));
        assert!(!Report::new(Vec::new(), Value::Null, Value::Null).pass);
    }
}
