//! Grants: permissions to move the bytes of one version. The manager mints a grant with the key that it
//! shares with one holder; the receiver shows it to that holder. This file owns its form and its MAC. The
//! holder counts the time to live, from the first use, since no clock crosses the wire.

use bytes::Bytes;
use serde::Serialize;

use crate::version::{Root, Version};

/// Secret that the manager shares with one holder of versions; it never reaches a receiver.
pub type ServeKey = [u8; 32];

/// Most bytes of a grant on the wire: two ids and fixed fields.
pub const MAX_GRANT_BYTES: usize = 1024;

const FORMAT: u8 = 1;
const DOMAIN: &[u8] = b"anabranch data-plane grant 1";
const FIXED_BYTES: usize = 1 + 1 + 4 + 8 + 32 + 8 + 8;
const MAC_BYTES: usize = 32;

/// Permission for one receiver to move the chunks of one version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Grant {
    /// Job that the version belongs to.
    pub job: String,
    /// Version whose chunks may be moved.
    pub version: Version,
    /// Bearer of the grant: an engine id or a relay id.
    pub receiver: String,
    /// Direction that the chunks may move in.
    pub role: Role,
    /// Time to live in milliseconds, counted by the holder from the first use.
    pub ttl_ms: u64,
    /// Number that makes a new grant differ from an older one of equal content, so that it starts a new
    /// `ttl_ms`.
    pub nonce: u64,
}

/// Right of a grant's bearer at the holder that shares the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[repr(u8)]
pub enum Role {
    /// The bearer may read chunks of the version.
    Fetch = 1,
    /// The bearer may send chunks of the version: it is a source that dialled its receiver.
    Feed = 2,
}

/// Reason to refuse a grant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum GrantError {
    /// The bytes, so many, have not the form of a grant.
    #[error("not a grant: {0} bytes")]
    Malformed(usize),
    /// The MAC does not fit the key.
    #[error("the grant was made with another key: by another manager, or for another holder")]
    Forged,
    /// The grant names another job.
    #[error("the grant is for job `{granted}`, this holder serves `{serves}`")]
    Job { granted: String, serves: String },
    /// The grant names another version.
    #[error("the grant is for {granted}, asked was {asked}")]
    Version { granted: Version, asked: Version },
    /// The grant gives the other role.
    #[error("the grant is for {0:?}")]
    Role(Role),
    /// The time to live is over.
    #[error(
        "the grant of `{receiver}` expired: its {ttl_ms} ms ended {ago_ms} ms ago; ask the manager again"
    )]
    Expired { receiver: String, ttl_ms: u64, ago_ms: u64 },
}

// === impl Grant ===

