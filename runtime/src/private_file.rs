//! Files with secrets: readable by their owner only, replaced in one step.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A file of the state directory that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} {}: {source}{}", path.display(), hint(source))]
pub struct FileError {
    /// The failed operation: "read", "write" or "create".
    pub verb: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// Error of the operating system.
    pub source: io::Error,
}

/// Replaces the file at `path`: a reader sees the old text or the new one, and a crash leaves one
/// of them.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), FileError> {
    let failed = |source| FileError { verb: "write", path: path.to_owned(), source };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let part = path.with_file_name(name);
    write_and_sync(&part, text).map_err(failed)?;
    fs::rename(&part, path).map_err(failed)?;
    sync_parent(path).map_err(failed)
}

/// The text of the file at `path`; `None` if there is no such file. A mode that gives others access
/// is tightened.
pub(crate) fn read(path: &Path) -> Result<Option<String>, FileError> {
    let failed = |source| FileError { verb: "read", path: path.to_owned(), source };
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    close_to_others(path);
    Ok(Some(text))
}

/// Creates the state directory, for its owner only; an existing one is left as it is.
pub(crate) fn make_dir(path: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| FileError {
        verb: "create",
        path: path.to_owned(),
        source,
    })
}

/// Tightens the mode of `path`. Fails silently for a process that does not own the file, such as a
/// reader of a shared announce file.
fn close_to_others(path: &Path) {
    let Ok(mode) = fs::metadata(path).map(|meta| meta.permissions().mode() & 0o777) else { return };
    if mode & 0o077 != 0 && fs::set_permissions(path, fs::Permissions::from_mode(0o600)).is_ok() {
        let mode = format!("{mode:o}");
        tracing::warn!(path = %path.display(), mode, "a secret file was open to others; closed it");
    }
}

fn write_and_sync(path: &Path, text: &str) -> io::Result<()> {
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(dir) if dir.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => ". Choose a directory of your own with --state-dir",
        _ => "",
    }
}
