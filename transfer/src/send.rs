//! The side that has versions: from a trainer's tensors, or on their way through a relay.

pub(crate) mod arena;
pub(crate) mod export;
pub(crate) mod holder;
pub(crate) mod inbound;
pub(crate) mod listen;
pub(crate) mod publish;
pub(crate) mod serve;
