//! Progress on stderr: one line a second while a bench runs.

use std::io::{IsTerminal, Write};

/// Prints a line; on a terminal it replaces the line before.
pub fn line(text: &str) {
    let mut err = std::io::stderr();
    // Where stderr is gone nobody misses it.
    let _ = match err.is_terminal() {
        true => write!(err, "\r\x1b[2K{text}"),
        false => writeln!(err, "{text}"),
    };
}
