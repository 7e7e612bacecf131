//! What a version is, as bytes: where its tensors lie, its chunks, its blobs, the checkpoints that it is read
//! from, the names that it has when it is exported.

pub mod blob;
pub mod checkpoint;
pub mod chunks;
pub mod directory;
pub mod exported;
pub mod layout;
