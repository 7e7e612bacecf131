//! Reading settings files. What the settings mean belongs to the crate that owns the type; the type
//! must carry `#[serde(deny_unknown_fields)]` on every table so that a misspelt key is an error here.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::exit::Exit;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the settings file {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{0}")]
    Invalid(InvalidConfig),
}

/// Where in a file the settings are wrong, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidConfig {
    pub origin: String,
    /// Line and column, from 1; none where the file as a whole lacks something.
    pub at: Option<(usize, usize)>,
    /// The source text that was refused: a key or a value.
    pub found: Option<String>,
    /// What is wrong, with the names that are allowed.
    pub message: String,
}

impl ConfigError {
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

/// Reads the TOML file at `path`.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(&text, &path.display().to_string())
}

/// Reads TOML text; `origin` is what errors call it.
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

/// A refused table spans many lines; naming it whole helps nobody.
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
