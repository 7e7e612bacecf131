//! One line a second for whoever waits.

use std::io::{IsTerminal, Write};

/// Over the line before on a terminal, under it elsewhere.
pub fn line(text: &str) {
    let mut err = std::io::stderr();
    // Where stderr is gone nobody misses it.
    let _ = match err.is_terminal() {
        true => write!(err, "\r\x1b[2K{text}"),
        false => writeln!(err, "{text}"),
    };
}
