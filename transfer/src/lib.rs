//! Moves versioned bytes from one process to many, verified. Knows nothing of RL, engines or tokens.
//!
//! Goals: no byte is used that was not verified against the version's root; a slow or dead peer costs
//! only itself; no page faults on the update path after the first version. Not goals: deciding who
//! fetches what (the manager's), loading into an engine (the agent's).
//!
//! Units: offsets and lengths are bytes of a version's *image*, which is a safetensors file; chunks are
//! indices of `chunk_bytes` each. The layers, each of which imports only those above it in this list:
//!
//! ```text
//!   image      what a version is: layout, chunks, blobs, checkpoints, names of exported versions
//!   memory     shared memory, who else maps it, locked directories
//!   link       one stream between two processes: the messages, and each way to carry them
//!   delta      the differences between versions, and the memory that they are in
//!   send       the trainer's side: arena -> holder -> serve; publish is its API
//!   receive    the agent's side: fetch (queue) -> staging -> a directory for the engine
//! ```
//! The bulk path is blocking threads; the async functions of the API only wait for them.
//!
//! Words: a *holder* has versions and lends them; a *source* is a holder that a receiver asks; a *feed* is a
//! source that dials its receiver, because it cannot be dialled; a *link* is one way to carry a stream.
#![warn(missing_docs)]

pub mod delta;
pub mod external;

mod image;
mod link;
mod memory;
mod receive;
mod send;

pub use image::exported::MODEL_FILE;
pub use image::{checkpoint, chunks, directory, layout};
pub use link::wire;
pub use link::{LinkError, PinMismatch};
pub use memory::home::{HomeError, ShmArena};
pub use memory::lock::LockError;
pub use memory::mappers::Mapper;
pub use receive::fetch::{
    FetchError, FetchProgress, FetchReport, FetchRequest, FetchRules, Fetcher, SourceRef, Staged,
    Tried,
};
pub use receive::queue;
pub use receive::queue::QueueStats;
pub use receive::staging::{StageError, StagedSlot, Staging};
pub use send::arena::ArenaError;
pub use send::export::ExportError;
pub use send::holder::{Held, Holder, Lease, Refusal};
pub use send::listen::{LinkKind, Listen, Listener, ServeError, UnknownLink};
pub use send::publish::{
    Part, PartError, PartInfo, PartInfoError, PieceRef, PublishError, Published, Publisher,
    PublisherConfig, Publishing, PublishingPart, Sender, TensorRef,
};
pub use send::serve::{FeedOrder, ServeLimits, Server};
