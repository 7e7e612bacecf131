//! Rollout: groups and their samples, from admission through the queue to delivered micro-batches.

pub(crate) mod admission;
pub(crate) mod egress;
pub(crate) mod group;
pub(crate) mod microbatch;
pub(crate) mod queue;
pub mod replay;
pub(crate) mod sample;
