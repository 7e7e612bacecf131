//! The form of a run's results: figures with their goals, one JSON file and one table. The runs own the numbers.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// All figures of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the run, such as "stream" or "chaos".
    pub run: String,
    /// True if every gate held; goals that were missed do not count.
    pub pass: bool,
    /// The figures, in the order of the table.
    pub figures: Vec<Figure>,
    /// Notes on the set-up of the run and on the meaning of its numbers.
    pub notes: Vec<String>,
    /// More facts of the run, by name.
    pub detail: serde_json::Value,
}

/// One number and what it should be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Name of the figure, unique in the report.
    pub id: String,
    /// The number; NaN (`null` in JSON) if it could not be measured.
    pub value: f64,
    /// Unit of the number.
    pub unit: String,
    /// Goal or gate of the figure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal: Option<Goal>,
    /// True if the goal was reached; `None` if there is no goal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass: Option<bool>,
    /// Remark for people; empty if there is none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// A bound that a figure should keep.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Goal {
    /// Side of `value` that is good.
    pub bound: Bound,
    /// The bound, in the figure's unit.
    pub value: f64,
    /// True if the run fails if the bound is missed; otherwise the bound is only shown.
    pub gate: bool,
}

/// Side of a goal that is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// The value should not be lower.
    AtLeast,
    /// The value should not be higher.
    AtMost,
}

impl Report {
    /// A report without figures, which passes.
    pub fn new(run: &str) -> Self {
        Self {
            run: run.to_owned(),
            pass: true,
            figures: Vec::new(),
            notes: Vec::new(),
            detail: serde_json::Value::Null,
        }
    }

    /// Adds a figure without a goal.
    pub fn figure(&mut self, id: &str, value: f64, unit: &str) -> &mut Figure {
        self.push(id, value, unit, None)
    }

    /// Adds a figure with a goal that is only shown.
    pub fn goal(
        &mut self,
        id: &str,
        value: f64,
        unit: &str,
        bound: Bound,
        goal: f64,
    ) -> &mut Figure {
        self.push(id, value, unit, Some(Goal { bound, value: goal, gate: false }))
    }

    /// Adds a figure with a gate: the run fails if it is missed.
    pub fn gate(
        &mut self,
        id: &str,
        value: f64,
        unit: &str,
        bound: Bound,
        goal: f64,
    ) -> &mut Figure {
        self.push(id, value, unit, Some(Goal { bound, value: goal, gate: true }))
    }

    /// Adds a note.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Writes the report as JSON.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self).context("serializing the report")?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("writing the report to {}", path.display()))
    }

    /// The report as a table for people.
    pub fn table(&self) -> String {
        let mut out = format!("{}: {}\n", self.run, if self.pass { "passed" } else { "FAILED" });
        let width = self.figures.iter().map(|f| f.id.len()).max().unwrap_or(0);
        for figure in &self.figures {
            let value = readable(figure.value);
            let _ = write!(out, "  {:width$}  {value:>14} {:<10}", figure.id, figure.unit);
            if let (Some(goal), Some(pass)) = (figure.goal, figure.pass) {
                let sign = if goal.bound == Bound::AtLeast { ">=" } else { "<=" };
                let kind = if goal.gate { "gate" } else { "goal" };
                let word = if pass { "ok" } else { "MISSED" };
                let _ = write!(out, " {kind} {sign} {}: {word}", readable(goal.value));
            }
            if !figure.detail.is_empty() {
                let _ = write!(out, "  ({})", figure.detail);
            }
            out.push('\n');
        }
        self.notes.iter().for_each(|note| {
            let _ = writeln!(out, "  - {note}");
        });
        out
    }

    fn push(&mut self, id: &str, value: f64, unit: &str, goal: Option<Goal>) -> &mut Figure {
        let pass = goal.map(|goal| match goal.bound {
            Bound::AtLeast => value >= goal.value,
            Bound::AtMost => value <= goal.value,
        });
        self.pass &= !goal.is_some_and(|goal| goal.gate) || pass == Some(true);
        self.figures.push(Figure {
            id: id.to_owned(),
            value,
            unit: unit.to_owned(),
            goal,
            pass,
            detail: String::new(),
        });
        self.figures.last_mut().expect("one was just pushed")
    }
}

impl Figure {
    /// Sets the remark.
    pub fn detail(&mut self, text: impl Into<String>) {
        self.detail = text.into();
    }
}

/// A number with groups of thousands, and with a fraction only if that says something.
fn readable(value: f64) -> String {
    if value.fract() != 0.0 && value.abs() < 1000.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{:.0}", value.abs());
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    if value < 0.0 { format!("-{out}") } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_gate_fails_the_run_and_a_missed_goal_does_not() {
        let mut report = Report::new("x");
        report.goal("speed", 1.0, "tok/s", Bound::AtLeast, 2.0).detail("why");
        assert!(report.pass);
        report.gate("lost", 0.0, "samples", Bound::AtMost, 0.0);
        assert!(report.pass);
        report.gate("tokens", 1_999_999.0, "", Bound::AtLeast, 2e6);
        report.figure("rss", 1234567.0, "B");
        assert!(!report.pass);
        let table = report.table();
        assert!(
            table.contains("1,999,999") && table.contains("gate >= 2,000,000: MISSED"),
            "{table}"
        );
        assert!(table.contains("(why)") && table.starts_with("x: FAILED"), "{table}");
    }

    #[test]
    fn not_a_number_never_passes() {
        let mut report = Report::new("x");
        report.gate("p99", f64::NAN, "ms", Bound::AtMost, 50.0);
        assert!(!report.pass);
    }
}
