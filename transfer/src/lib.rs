//! Moves versioned bytes from one process to many, verified. Knows nothing of RL, engines or tokens.
//!
//! Goals: no byte is used that was not verified against the version's root; a slow or dead peer costs
//! only itself; no page faults on the update path after the first version. Not goals: deciding who
//! fetches what (the manager's), loading into an engine (the agent's).
//!
//! Units: offsets and lengths are bytes of a version's *image*, which is a safetensors file; chunks are
//! indices of `chunk_bytes` each. The flow, in reading order:
//!
//! ```text
//!   layout ─► arena ─► holder ─► serve ══ wire over link ══► fetch (queue) ─► staging ─► a directory
//!             publish is the trainer's API                    Fetcher is the agent's
//! ```
//! The bulk path is blocking threads; the async functions of the API only wait for them.

pub mod checkpoint;
pub mod chunks;
pub mod delta;
pub mod directory;
pub mod layout;
pub mod queue;
pub mod wire;

mod arena;
mod export;
mod fetch;
mod holder;
mod inbound;
mod link;
mod listen;
mod lock;
mod maps;
mod publish;
mod serve;
mod shm;
mod staging;

pub use arena::ArenaError;
pub use arena::home::ShmArena;
pub use export::ExportError;
pub use fetch::{
    FetchError, FetchProgress, FetchReport, FetchRequest, FetchRules, Fetcher, SourceRef, Staged,
    Tried,
};
pub use holder::{Held, Holder, Lease, Refusal};
pub use link::{LinkError, PinMismatch};
pub use listen::{LinkKind, Listen, Listener, UnknownLink};
pub use lock::LockError;
pub use maps::Mapper;
pub use publish::{
    Part, PartError, PartInfo, PartInfoError, PieceRef, PublishError, Published, Publisher,
    PublisherConfig, Publishing, PublishingPart, Sender, TensorRef,
};
pub use queue::QueueStats;
pub use serve::{FeedOrder, ServeError, ServeLimits, Server};
pub use staging::{MODEL_FILE, StageError, StagedSlot, Staging};
