//! Exit statuses of our processes, after sysexits(3): launchers can tell "fix the settings" from
//! "try again". Only the command line exits a process with one.

/// Exit status of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Success.
    Ok = 0,
    /// The command ran and the answer is no: a failed check, a refused request.
    Failed = 1,
    /// Wrong arguments or settings; trying again cannot help.
    Usage = 64,
    /// Something read was malformed: a checkpoint, a journal.
    Data = 65,
    /// A peer that is needed cannot be reached; trying again may help.
    Unavailable = 69,
    /// A bug of ours.
    Internal = 70,
    /// A file, directory or listener cannot be created.
    CannotCreate = 73,
    /// Reading or writing failed.
    Io = 74,
    /// A limit passed or a shutdown took too long; trying again may help.
    TryAgain = 75,
    /// A peer speaks another protocol or version.
    Protocol = 76,
    /// A token was refused, or an address would be exposed.
    NoPermission = 77,
}

impl Exit {
    /// The number that the process exits with.
    pub const fn code(self) -> u8 {
        self as u8
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}
