//! Versions as bytes: the layout of their tensors, their chunks and blobs, the checkpoints that they are read
//! from, and their names in an export directory.

pub mod blob;
pub mod checkpoint;
pub mod chunks;
pub mod directory;
pub mod exported;
pub mod layout;
