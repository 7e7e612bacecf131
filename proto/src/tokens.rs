//! Token columns: `u32` and `f32` as little-endian bytes, never cast in place (they are not aligned).

use bytes::Bytes;

/// Bytes of one token id or one log-probability.
pub const WIDTH: usize = 4;

pub fn encode_ids(ids: &[u32]) -> Bytes {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>().into()
}

pub fn encode_logprobs(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

/// The ids of a column; bytes beyond the last whole id are ignored (check [`is_column`] first).
pub fn ids(column: &[u8]) -> impl ExactSizeIterator<Item = u32> + Clone + '_ {
    column.chunks_exact(WIDTH).map(|b| u32::from_le_bytes(b.try_into().expect("chunks of 4")))
}

pub fn logprobs(column: &[u8]) -> impl ExactSizeIterator<Item = f32> + Clone + '_ {
    column.chunks_exact(WIDTH).map(|b| f32::from_le_bytes(b.try_into().expect("chunks of 4")))
}

pub fn is_column(bytes: &[u8]) -> bool {
    bytes.len().is_multiple_of(WIDTH)
}

/// Names a prompt's content. Not a secret and not for untrusted equality: 64 bits of BLAKE3.
pub fn prompt_digest(column: &[u8]) -> u64 {
    let hash = blake3::hash(column);
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("32 bytes"))
}
