//! The issued tokens, as hashes, in one file of the state directory. A leaked file lets nobody in.
//! The caller reads the wall clock.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{CertDigest, InvalidToken, JoinToken, Role};
use crate::clock::UnixSeconds;
use crate::private_file::{self, FileError};

const FILE: &str = "tokens.json";

/// Name of a token: the first 8 bytes of its hash, in hex. Safe to show and log.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenId(String);

/// Rights of an issued token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Role of the bearer.
    pub role: Role,
    /// Name of the job that the token is for.
    pub job: String,
    /// End of validity; `None`: valid until revoked.
    pub expires: Option<UnixSeconds>,
    /// True if the token lets nobody in any more.
    #[serde(default)]
    pub revoked: bool,
    /// Hash (blake3) of the whole token, in hex.
    hash: String,
}

/// Reason why a well-formed token does not let its bearer in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// No such token was issued here.
    #[error("this manager did not issue the join token, or its state directory was replaced")]
    Unknown,
    /// The validity ended.
    #[error("join token {id} expired {ago_s} s ago; issue a new one")]
    Expired {
        /// Name of the token.
        id: TokenId,
        /// Seconds since the end of validity.
        ago_s: u64,
    },
    /// An admin revoked the token.
    #[error("join token {id} was revoked")]
    Revoked {
        /// Name of the token.
        id: TokenId,
    },
    /// The token has another role than the request needs.
    #[error("join token {id} is for the role {has}, but this needs the role {needs}")]
    WrongRole {
        /// Name of the token.
        id: TokenId,
        /// Role of the token.
        has: Role,
        /// Role that the request needs.
        needs: Role,
    },
}

/// Reason why the store cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum TokenStoreError {
    /// The file of the store cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file of the store is not what the store wrote.
    #[error("{} is damaged: {source}. Delete it to revoke all tokens", path.display())]
    Damaged {
        /// File of the store.
        path: PathBuf,
        /// Error of the JSON parser.
        source: serde_json::Error,
    },
    /// A token cannot be made for this job name.
    #[error(transparent)]
    Token(#[from] InvalidToken),
    /// The named token was never issued here.
    #[error("no token {0} was issued here")]
    NoSuchToken(TokenId),
}

/// The issued tokens of one manager; every change is on disk before its method returns.
#[derive(Debug)]
pub struct TokenStore {
    path: PathBuf,
    ca: CertDigest,
    grants: BTreeMap<TokenId, Grant>,
}

impl TokenStore {
    /// Opens the store in `state_dir`, or an empty one if there is none. Issued tokens pin the
    /// authority `ca`.
    pub fn open(state_dir: &Path, ca: CertDigest) -> Result<TokenStore, TokenStoreError> {
        private_file::make_dir(state_dir)?;
        let path = state_dir.join(FILE);
        let grants = match private_file::read(&path)? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|source| TokenStoreError::Damaged { path: path.clone(), source })?,
            None => BTreeMap::new(),
        };
        Ok(TokenStore { path, ca, grants })
    }

    /// Issues a new token, valid for `ttl` from `now`; `None`: until revoked.
    pub fn issue(
        &mut self,
        role: Role,
        job: &str,
        ttl: Option<Duration>,
        now: UnixSeconds,
    ) -> Result<JoinToken, TokenStoreError> {
        let token = JoinToken::mint(self.ca, role, job)?;
        let grant = Grant {
            role,
            job: job.to_owned(),
            expires: ttl.map(|ttl| now + ttl),
            revoked: false,
            hash: token.hash().to_string(),
        };
        self.grants.insert(TokenId::of(&token), grant);
        self.save()?;
        Ok(token)
    }

    /// The rights of `token`, if `token` is valid at `now` and has the role `needs`.
    pub fn verify(
        &self,
        token: &JoinToken,
        needs: Role,
        now: UnixSeconds,
    ) -> Result<&Grant, TokenRefused> {
        let id = TokenId::of(token);
        let grant = self.grants.get(&id).ok_or(TokenRefused::Unknown)?;
        let hash = blake3::Hash::from_hex(&grant.hash).map_err(|_| TokenRefused::Unknown)?;
        if !token.verify(&hash) {
            return Err(TokenRefused::Unknown);
        }
        if grant.revoked {
            return Err(TokenRefused::Revoked { id });
        }
        if let Some(expires) = grant.expires.filter(|expires| *expires <= now) {
            return Err(TokenRefused::Expired { id, ago_s: now.0 - expires.0 });
        }
        if grant.role != needs {
            return Err(TokenRefused::WrongRole { id, has: grant.role, needs });
        }
        Ok(grant)
    }

    /// Revokes the token `id`: it lets nobody in any more.
    pub fn revoke(&mut self, id: &TokenId) -> Result<(), TokenStoreError> {
        let grant =
            self.grants.get_mut(id).ok_or_else(|| TokenStoreError::NoSuchToken(id.clone()))?;
        grant.revoked = true;
        self.save()
    }

    /// Forgets tokens that expired before `before`, so that the file does not grow for ever;
    /// returns their number. A forgotten token is unknown, hence still refused.
    pub fn forget_expired(&mut self, before: UnixSeconds) -> Result<usize, TokenStoreError> {
        let count = self.grants.len();
        self.grants.retain(|_, grant| grant.expires.is_none_or(|at| at > before));
        let dropped = count - self.grants.len();
        if dropped > 0 {
            self.save()?;
        }
        Ok(dropped)
    }

    /// All issued tokens, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&TokenId, &Grant)> {
        self.grants.iter()
    }

    fn save(&self) -> Result<(), TokenStoreError> {
        let text = serde_json::to_string_pretty(&self.grants).expect("grants are plain data");
        Ok(private_file::write(&self.path, &text)?)
    }
}

