//! Process plumbing that every Anabranch process shares and that knows nothing of RL: starting and
//! stopping tasks, time, settings, logs, tokens, TLS, listening, dialling, child processes.

pub mod backoff;
pub mod clock;
pub mod drain;
pub mod signal;

pub use clock::{Clock, Now, TimerTable, UnixSeconds};
pub use drain::{Drain, StillRunning};
