//! The vocabulary and the wire of Anabranch: ids, versions, seeds, token columns, limits, and the
//! generated messages. Does no I/O, spawns nothing, reads no clock.
//!
//! In reading order:

pub mod grant;
pub mod ids;
pub mod limits;
pub mod manifest;
pub mod protocol;
pub mod seed;
pub mod tokens;
pub mod version;

pub mod pb;

pub use ids::{
    Attempt, BatchSeq, EngineId, GroupId, Incarnation, OrderId, SampleId, SessionId, Step,
};
pub use version::{Root, Version};