// === impl TokenId ===

impl TokenId {
    /// Name of `token`.
    pub fn of(token: &JoinToken) -> TokenId {
        TokenId(hex::encode(&token.hash().as_bytes()[..8]))
    }

    /// The name that a user typed; any text is a name, perhaps of no token.
    pub fn named(text: &str) -> TokenId {
        TokenId(text.trim().to_ascii_lowercase())
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const T0: UnixSeconds = UnixSeconds(1_000_000);

    fn store(dir: &Path) -> TokenStore {
        TokenStore::open(dir, CertDigest::of(b"ca")).expect("opens")
    }

    #[test]
    fn an_issued_token_is_good_after_a_restart_until_it_expires() {
        let dir = tempfile::tempdir().expect("dir");
        let hour = Some(Duration::from_secs(3600));
        let token = store(dir.path()).issue(Role::Trainer, "j", hour, T0).expect("issued");
        let again = store(dir.path());
        let last = T0 + Duration::from_secs(3599);
        assert_eq!(again.verify(&token, Role::Trainer, last).expect("good").job, "j");
        let late = T0 + Duration::from_secs(3605);
        assert!(matches!(
            again.verify(&token, Role::Trainer, late),
            Err(TokenRefused::Expired { ago_s: 5, .. })
        ));
    }

    #[test]
    fn a_token_of_another_role_is_refused_with_both_roles() {
        let dir = tempfile::tempdir().expect("dir");
        let mut store = store(dir.path());
        let token = store.issue(Role::Agent, "j", None, T0).expect("issued");
        let error = store.verify(&token, Role::Admin, T0).expect_err("an agent is no admin");
        assert!(error.to_string().contains("role agent, but this needs the role admin"));
    }

    #[test]
    fn a_revoked_token_stays_out_after_a_restart() {
        let dir = tempfile::tempdir().expect("dir");
        let mut first = store(dir.path());
        let token = first.issue(Role::Agent, "j", None, T0).expect("issued");
        let id = TokenId::of(&token);
        first.revoke(&TokenId::named(&id.to_string())).expect("revoked");
        let refused = store(dir.path()).verify(&token, Role::Agent, T0).expect_err("revoked");
        assert_eq!(refused, TokenRefused::Revoked { id });
        assert!(first.revoke(&TokenId::named("beef")).is_err());
    }

    #[test]
    fn a_foreign_token_is_unknown_and_expired_ones_are_forgotten() {
        let dir = tempfile::tempdir().expect("dir");
        let mut store = store(dir.path());
        let foreign = JoinToken::mint(CertDigest::of(b"ca"), Role::Agent, "j").expect("minted");
        assert_eq!(store.verify(&foreign, Role::Agent, T0), Err(TokenRefused::Unknown));
        let brief = store.issue(Role::Agent, "j", Some(Duration::ZERO), T0).expect("issued");
        store.issue(Role::Agent, "j", None, T0).expect("issued");
        assert_eq!(store.forget_expired(T0).expect("saved"), 1);
        assert_eq!(store.verify(&brief, Role::Agent, T0), Err(TokenRefused::Unknown));
        assert_eq!(store.iter().count(), 1);
    }

    #[test]
    fn the_file_is_private_and_holds_no_secret() {
        let dir = tempfile::tempdir().expect("dir");
        let token = store(dir.path()).issue(Role::Agent, "j", None, T0).expect("issued");
        let path = dir.path().join(FILE);
        let mode = std::fs::metadata(&path).expect("file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = std::fs::read_to_string(&path).expect("text");
        let secret = token.to_string().split('.').next_back().expect("secret").to_owned();
        assert!(!text.contains(&secret));
    }

    #[test]
    fn a_damaged_file_is_an_error_not_an_empty_store() {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join(FILE), "{").expect("write");
        let error = TokenStore::open(dir.path(), CertDigest::of(b"ca")).expect_err("damaged");
        assert!(matches!(error, TokenStoreError::Damaged { .. }));
    }
}
