//! Publishing weights: the snapshot goes into the arena, its chunks are served from here, and one stream per
//! version tells the manager where they are for as long as they are there. Moving the bytes is the transfer
//! crate's.
//!
//! ```text
//!   publications (what is served) ─► announce (one stream per version) ─► published (its progress)
//!   part: one of several senders, which seal a version together
//! ```

mod announce;
mod part;
mod publications;
mod published;

pub(crate) use publications::Publications;

pub use part::Part;
pub use published::Published;
