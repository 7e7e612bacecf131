//! Process plumbing that every Anabranch process shares and that knows nothing of RL: starting and
//! stopping tasks, time, settings, logs, tokens, TLS, listening, dialling, child processes.

// tasks and time
pub mod backoff;
pub mod clock;
pub mod drain;
pub mod signal;
// settings and logs
pub mod config;
pub mod exit;
pub mod telemetry;
// the network
pub mod safety;

pub use backoff::{Backoff, BackoffConfig};
pub use clock::{Clock, Now, TimerTable, UnixSeconds};
pub use drain::{Drain, StillRunning};
pub use exit::Exit;
