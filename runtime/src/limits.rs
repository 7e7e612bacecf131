//! Settings of the wire that both ends share.

use std::time::Duration;

/// Between HTTP/2 pings. With the timeout this bounds how long a stopped peer goes unnoticed.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// For the answer to a ping.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// What one stream may have in flight: 8 MiB covers 10 Gbit/s at 6 ms.
pub const H2_STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// What all streams of a connection may have in flight together.
pub const H2_CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Streams of one connection.
pub const H2_MAX_STREAMS: u32 = 10_000;
