//! The manager: decides. It admits prompt groups, places samples on engines that come and go, assembles
//! their tokens, packs micro-batches, and rolls weight versions forward. It moves no weight bytes and holds no GPU.
//!
//! ```text
//!  trainer ─Submit─▶ ingress ─▶ admission ─▶ queue ─▶ scheduler ─▶ agent_link ─▶ agent ─▶ engine
//!                                             ▲           placement                 │
//!                                      samples that lost                          ticks
//!                                      their engine                                 ▼
//!  trainer ◀─Part── egress ◀─ microbatch ◀─ group ◀─ sample ◀──── facts ──────── ledger
//! ```
//!
//! Two pure cores: the [`ledger`] has the tokens, the [`core`] decides and never sees one. Both are
//! driven by [`driver`] here and by the simulation in virtual time.

// tokens
pub mod ledger;

// prompts in
mod admission;
mod job;
pub mod replay;

// choose an engine
pub mod fleet;
mod placement;
mod queue;

// trajectories out
mod egress;
mod group;
mod microbatch;
mod sample;

// weights
pub mod plan;
mod rates;
mod rollforward;
pub mod versions;

// the deciding core, which owns all of the above
pub mod core;
pub mod state;

// the driver: sockets, clock, and the loop that owns the core
pub mod announce;
pub mod config;
mod deliver;
mod driver;
mod effects;
pub mod error;
mod gate;
pub mod server;

// calls
mod admin;
mod agent_link;
mod auth;
mod http;
mod ingress;

// what others see
mod feed;
mod metrics;
mod notice_log;
mod notices;

pub use config::{ManagerConfig, RawConfig};
pub use error::ManagerError;
pub use server::{Manager, run};