impl Grant {
    /// Bytes of the grant for the holder that shares `key`.
    pub fn mint(&self, key: &ServeKey) -> Bytes {
        let mut out = Vec::with_capacity(128);
        out.extend_from_slice(&[FORMAT, self.role as u8]);
        out.extend_from_slice(&self.version.epoch.to_le_bytes());
        out.extend_from_slice(&self.version.number.to_le_bytes());
        out.extend_from_slice(&self.version.root.0);
        out.extend_from_slice(&self.ttl_ms.to_le_bytes());
        out.extend_from_slice(&self.nonce.to_le_bytes());
        for text in [&self.job, &self.receiver] {
            out.extend_from_slice(&(text.len() as u16).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        seal(key, out).into()
    }

    /// Reads the grant in `bytes`, if it was minted with `key`. The caller checks job, version, role and
    /// expiry.
    pub fn verify(key: &ServeKey, bytes: &[u8]) -> Result<Grant, GrantError> {
        let malformed = || GrantError::Malformed(bytes.len());
        let body_len = bytes.len().checked_sub(MAC_BYTES).ok_or_else(malformed)?;
        let (body, tag) = bytes.split_at(body_len);
        let tag: [u8; MAC_BYTES] = tag.try_into().expect("split at its length");
        // blake3::Hash compares in constant time.
        if mac(key, body) != blake3::Hash::from_bytes(tag) {
            return Err(GrantError::Forged);
        }
        Self::parse(body).ok_or_else(malformed)
    }

    /// Reads a grant without checking its MAC: for its bearer, which has no key and takes bytes from a
    /// place (shared memory, a directory) where no holder checks it.
    pub fn claims(bytes: &[u8]) -> Option<Grant> {
        Self::parse(bytes.get(..bytes.len().checked_sub(MAC_BYTES)?)?)
    }

    fn parse(body: &[u8]) -> Option<Grant> {
        let (fixed, mut rest) = body.split_at_checked(FIXED_BYTES)?;
        let number = |at: usize| u64::from_le_bytes(fixed[at..at + 8].try_into().expect("8 bytes"));
        let role = match (fixed[0], fixed[1]) {
            (FORMAT, 1) => Role::Fetch,
            (FORMAT, 2) => Role::Feed,
            _ => return None,
        };
        let epoch = u32::from_le_bytes(fixed[2..6].try_into().expect("4 bytes"));
        let root = Root(fixed[14..46].try_into().expect("32 bytes"));
        let version = Version { epoch, number: number(6), root };
        let (ttl_ms, nonce) = (number(46), number(54));
        let (job, receiver) = (text(&mut rest)?, text(&mut rest)?);
        rest.is_empty().then_some(Grant { job, version, receiver, role, ttl_ms, nonce })
    }
}

fn text(rest: &mut &[u8]) -> Option<String> {
    let (len, tail) = rest.split_at_checked(2)?;
    let len = u16::from_le_bytes(len.try_into().expect("2 bytes"));
    let (text, tail) = tail.split_at_checked(len.into())?;
    *rest = tail;
    String::from_utf8(text.to_vec()).ok()
}

/// Appends to `said` its MAC with `key`: the form in which a grant crosses the wire.
pub fn seal(key: &ServeKey, mut said: Vec<u8>) -> Vec<u8> {
    let tag = mac(key, &said);
    said.extend_from_slice(tag.as_bytes());
    said
}

fn mac(key: &ServeKey, body: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(DOMAIN).update(body);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant() -> Grant {
        let version = Version { epoch: 3, number: 70_000_000_000, root: Root([9; 32]) };
        let (job, receiver) = ("math".to_owned(), "engine-1".to_owned());
        Grant { job, version, receiver, role: Role::Fetch, ttl_ms: 60_000, nonce: 1 }
    }

    #[test]
    fn a_grant_is_read_back_by_the_holder_of_the_key_only() {
        let bytes = grant().mint(&[5; 32]);
        assert!(bytes.len() <= MAX_GRANT_BYTES);
        assert_eq!(Grant::verify(&[5; 32], &bytes), Ok(grant()));
        assert_eq!(Grant::claims(&bytes), Some(grant()));
        assert_eq!((Grant::claims(&[]), Grant::claims(&[1; 40])), (None, None));
        assert_eq!(Grant::verify(&[6; 32], &bytes), Err(GrantError::Forged));
    }

    #[test]
    fn any_changed_or_missing_byte_is_refused() {
        let bytes = grant().mint(&[5; 32]);
        for ix in 0..bytes.len() {
            let mut forged = bytes.to_vec();
            forged[ix] ^= 1;
            assert_eq!(Grant::verify(&[5; 32], &forged), Err(GrantError::Forged), "byte {ix}");
            assert!(Grant::verify(&[5; 32], &bytes[..ix]).is_err(), "cut at {ix}");
        }
    }

    #[test]
    fn an_authentic_body_of_another_format_is_malformed_not_a_panic() {
        for body in [&[][..], &[9; 70], &[1, 1, 0]] {
            let mut bytes = body.to_vec();
            bytes.extend_from_slice(mac(&[5; 32], body).as_bytes());
            assert!(matches!(Grant::verify(&[5; 32], &bytes), Err(GrantError::Malformed(_))));
        }
    }
}
