//! Process-level benches and chaos runs: start real processes, break them, account for CPU, bytes and tokens, and
//! verify every token in a process of its own. Owns no decision of the product; is never linked into the manager.
//!
//! In reading order:

// the runs
pub mod chaos;
pub mod core;
pub mod stream;
pub mod transfer;
// the trainer's side of a run
mod load;
mod publishing;
mod weights;
// the processes
mod cluster;
mod proxy;
mod tap;
// what is measured
mod delays;
mod meter;
mod metrics;
mod procfs;
// the judge
pub mod records;
pub mod verify;
// what is shown
mod progress;
pub mod report;
mod rng;
mod workdir;
