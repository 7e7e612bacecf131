//! Reading of settings files in TOML. The crate that owns a settings type owns the meaning; the
//! type carries `#[serde(deny_unknown_fields)]` on every table, so that a misspelt key is an error
//! here.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::exit::Exit;

/// Reason why settings could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be opened or is not UTF-8.
    #[error("cannot read the settings file {}: {source}", path.display())]
    Read {
        /// The settings file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The text is no TOML, or does not fit the settings type.
    #[error("{0}")]
    Invalid(InvalidConfig),
}

/// Place and kind of a mistake in a settings text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidConfig {
    /// Name of the text, usually the path of its file.
    pub origin: String,
    /// Line and column, from 1; `None` if the text as a whole lacks something.
    pub at: Option<(usize, usize)>,
    /// The key or value that was refused, as written; `None` if longer than one line.
    pub found: Option<String>,
    /// The mistake in words, with the names that are allowed.
    pub message: String,
}

impl ConfigError {
    /// Exit status 64: settings are wrong, and trying again cannot help.
    pub fn exit_code(&self) -> u8 {
        Exit::Usage.code()
    }
}

impl fmt::Display for InvalidConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.origin)?;
        if let Some((line, column)) = self.at {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.message)?;
        match &self.found {
            Some(found) if !self.message.contains(found.as_str()) => write!(f, " (at `{found}`)"),
            _ => Ok(()),
        }
    }
}

/// Reads the TOML file at `path` into `T`.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(&text, &path.display().to_string())
}

/// Reads TOML text into `T`; errors name the text by `origin`.
pub fn parse<T: DeserializeOwned>(text: &str, origin: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let span = error.span().filter(|span| span.end <= text.len());
        ConfigError::Invalid(InvalidConfig {
            origin: origin.to_owned(),
            at: span.as_ref().map(|span| line_and_column(text, span.start)),
            found: span.and_then(|span| one_line(text.get(span)?)),
            message: error.message().replace('\n', "; "),
        })
    })
}

fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    (line, column)
}

/// The refused text, unless it spans several lines or 60 bytes: a whole table in an error helps
/// nobody.
fn one_line(found: &str) -> Option<String> {
    (!found.is_empty() && !found.contains('\n') && found.len() <= 60).then(|| found.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::io::Write;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        listen: String,
        #[serde(default)]
        fleet: Fleet,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Fleet {
        lease_ms: u64,
        wave: Option<u32>,
    }

    fn refused(text: &str) -> String {
        parse::<Settings>(text, "a.toml").expect_err("refused").to_string()
    }

    #[test]
    fn an_unknown_key_is_named_with_its_place_and_the_allowed_names() {
        assert_eq!(
            refused("listen = \"x\"\n[fleet]\n  lease_sm = 3\n"),
            "a.toml:3:3: unknown field `lease_sm`, expected `lease_ms` or `wave`"
        );
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_quoted() {
        assert_eq!(
            refused("listen = 5000"),
            "a.toml:1:10: invalid type: integer `5000`, expected a string"
        );
    }

    #[test]
    fn a_missing_key_and_broken_syntax_are_told_apart() {
        assert!(refused("[fleet]\nlease_ms = 1").contains("missing field `listen`"));
        let broken = refused("listen = \"x");
        assert!(broken.starts_with("a.toml:1:"), "{broken}");
    }

    #[test]
    fn a_file_is_read_and_its_path_is_in_the_errors() {
        let mut file = tempfile::NamedTempFile::new().expect("temp file");
        writeln!(file, "listen = \"x\"\n[fleet]\nlease_ms = 1").expect("write");
        let settings: Settings = load(file.path()).expect("valid");
        assert_eq!(settings.fleet, Fleet { lease_ms: 1, wave: None });
        let error = load::<Settings>(Path::new("/nonexistent/a.toml")).expect_err("no such file");
        assert!(error.to_string().contains("/nonexistent/a.toml"));
        assert_eq!(error.exit_code(), 64);
    }
}
