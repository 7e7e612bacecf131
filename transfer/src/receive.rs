//! The side that gets versions, for an engine of this host.

pub(crate) mod fetch;
pub mod queue;
pub(crate) mod staging;
