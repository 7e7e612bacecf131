//! Rights of callers. With tokens on, every call carries `authorization: Bearer ab1....`; an agent may
//! put its token into `Hello` instead. Which tokens are good is the store's matter.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anabranch_runtime::token::TokenStoreError;
use anabranch_runtime::{CertDigest, JoinToken, Role, TokenStore, UnixSeconds};
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Tokens issued or revoked by another process count after so long.
const RELOAD: Duration = Duration::from_secs(1);

pub(crate) struct Auth {
    /// `None`: nobody is asked for a token.
    known: Option<Mutex<Known>>,
}

struct Known {
    store: TokenStore,
    state_dir: PathBuf,
    ca: CertDigest,
    read_at: Instant,
}

impl Auth {
    pub fn open() -> Self {
        Self { known: None }
    }

    pub fn with_tokens(state_dir: &Path, ca: CertDigest) -> Result<Self, TokenStoreError> {
        let store = TokenStore::open(state_dir, ca)?;
        let state_dir = state_dir.to_owned();
        let known = Known { store, state_dir, ca, read_at: Instant::now() };
        Ok(Self { known: Some(Mutex::new(known)) })
    }

    /// `text` is the whole token. The error is for a person.
    pub fn check(&self, text: Option<&str>, roles: &[Role]) -> Result<(), String> {
        let Some(known) = &self.known else { return Ok(()) };
        let text = text.filter(|text| !text.is_empty()).ok_or_else(|| missing(roles))?;
        let token = JoinToken::parse(text).map_err(|error| error.to_string())?;
        let mut known = known.lock().expect("no code panics while it holds this lock");
        known.refresh();
        let now = UnixSeconds::now();
        // A token has one role; the refusal that names the role it was meant for helps most.
        let needs = roles.iter().find(|role| **role == token.role()).unwrap_or(&roles[0]);
        known.store.verify(&token, *needs, now).map(|_| ()).map_err(|error| error.to_string())
    }

    /// For gRPC: the token is in the call's metadata.
    pub fn check_call(&self, metadata: &MetadataMap, roles: &[Role]) -> Result<(), Status> {
        self.check(bearer(metadata), roles).map_err(Status::unauthenticated)
    }
}

impl Known {
    fn refresh(&mut self) {
        if self.read_at.elapsed() < RELOAD {
            return;
        }
        self.read_at = Instant::now();
        match TokenStore::open(&self.state_dir, self.ca) {
            Ok(store) => self.store = store,
            Err(error) => {
                tracing::warn!(%error, "cannot read the tokens again; the earlier ones stay")
            }
        }
    }
}

pub(crate) fn bearer(metadata: &MetadataMap) -> Option<&str> {
    metadata.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ")
}

fn missing(roles: &[Role]) -> String {
    let roles: Vec<String> = roles.iter().map(Role::to_string).collect();
    format!(
        "this manager asks for a join token of the role {}; pass the one it printed at its start",
        roles.join(" or ")
    )
}
