//! Virtual-time worlds that drive the manager's real cores: seeded schedules of kills, stalls, clean ends, lost
//! finishes, partitions, repeated messages, version bumps, mode switches, drains and trainer restarts.
//! After each event the invariants are checked, and each delivered trajectory is recomputed with the oracle.
//! A failing seed reproduces exactly: `anabranch sim --seed N`.
//!
//! Real are the deciding core, the ledger and the oracle. Modelled are agents and engines as one (`fleet`), the trainer
//! (`trainer`) and the network (`world`). [`transfer`] is a world of its own: weights on their way, with the manager's
//! plan and the receiver's queue.

mod check;
pub mod coverage;
mod digest;
mod digests;
mod faults;
mod fleet;
mod rng;
mod scenario;
mod trainer;
pub mod transfer;
mod world;

pub use coverage::Coverage;
pub use digests::{BadDigests, Digests};
pub use scenario::Scenario;
pub use world::{Failure, Outcome, run, run_covered};
