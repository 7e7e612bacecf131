//! Parts for a link in a crate of its own: the two traits that such a link implements, and the types that it
//! works on.

pub use crate::image::blob::{Backing, Blob, Stamp};
pub use crate::link::external::{Accept, ExternalLink, RDMA_FIRST_BYTE, register_rdma};
pub use crate::link::tcp::{connect as tcp_connect, link as tcp_link};
pub use crate::link::{Closer, Link, LinkError};
pub use crate::memory::map::SharedMap;
pub use crate::memory::mappers::LendingMap;
