//! Addresses of a manager: `http://host:port`, `https://host:port`, or `file:PATH`, the announce
//! file that a manager writes when it listens. [`crate::connect()`] dials them.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::private_file::{self, FileError};
use crate::token::{InvalidToken, JoinToken};

/// An address of a manager, as a user writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `http://`: no TLS.
    Plain(Authority),
    /// `https://`: TLS, checked against the pin of a join token.
    Tls(Authority),
    /// `file:`: an announce file, read anew at every dial, so that a restarted manager is found
    /// again.
    File(PathBuf),
}

/// Host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// Name or IP address, an IPv6 address without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// The content of an announce file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Announce {
    /// Address of the manager, `http://` or `https://`.
    pub url: String,
    /// Text of a join token, for which the file is readable by its owner only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// Reason why an address cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The text has none of the allowed forms.
    #[error(
        "{text:?} is not a manager's address; write http://HOST:PORT, https://HOST:PORT or \
         file:PATH (the file that the manager's --announce writes)"
    )]
    Form {
        /// The text as given.
        text: String,
    },
    /// The announce file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The announce file does not exist.
    #[error("there is no announce file {}; is the manager running with --announce?", path.display())]
    NoFile {
        /// The announce file.
        path: PathBuf,
    },
    /// The announce file has another content.
    #[error("the announce file {} is not JSON with a \"url\": {source}", path.display())]
    BadFile {
        /// The announce file.
        path: PathBuf,
        /// Error of the JSON parser.
        source: serde_json::Error,
    },
    /// The announce file names an announce file.
    #[error("the announce file {} names another file; it must name a URL", path.display())]
    Loop {
        /// The announce file.
        path: PathBuf,
    },
    /// The token in the announce file is malformed.
    #[error("the token in the announce file {}: {source}", path.display())]
    BadToken {
        /// The announce file.
        path: PathBuf,
        /// The mistake in the token.
        source: InvalidToken,
    },
}

// === impl Endpoint ===

impl Endpoint {
    /// Reads an address. The port defaults to 80 or 443; a path after the port is refused, except a
    /// lone slash.
    pub fn parse(text: &str) -> Result<Endpoint, EndpointError> {
        let text = text.trim();
        let form = || EndpointError::Form { text: text.to_owned() };
        if let Some(path) = text.strip_prefix("file:").filter(|path| !path.is_empty()) {
            return Ok(Endpoint::File(path.strip_prefix("//").unwrap_or(path).into()));
        }
        let uri: http::Uri = text.parse().map_err(|_| form())?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(form());
        }
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(form)?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let authority = |default| Authority { host, port: uri.port_u16().unwrap_or(default) };
        match uri.scheme_str() {
            Some("http") => Ok(Endpoint::Plain(authority(80))),
            Some("https") => Ok(Endpoint::Tls(authority(443))),
            _ => Err(form()),
        }
    }

    /// The address to dial: this one, or what the announce file names, with the file's token. Never
    /// [`Endpoint::File`].
    pub fn resolve(&self) -> Result<(Endpoint, Option<JoinToken>), EndpointError> {
        let Endpoint::File(path) = self else { return Ok((self.clone(), None)) };
        let announce = Announce::read(path)?;
        let token = announce.token.as_deref().map(JoinToken::parse).transpose();
        let token =
            token.map_err(|source| EndpointError::BadToken { path: path.clone(), source })?;
        match Endpoint::parse(&announce.url)? {
            Endpoint::File(_) => Err(EndpointError::Loop { path: path.clone() }),
            endpoint => Ok((endpoint, token)),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Plain(at) => write!(f, "http://{at}"),
            Endpoint::Tls(at) => write!(f, "https://{at}"),
            Endpoint::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

// === impl Announce ===

impl Announce {
    /// Writes the announce file at `path`, replacing an older one in one step; readable by its
    /// owner only.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        let text = serde_json::to_string(self).expect("an announcement is plain data");
        private_file::write(path, &(text + "\n"))
    }

    /// Reads the announce file at `path`.
    pub fn read(path: &Path) -> Result<Announce, EndpointError> {
        let text = private_file::read(path)?
            .ok_or_else(|| EndpointError::NoFile { path: path.to_owned() })?;
        serde_json::from_str(&text)
            .map_err(|source| EndpointError::BadFile { path: path.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::{CertDigest, Role};

    #[test]
    fn addresses_are_read_and_written_alike() {
        for text in ["http://127.0.0.1:5000", "https://[::1]:5000", "https://m.example:443"] {
            assert_eq!(Endpoint::parse(text).expect("valid").to_string(), text);
        }
        assert_eq!(Endpoint::parse("http://host/").expect("valid").to_string(), "http://host:80");
        let file = Endpoint::parse("file:///run/m.json").expect("valid");
        assert_eq!(file, Endpoint::File("/run/m.json".into()));
    }

    #[test]
    fn other_forms_are_refused_with_the_allowed_ones() {
        for text in ["", "host:5000", "ftp://h:1", "http://", "http://h:1/path", "file:", "h"] {
            let error = Endpoint::parse(text).expect_err(text).to_string();
            assert!(error.contains("https://HOST:PORT"), "{error}");
        }
    }

    #[test]
    fn an_announce_file_gives_address_and_token() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("manager.json");
        let endpoint = Endpoint::File(path.clone());
        assert!(matches!(endpoint.resolve(), Err(EndpointError::NoFile { .. })));
        let token = JoinToken::mint(CertDigest::of(b"ca"), Role::Agent, "j").expect("minted");
        let url = "https://127.0.0.1:5000".to_owned();
        let announce = Announce { url, token: Some(token.to_string()) };
        announce.write(&path).expect("written");
        let (to, read) = endpoint.resolve().expect("resolved");
        assert_eq!(to.to_string(), announce.url);
        assert_eq!(read.expect("token").to_string(), token.to_string());
        std::fs::write(&path, r#"{"url":"file:/elsewhere"}"#).expect("written");
        assert!(matches!(endpoint.resolve(), Err(EndpointError::Loop { .. })));
    }
}
