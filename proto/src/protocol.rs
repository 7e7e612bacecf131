//! Protocol versions: one documented constant per change of the wire. Manager and agent agree on one when
//! the agent attaches.

use std::ops::RangeInclusive;

/// Version 1: Control and Data streams, ticks of token columns, weights pulled by version.
pub const V1: u32 = 1;

/// Versions that this build speaks.
pub const SUPPORTED: RangeInclusive<u32> = V1..=V1;

/// Newest version that both sides speak; `peer` is the range of the other one.
pub fn negotiate(peer: RangeInclusive<u32>) -> Result<u32, NoCommonProtocol> {
    let newest = (*SUPPORTED.end()).min(*peer.end());
    if newest >= *SUPPORTED.start() && newest >= *peer.start() {
        Ok(newest)
    } else {
        Err(NoCommonProtocol { peer_min: *peer.start(), peer_max: *peer.end() })
    }
}

/// Error of an agent and a manager that have no protocol version in common.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the agent speaks protocol {peer_min}..={peer_max}, this manager speaks {}..={}; \
     install the same Anabranch version on both sides",
    SUPPORTED.start(), SUPPORTED.end()
)]
pub struct NoCommonProtocol {
    peer_min: u32,
    peer_max: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_chosen_and_a_gap_is_refused() {
        assert_eq!(negotiate(1..=9), Ok(1));
        assert!(negotiate(0..=0).is_err());
        assert!(negotiate(2..=3).is_err());
    }
}
