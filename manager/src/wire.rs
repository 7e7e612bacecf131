//! Wire: messages of trainers, agents and people become events; actions become messages. Nothing is decided here.

pub(crate) mod admin;
pub(crate) mod agent_link;
pub(crate) mod auth;
pub(crate) mod deliver;
pub(crate) mod effects;
pub(crate) mod gate;
pub(crate) mod http;
pub(crate) mod inbox;
pub(crate) mod ingress;
pub(crate) mod streams;
