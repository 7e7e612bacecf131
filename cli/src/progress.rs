//! Progress for people, on stderr: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Time between two lines without a terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Progress of one command.
pub struct Progress {
    what: &'static str,
    quiet: bool,
    bar: Option<ProgressBar>,
    total: u64,
    said: Instant,
}

impl Progress {
    /// Starts at zero; `what` names the units, of which there are `total`.
    pub fn new(what: &'static str, total: u64, quiet: bool) -> Self {
        let bar = (std::io::stderr().is_terminal() && !quiet).then(|| {
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} {eta}")
                .expect("the template is constant and sound");
            ProgressBar::new(total).with_style(style).with_prefix(what)
        });
        Self { what, quiet, bar, total, said: Instant::now() }
    }

    /// Shows `done` units, with a note.
    pub fn set(&mut self, done: u64, note: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(note.to_owned());
            }
            None if !self.quiet && self.said.elapsed() >= LINE_EVERY => {
                self.said = Instant::now();
                eprintln!("{}: {done}/{} {note}", self.what, self.total);
            }
            None => {}
        }
    }

    /// Changes the number of units.
    pub fn set_total(&mut self, total: u64) {
        self.total = total;
        if let Some(bar) = &self.bar {
            bar.set_length(total);
        }
    }

    /// Prints a line that stays, above the bar.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None if !self.quiet => eprintln!("{line}"),
            None => {}
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
