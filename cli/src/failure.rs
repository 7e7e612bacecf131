//! Failures of a command: the message that a person reads, and the exit status that a launcher reads.

use anabranch_runtime::Exit;
use anabranch_runtime::connect::ConnectError;
use anabranch_trainer as trainer;

/// Result of every command. A command may also end well with another status than 0.
pub type Outcome = Result<Exit, Failure>;

/// A message with its exit status.
#[derive(Debug)]
pub struct Failure {
    /// The exit status.
    pub exit: Exit,
    /// The message.
    pub text: String,
}

/// Gives an exit status to an error that has none.
pub trait OrExit<T> {
    /// Turns an error into a failure with the status `exit`.
    fn or_exit(self, exit: Exit) -> Result<T, Failure>;
}

// === impl Failure ===

impl Failure {
    /// A failure with the status `exit`.
    pub fn new(exit: Exit, text: impl ToString) -> Self {
        Self { exit, text: text.to_string() }
    }

    /// A failure because of wrong arguments.
    pub fn usage(text: impl ToString) -> Self {
        Self::new(Exit::Usage, text)
    }
}

impl<T, E: ToString> OrExit<T> for Result<T, E> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(exit, error))
    }
}

/// The exit status of an error that knows its own, by the numbers of sysexits.
pub fn exit_of(code: u8) -> Exit {
    [
        Exit::Usage,
        Exit::Data,
        Exit::Unavailable,
        Exit::Internal,
        Exit::CannotCreate,
        Exit::Io,
        Exit::TryAgain,
        Exit::Protocol,
        Exit::NoPermission,
    ]
    .into_iter()
    .find(|exit| exit.code() == code)
    .unwrap_or(Exit::Failed)
}

// === conversions ===

impl From<trainer::Error> for Failure {
    fn from(error: trainer::Error) -> Self {
        use trainer::Error as E;
        let exit = match &error {
            E::Invalid(_) | E::Address { .. } => Exit::Usage,
            E::Unreachable { .. } => Exit::Unavailable,
            E::NotPermitted { .. } => Exit::NoPermission,
            E::Malformed { .. } | E::Protocol { .. } => Exit::Protocol,
            _ => Exit::Failed,
        };
        Failure::new(exit, error)
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        Failure::new(exit_of(error.exit_code()), error)
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        use tonic::Code;
        let exit = match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => Exit::NoPermission,
            Code::Unavailable | Code::Unknown | Code::Cancelled => Exit::Unavailable,
            Code::InvalidArgument => Exit::Usage,
            Code::Unimplemented => Exit::Protocol,
            _ => Exit::Failed,
        };
        Failure::new(exit, format!("the manager says: {}", status.message()))
    }
}
