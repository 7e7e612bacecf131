//! What a build without the feature `rdma` has in the link's place: nothing, said plainly.

use std::io;
use std::net::{IpAddr, TcpStream};
use std::time::Duration;

use super::{Link, LinkError};

/// As in the link.
pub(crate) const FIRST_BYTE: u8 = b'R';

/// There are none.
#[derive(Debug)]
pub(crate) enum Lendings {}

pub(super) fn connect(addr: &str, _: Duration) -> Result<Box<dyn Link>, LinkError> {
    Err(not_built(&format!("rdma://{addr}")))
}

pub(crate) fn accepted(_: TcpStream, lendings: &Lendings) -> io::Result<Box<dyn Link>> {
    match *lendings {}
}

impl Lendings {
    pub(crate) fn open(_: Option<IpAddr>) -> Result<Lendings, LinkError> {
        Err(not_built("rdma://"))
    }
}

fn not_built(addr: &str) -> LinkError {
    let why = "this build has no rdma; build it with the feature `rdma`".to_owned();
    LinkError::Address { addr: addr.to_owned(), why }
}
