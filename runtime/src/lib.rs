//! Process plumbing that every Anabranch process shares: starting and stopping tasks, time,
//! settings, logs, tokens, TLS, listening, dialling, child processes. Knows nothing of RL.
#![warn(missing_docs)]

// tasks and time
pub mod backoff;
pub mod clock;
pub mod drain;
pub mod process;
pub mod signal;
// settings, logs, secrets
pub mod config;
pub mod exit;
mod private_file;
pub mod telemetry;
pub mod token;
// the network
pub mod connect;
pub mod endpoint;
pub mod limits;
pub mod listen;
pub mod safety;
pub mod tls;

pub use backoff::{Backoff, BackoffConfig};
pub use clock::{Clock, Now, TimerTable, UnixSeconds};
pub use connect::{ConnectError, connect, connect_to};
pub use drain::{Drain, StillRunning};
pub use endpoint::{Announce, Endpoint};
pub use exit::Exit;
pub use listen::{ListenError, ServeOptions, bind, serve};
pub use private_file::FileError;
pub use process::Child;
pub use token::{CertDigest, JoinToken, Role, TokenStore};
