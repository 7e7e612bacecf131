//! Memory that processes of one host share, and what tells whether it is still used.

pub(crate) mod home;
pub(crate) mod lock;
pub(crate) mod map;
pub(crate) mod mappers;
