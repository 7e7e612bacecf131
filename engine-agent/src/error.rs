//! Reasons why an agent ended, and the exit status of its process for each.

use std::time::Duration;

use anabranch_runtime::exit::Exit;

use crate::config::BadConfig;

/// Reason why [`crate::run`] ended without success.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] BadConfig),
    /// The manager's address cannot be used.
    #[error("--manager: {0}")]
    Manager(anabranch_runtime::ConnectError),
    /// The join token is malformed.
    #[error("--token: {0}")]
    Token(String),
    /// The staging area cannot be opened.
    #[error("{0}")]
    Staging(String),
    /// The listener for peers cannot be opened.
    #[error("cannot serve weights to peers: {0}")]
    Listen(String),
    /// The engine process cannot be started.
    #[error(transparent)]
    Start(#[from] anabranch_runtime::process::StartError),
    /// The manager refused the agent, for good.
    #[error("the manager refused this agent: {0}")]
    Refused(String),
    /// The job wants another `logprobs_mode` than the engine offers.
    #[error(
        "the job wants log-probabilities by {wanted}, this engine gives {offered}; start it otherwise \
         (SGLang: SGLANG_RETURN_ORIGINAL_LOGPROB=1 gives raw ones) and say so with --logprobs-mode"
    )]
    LogprobsMode {
        /// The mode that the job wants.
        wanted: String,
        /// The modes that the engine offers.
        offered: String,
    },
    /// The engine has weights that nobody vouches for.
    #[error("the engine holds weights that nobody vouches for: {0}; restart it")]
    Unverified(String),
    /// The drain's deadline passed before the manager had everything.
    #[error(
        "left at the drain's deadline with {running} samples running and {unacknowledged_bytes} bytes that \
         the manager did not take; they are generated again elsewhere"
    )]
    DrainCut {
        /// Attempts that still ran.
        running: usize,
        /// Bytes that the manager did not take.
        unacknowledged_bytes: usize,
    },
    /// Tasks did not end in time.
    #[error("still busy {waited:?} after everything was told to stop: {tasks}")]
    Stuck {
        /// Names of the tasks.
        tasks: String,
        /// Time waited.
        waited: Duration,
    },
}

impl AgentError {
    /// Exit status of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            AgentError::Config(_) => Exit::Usage.code(),
            AgentError::Manager(error) => error.exit_code(),
            AgentError::Token(_) => Exit::Usage.code(),
            AgentError::Staging(_) | AgentError::Listen(_) => Exit::CannotCreate.code(),
            AgentError::Start(_) => Exit::Unavailable.code(),
            AgentError::Refused(_) => Exit::NoPermission.code(),
            AgentError::LogprobsMode { .. } => Exit::Usage.code(),
            AgentError::Unverified(_) => Exit::Data.code(),
            AgentError::DrainCut { .. } | AgentError::Stuck { .. } => Exit::TryAgain.code(),
        }
    }
}
