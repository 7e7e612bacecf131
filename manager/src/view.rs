//! View: the manager's state, metrics and notices as people and scripts see them.

pub(crate) mod feed;
pub(crate) mod metrics;
pub(crate) mod notice_log;
pub(crate) mod notices;
pub mod state;
