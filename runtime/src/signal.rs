//! Waiting for SIGTERM or SIGINT. What a process does then is its own business.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Installed handlers of SIGTERM and SIGINT. [`ShutdownSignals::recv`] may be called again: a
/// second signal usually means "now".
#[derive(Debug)]
pub struct ShutdownSignals {
    term: Signal,
    int: Signal,
}

impl ShutdownSignals {
    /// Installs the handlers; from here on the signals no longer kill the process.
    pub fn install() -> io::Result<ShutdownSignals> {
        Ok(ShutdownSignals {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next signal and returns its name.
    pub async fn recv(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}

/// Waits for the first SIGTERM or SIGINT and returns its name.
pub async fn shutdown_signal() -> io::Result<&'static str> {
    Ok(ShutdownSignals::install()?.recv().await)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, getpid, kill_process};

    #[tokio::test]
    async fn both_signals_arrive_by_name() {
        let mut signals = ShutdownSignals::install().expect("handlers");
        kill_process(getpid(), Signal::TERM).expect("kill");
        assert_eq!(signals.recv().await, "SIGTERM");
        kill_process(getpid(), Signal::INT).expect("kill");
        assert_eq!(signals.recv().await, "SIGINT");
    }
}
