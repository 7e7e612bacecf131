//! The manager: decides. It admits prompt groups, places samples on engines that come and go, assembles
//! their tokens, packs micro-batches, and rolls weight versions forward. It moves no weight bytes and holds no GPU.
//!
//! ```text
//!  trainer ─Submit─▶ ingress ─▶ admission ─▶ queue ─▶ placement ─▶ agent_link ─▶ agent ─▶ engine
//!                                             ▲                                     │
//!                                      samples that lost                          ticks
//!                                      their engine                                 ▼
//!  trainer ◀─Part── egress ◀─ microbatch ◀─ group ◀─ sample ◀──── facts ──────── ledger
//! ```
//!
//! Two pure cores: the [`ledger`] has the tokens, the [`core`] decides and never sees one. Both are
//! driven by `driver` here and by the simulation in virtual time.

// words that go in and out of the deciding core
pub mod action;
pub mod event;
mod need;
mod outbox;
mod timer;

// tokens
pub mod ledger;

// the owners
pub mod fleet;
mod job;
pub mod rollout;
pub mod weights;

// the deciding core, which holds the owners
pub mod core;

// the process: settings, and the loop that owns the core
pub mod announce;
pub mod config;
mod driver;
pub mod error;
pub mod server;

// messages in and out
mod wire;

// state as others see it
pub mod view;

pub use config::{ManagerConfig, RawConfig};
pub use error::ManagerError;
pub use server::{Manager, run};
