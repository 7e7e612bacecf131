//! Why an agent ended, and what its process's exit status says of it.

use std::time::Duration;

use anabranch_runtime::exit::Exit;

use crate::config::BadConfig;

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Config(#[from] BadConfig),
    #[error("--manager: {0}")]
    Manager(anabranch_runtime::ConnectError),
    #[error("--token: {0}")]
    Token(String),
    #[error("{0}")]
    Staging(String),
    #[error("cannot serve weights to peers: {0}")]
    Listen(String),
    #[error(transparent)]
    Start(#[from] anabranch_runtime::process::StartError),
    #[error("the manager refused this agent: {0}")]
    Refused(String),
    #[error(
        "the job wants log-probabilities by {wanted}, this engine gives {offered}; start it otherwise \
         (SGLang: SGLANG_RETURN_ORIGINAL_LOGPROB=1 gives raw ones) and say so with --logprob-convention"
    )]
    Convention { wanted: String, offered: String },
    #[error("the engine holds weights that nobody vouches for: {0}; restart it")]
    Unverified(String),
    #[error(
        "left at the drain's deadline with {running} samples running and {unacknowledged_bytes} bytes that \
         the manager did not take; they are generated again elsewhere"
    )]
    DrainCut { running: usize, unacknowledged_bytes: usize },
    #[error("still busy {waited:?} after everything was told to stop: {tasks}")]
    Stuck { tasks: String, waited: Duration },
}

impl AgentError {
    pub fn exit_code(&self) -> u8 {
        match self {
            AgentError::Config(_) => Exit::Usage.code(),
            AgentError::Manager(error) => error.exit_code(),
            AgentError::Token(_) => Exit::Usage.code(),
            AgentError::Staging(_) | AgentError::Listen(_) => Exit::CannotCreate.code(),
            AgentError::Start(_) => Exit::Unavailable.code(),
            AgentError::Refused(_) => Exit::NoPermission.code(),
            AgentError::Convention { .. } => Exit::Usage.code(),
            AgentError::Unverified(_) => Exit::Data.code(),
            AgentError::DrainCut { .. } | AgentError::Stuck { .. } => Exit::TryAgain.code(),
        }
    }
}
