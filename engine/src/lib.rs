//! The embedded CPU engine: a process that serves SGLang's HTTP dialect without a GPU.
//!
//! Two models. `synthetic` makes tokens that are a pure function of all tokens before them, of the seed and of the
//! weights ([`synthetic`]): the oracle of tests, chaos runs and benches. `hf:DIR` (feature `candle`) is a real
//! Llama, Qwen2 or Qwen3 decoder.
//!
//! ```text
//! HTTP connection tasks --commands--> engine thread: driver { core (step) { model } } --chunks--> connections
//! ```
//!
//! Owns generation, weight swaps and the dialect. Knows no manager, no agent and no other crate of the workspace.

mod config;
mod driver;
#[cfg(feature = "candle")]
mod hf;
mod http;
mod meter;
mod model;
mod server;
mod sse;
mod step;
pub mod synthetic;
mod weights;

pub use config::{EngineConfig, EngineError, ModelSpec};
pub use server::Server;
pub use weights::{
    TensorContent, TensorEntry, TensorTable, WeightsError, content_digest, content_digest_of,
    digest_table, list_tensors,
};
