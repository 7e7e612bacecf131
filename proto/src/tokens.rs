//! Token columns: `u32` and `f32` as little-endian bytes, never cast in place (they are not aligned).

use bytes::Bytes;

/// Bytes of one token id or one log-probability.
pub const WIDTH: usize = 4;

/// Column of token ids.
pub fn encode_ids(ids: &[u32]) -> Bytes {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>().into()
}

/// Column of log-probabilities.
pub fn encode_logprobs(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

/// Token ids of a column. Bytes beyond the last whole id are ignored; check [`is_column`] first.
pub fn ids(column: &[u8]) -> impl ExactSizeIterator<Item = u32> + Clone + '_ {
    column.chunks_exact(WIDTH).map(|b| u32::from_le_bytes(b.try_into().expect("chunks of 4")))
}

/// Log-probabilities of a column. Bytes beyond the last whole value are ignored; check [`is_column`]
/// first.
pub fn logprobs(column: &[u8]) -> impl ExactSizeIterator<Item = f32> + Clone + '_ {
    column.chunks_exact(WIDTH).map(|b| f32::from_le_bytes(b.try_into().expect("chunks of 4")))
}

/// True if `bytes` are whole values of a column.
pub fn is_column(bytes: &[u8]) -> bool {
    bytes.len().is_multiple_of(WIDTH)
}

/// Name of a prompt's content: 64 bits of BLAKE3 over its column. Not a secret, and too short to prove
/// equality against somebody who wants a collision.
pub fn prompt_digest(column: &[u8]) -> u64 {
    let hash = blake3::hash(column);
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("32 bytes"))
}
