//! The link of the data plane over RDMA, through libfabric: messages over TCP, bulk read by the receiver
//! straight out of the source's memory into its own. [`register`] makes it the link of `rdma://` addresses.
//!
//! Building needs a C compiler; the library is loaded when the link is first used. libfabric before 1.18 is
//! refused where it would use `ofi_rxm`.
//!
//! ```text
//!   link      both ends of a stream: what is said over TCP, and when memory is read
//!   lending   what a source registers, for as long as the memory belongs to one version
//!   fabric    libfabric, safely: domains, endpoints, registered memory, reads
//! ```
#![warn(missing_docs)]

use std::io;
use std::net::{IpAddr, TcpStream};
use std::time::Duration;

use anabranch_proto::address::HostPort;
use anabranch_transfer::external::{Accept, ExternalLink, Link, LinkError, register_rdma};

mod fabric;
mod lending;
mod link;

use lending::Lendings;

/// Makes rdma available to this process: `rdma://` addresses can be dialled, and listeners can offer the
/// link. Call it once, before the first listener is bound. Does not load libfabric yet.
pub fn register() {
    register_rdma(Box::new(Rdma));
}

struct Rdma;

impl ExternalLink for Rdma {
    fn connect(&self, at: &HostPort, within: Duration) -> Result<Box<dyn Link>, LinkError> {
        link::connect(at, within)
    }

    fn listen(&self, interface: Option<IpAddr>) -> Result<Box<dyn Accept>, LinkError> {
        Ok(Box::new(Lendings::open(interface)?))
    }
}

impl Accept for Lendings {
    fn accept(&self, stream: TcpStream) -> io::Result<Box<dyn Link>> {
        link::accepted(stream, self)
    }
}
