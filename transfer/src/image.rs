//! What a version is, as bytes: where its tensors lie, its chunks, the checkpoints that it is read from.

pub mod checkpoint;
pub mod chunks;
pub mod directory;
pub mod layout;
