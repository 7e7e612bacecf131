//! Mechanisms that move the data plane's bytes between two processes.

pub(crate) mod tcp;

pub use tcp::LinkError;
