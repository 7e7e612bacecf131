//! Counts of each event, action and edge of the manager's state graphs, so that a change to the core is known to run
//! under [`crate::run`]. A row under [`ENOUGH`] is marked: no digest guards it.

mod names;

use std::collections::BTreeMap;
use std::fmt;

use anabranch_manager::action::Action;
use anabranch_manager::core::{Move, graphs};
use anabranch_manager::event::Event;

/// Count under which a row is marked.
pub const ENOUGH: u64 = 20;

/// Counts by row, of one world or of many together.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    rows: BTreeMap<(&'static str, String), u64>,
}

/// Notices that the core never gives: a reader of notices makes them.
const NOT_OF_THE_CORE: [(&str, &str); 2] = [("notice", "Missed"), ("notice", "Unknown")];

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Row {
    /// Section of the row: `event`, `fact`, `action`, `answer`, `notice`, or the machine whose edge the row counts.
    pub of: &'static str,
    /// Variant or edge.
    pub name: String,
    /// Times that the row was seen.
    pub count: u64,
}

// === impl Coverage ===

impl Coverage {
    /// Counts an event that goes into the core.
    pub(crate) fn event(&mut self, event: &Event) {
        self.count("event", names::event(event));
        if let Event::FactsFound { facts, .. } = event {
            facts.iter().for_each(|fact| self.count("fact", names::fact(fact)));
        }
    }

    /// Counts an action that the core decided.
    pub(crate) fn action(&mut self, action: &Action) {
        self.count("action", names::action(action));
        match action {
            Action::Emit(notice) => self.count("notice", names::notice(notice)),
            Action::Reply { answer, .. } => self.count("answer", names::answer(answer)),
            _ => {}
        }
    }

    /// Counts a move along a state graph.
    pub(crate) fn moved(&mut self, (machine, from, to): Move) {
        self.count(machine, &format!("{from} > {to}"));
    }

    /// Adds the counts of `other`.
    pub fn add(&mut self, other: &Coverage) {
        for (row, count) in &other.rows {
            *self.rows.entry(row.clone()).or_default() += count;
        }
    }

    /// Every row that could be seen, seen or not.
    pub fn rows(&self) -> Vec<Row> {
        let mut counts = self.rows.clone();
        for (of, names) in names::ALL {
            for name in *names {
                counts.entry((of, (*name).into())).or_default();
            }
        }
        for row in NOT_OF_THE_CORE {
            counts.remove(&(row.0, row.1.to_owned()));
        }
        for (machine, from, to) in graphs() {
            counts.entry((machine, format!("{from} > {to}"))).or_default();
        }
        counts.into_iter().map(|((of, name), count)| Row { of, name, count }).collect()
    }

    fn count(&mut self, of: &'static str, name: &str) {
        *self.rows.entry((of, name.to_owned())).or_default() += 1;
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Row { of, name, count } in self.rows() {
            let mark = if count < ENOUGH { "<20" } else { "" };
            let line = format!("{of:<8} {name:<28} {count:>10} {mark:>4}");
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}
