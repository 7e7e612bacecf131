//! HTTP/2 settings that the listener and the dialler share.

use std::time::Duration;

/// Time between HTTP/2 pings. A stopped peer is noticed within this and [`KEEPALIVE_TIMEOUT`]
/// together.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Time that a peer has to answer a ping.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes that one stream may have in flight: 8 MiB covers 10 Gbit/s at a round trip of 6 ms.
pub const H2_STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// Bytes that all streams of a connection may have in flight together.
pub const H2_CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Most streams of one connection at once.
pub const H2_MAX_STREAMS: u32 = 10_000;
