//! Join tokens: one line of text that lets a process in and tells the process which manager to
//! trust, in the form `ab1.<sha256 of the CA certificate>.<role>.<job>.<secret>`. [`TokenStore`]
//! knows the issued tokens, as hashes. Which listener asks for a token is not decided here.

mod store;

use std::fmt;
use std::str::FromStr;

pub use store::{Grant, TokenId, TokenRefused, TokenStore, TokenStoreError};

/// Mark of the format, to tell a later format apart.
const PREFIX: &str = "ab1";
/// Size of the secret: 256 bits cannot be guessed, so the stored hash needs no salt and no
/// stretching.
const SECRET_BYTES: usize = 32;
/// Longest job name, in characters: names go into paths and labels.
const MAX_JOB_CHARS: usize = 64;

/// SHA-256 of a certificate's DER form.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CertDigest(pub [u8; 32]);

/// Rights of the bearer of a token. One token has one role.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// May attach engines.
    Agent,
    /// May open the job, submit, consume and publish.
    Trainer,
    /// May issue and revoke tokens and order engines.
    Admin,
}

/// A join token with its secret. Only `Display` shows the secret.
#[derive(Clone)]
pub struct JoinToken {
    ca: CertDigest,
    role: Role,
    job: String,
    secret: [u8; SECRET_BYTES],
}

/// Reason why a text is not a join token. The text is never repeated, because it may be a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    /// The number of parts is wrong.
    #[error("a join token has 5 parts separated by dots, this has {0}; copy the whole line")]
    Parts(usize),
    /// The mark of the format is missing.
    #[error("a join token starts with ab1; this is another format or not a token")]
    Prefix,
    /// A part is not hex, or has the wrong length.
    #[error("the {part} of the join token is not {bytes} bytes in hex; it was cut or altered")]
    Hex {
        /// Name of the part.
        part: &'static str,
        /// Length that the part must have, in bytes.
        bytes: usize,
    },
    /// The role is unknown.
    #[error("unknown role in the join token; it must be agent, trainer or admin")]
    Role,
    /// The job name has other characters or another length.
    #[error("a job name has 1 to 64 characters out of a-z, A-Z, 0-9, '-' and '_', unlike {job:?}")]
    Job {
        /// The name, cut to 64 characters.
        job: String,
    },
}

// === impl JoinToken ===

impl JoinToken {
    /// A new token with a random secret, worth nothing until a [`TokenStore`] knows the token.
    pub fn mint(ca: CertDigest, role: Role, job: &str) -> Result<JoinToken, InvalidToken> {
        check_job(job)?;
        let mut secret = [0; SECRET_BYTES];
        getrandom::fill(&mut secret).expect("the kernel gives random bytes");
        Ok(JoinToken { ca, role, job: job.to_owned(), secret })
    }

    /// Reads the text of a token; white space around it is ignored.
    pub fn parse(text: &str) -> Result<JoinToken, InvalidToken> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        let [prefix, ca, role, job, secret] = parts[..] else {
            return Err(InvalidToken::Parts(parts.len()));
        };
        if prefix != PREFIX {
            return Err(InvalidToken::Prefix);
        }
        check_job(job)?;
        Ok(JoinToken {
            ca: CertDigest(from_hex(ca, "certificate digest")?),
            role: role.parse()?,
            job: job.to_owned(),
            secret: from_hex(secret, "secret")?,
        })
    }

    /// True if `hash` equals [`JoinToken::hash`]. The comparison takes the same time either way.
    pub fn verify(&self, hash: &blake3::Hash) -> bool {
        // blake3's equality is constant in time.
        self.hash() == *hash
    }

    /// Hash of the whole text, so that no part of a token can be changed and still match.
    pub fn hash(&self) -> blake3::Hash {
        blake3::hash(self.to_string().as_bytes())
    }

    /// Digest of the certificate that the manager's chain must contain.
    pub fn ca(&self) -> CertDigest {
        self.ca
    }

    /// Role of the bearer.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Name of the job that the token is for.
    pub fn job(&self) -> &str {
        &self.job
    }
}

