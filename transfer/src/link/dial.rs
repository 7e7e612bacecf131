//! Opening a stream by the link that an address names.

use std::time::Duration;

use anabranch_proto::address::Address;

use super::external::rdma;
use super::file::FileLink;
use super::{Link, LinkError, quic, shm, tcp, tls};

/// Opens a stream to `addr`. Fails after about `within`, handshake included.
pub(crate) fn dial(addr: &Address, within: Duration) -> Result<Box<dyn Link>, LinkError> {
    match addr {
        Address::Tcp(at) => tcp::dial(at, within),
        Address::Tls(at, pin) => tls::connect(at, *pin, within),
        Address::Quic(at, pin) => quic::connect(at, *pin, within),
        Address::Rdma(at) => rdma()?.connect(at, within),
        Address::Shm(socket) => Ok(Box::new(shm::dial(socket, within)?)),
        Address::File(dir) => Ok(Box::new(FileLink::open(dir)?)),
        Address::Feed(source) => Err(LinkError::NotDialled { holder: source.clone(), within }),
    }
}
