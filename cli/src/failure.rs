//! How a command ends badly: what a person reads, and the exit status that a launcher reads.

use anabranch_runtime::Exit;
use anabranch_runtime::connect::ConnectError;
use anabranch_trainer as trainer;

/// What every command returns. A command may also end well with another status than 0.
pub type Outcome = Result<Exit, Failure>;

#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub text: String,
}

/// Gives an error its exit status where it has none of its own.
pub trait OrExit<T> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure>;
}

// === impl Failure ===

impl Failure {
    pub fn new(exit: Exit, text: impl ToString) -> Self {
        Self { exit, text: text.to_string() }
    }

    pub fn usage(text: impl ToString) -> Self {
        Self::new(Exit::Usage, text)
    }
}

impl<T, E: ToString> OrExit<T> for Result<T, E> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(exit, error))
    }
}

/// For errors that know their status, as sysexits number.
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