impl FromStr for JoinToken {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<JoinToken, InvalidToken> {
        JoinToken::parse(text)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let JoinToken { ca, role, job, secret } = self;
        write!(f, "{PREFIX}.{ca}.{role}.{job}.{}", hex::encode(secret))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}.{}, secret hidden)", self.role, self.job)
    }
}

// === impl CertDigest ===

impl CertDigest {
    /// Digest of the certificate `der`.
    pub fn of(der: &[u8]) -> CertDigest {
        let digest = ring::digest::digest(&ring::digest::SHA256, der);
        CertDigest(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}

impl fmt::Display for CertDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for CertDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CertDigest({self})")
    }
}

// === impl Role ===

impl FromStr for Role {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Role, InvalidToken> {
        match text {
            "agent" => Ok(Role::Agent),
            "trainer" => Ok(Role::Trainer),
            "admin" => Ok(Role::Admin),
            _ => Err(InvalidToken::Role),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Agent => "agent",
            Role::Trainer => "trainer",
            Role::Admin => "admin",
        })
    }
}

fn check_job(job: &str) -> Result<(), InvalidToken> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if (1..=MAX_JOB_CHARS).contains(&job.len()) && job.chars().all(allowed) {
        return Ok(());
    }
    Err(InvalidToken::Job { job: job.chars().take(MAX_JOB_CHARS).collect() })
}

fn from_hex<const N: usize>(text: &str, part: &'static str) -> Result<[u8; N], InvalidToken> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes).map_err(|_| InvalidToken::Hex { part, bytes: N })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken::mint(CertDigest::of(b"a certificate"), Role::Agent, "math-1").expect("valid job")
    }

    #[test]
    fn a_token_survives_being_written_and_read() {
        let token = token();
        let text = token.to_string();
        let back = JoinToken::parse(&format!(" {text}\n")).expect("parses");
        assert_eq!(back.to_string(), text);
        assert_eq!((back.role(), back.job(), back.ca()), (Role::Agent, "math-1", token.ca()));
        assert!(back.verify(&token.hash()));
        assert_eq!(text.split('.').count(), 5);
    }

    #[test]
    fn the_digest_is_sha256() {
        assert_eq!(
            CertDigest::of(b"abc").to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn no_part_can_be_changed() {
        let token = token();
        let text = token.to_string();
        for (from, to) in [(".agent.", ".admin."), (".math-1.", ".math-2.")] {
            let forged = JoinToken::parse(&text.replace(from, to)).expect("well formed");
            assert!(!forged.verify(&token.hash()), "{from}");
        }
        assert!(!super::tests::token().verify(&token.hash()));
    }

    #[test]
    fn debug_hides_the_secret() {
        let token = token();
        let secret = token.to_string().split('.').next_back().expect("secret").to_owned();
        assert!(!format!("{token:?}").contains(&secret));
    }

    #[test]
    fn malformed_texts_are_told_apart_without_repeating_them() {
        let text = token().to_string();
        assert_eq!(JoinToken::parse("hunter2").expect_err("short"), InvalidToken::Parts(1));
        let cut = JoinToken::parse(&text[..text.len() - 2]).expect_err("cut");
        assert_eq!(cut, InvalidToken::Hex { part: "secret", bytes: 32 });
        let old = text.replacen("ab1", "ab0", 1);
        assert_eq!(JoinToken::parse(&old).expect_err("old"), InvalidToken::Prefix);
        let boss = text.replace(".agent.", ".boss.");
        assert_eq!(JoinToken::parse(&boss).expect_err("role"), InvalidToken::Role);
        assert!(JoinToken::mint(CertDigest::of(b""), Role::Admin, "a.b").is_err());
        assert!(JoinToken::mint(CertDigest::of(b""), Role::Admin, "").is_err());
    }
}
