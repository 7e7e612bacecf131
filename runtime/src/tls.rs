//! TLS of the control plane: the manager's own certificate authority, the listener's settings, the
//! client's pin. A client accepts exactly the authority whose digest its join token carries; there
//! is no other trust.

mod pin;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::private_file::{self, FileError};
use crate::token::CertDigest;

pub use pin::{PinMismatch, pinned_client_config};

const CA_NAME: &str = "Anabranch manager CA";
const CERT_FILE: &str = "ca-cert.pem";
const KEY_FILE: &str = "ca-key.pem";

/// Reason why certificates cannot be read, made or used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of the authority cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// One of the authority's two files is missing.
    #[error(
        "{} and {} must both exist or both be missing; restore the lost one, or delete the other \
         to start a new authority (all join tokens then become void)", cert.display(), key.display()
    )]
    Half {
        /// File of the certificate.
        cert: PathBuf,
        /// File of the key.
        key: PathBuf,
    },
    /// The certificate file has another content.
    #[error("{} is not a PEM certificate: {source}", path.display())]
    BadCert {
        /// File of the certificate.
        path: PathBuf,
        /// Error of the PEM parser.
        source: rustls::pki_types::pem::Error,
    },
    /// The key file has another content.
    #[error("{} is not a PEM private key: {source}", path.display())]
    BadKey {
        /// File of the key.
        path: PathBuf,
        /// Error of the PEM parser.
        source: rcgen::Error,
    },
    /// No certificate can be made for these names.
    #[error("cannot make a certificate for {names:?}: {source}")]
    Make {
        /// Names that the certificate should hold.
        names: Vec<String>,
        /// Error of the certificate library.
        source: rcgen::Error,
    },
    /// The TLS library refuses the certificate or the key.
    #[error("cannot use the certificate and key: {0}")]
    Use(#[from] rustls::Error),
}

/// The manager's certificate authority, which signs only this manager's listeners.
pub struct Ca {
    cert: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    /// The authority kept in `state_dir`. The first start makes one, with a key that only the owner
    /// can read.
    pub fn load_or_create(state_dir: &Path) -> Result<Ca, TlsError> {
        private_file::make_dir(state_dir)?;
        let (cert_path, key_path) = (state_dir.join(CERT_FILE), state_dir.join(KEY_FILE));
        match (private_file::read(&cert_path)?, private_file::read(&key_path)?) {
            (Some(cert), Some(key)) => Ca::from_pem((&cert_path, &cert), (&key_path, &key)),
            (None, None) => Ca::create(&cert_path, &key_path),
            _ => Err(TlsError::Half { cert: cert_path, key: key_path }),
        }
    }

    /// Digest of the authority's certificate, which join tokens carry.
    pub fn digest(&self) -> CertDigest {
        CertDigest::of(&self.cert)
    }

    /// Settings of a listener that clients reach by `names`: host names and IP addresses. The
    /// listener's certificate is made anew at each start and sent together with the authority's.
    pub fn server_config(&self, names: &[String]) -> Result<Arc<ServerConfig>, TlsError> {
        let failed = |source| TlsError::Make { names: names.to_vec(), source };
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::new(names.to_vec()).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, "Anabranch manager");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&key, &self.issuer).map_err(failed)?;
        let chain = vec![leaf.der().clone(), self.cert.clone()];
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    fn create(cert_path: &Path, key_path: &Path) -> Result<Ca, TlsError> {
        let failed = |source| TlsError::Make { names: vec![CA_NAME.to_owned()], source };
        let key = KeyPair::generate().map_err(failed)?;
        let cert = ca_params().self_signed(&key).map_err(failed)?;
        // The key first: a crash in between leaves a half that the next start names.
        private_file::write(key_path, &key.serialize_pem())?;
        private_file::write(cert_path, &cert.pem())?;
        Ok(Ca { cert: cert.der().clone(), issuer: Issuer::new(ca_params(), key) })
    }

    fn from_pem(cert: (&Path, &str), key: (&Path, &str)) -> Result<Ca, TlsError> {
        let der = CertificateDer::from_pem_slice(cert.1.as_bytes())
            .map_err(|source| TlsError::BadCert { path: cert.0.to_owned(), source })?;
        let pair = KeyPair::from_pem(key.1)
            .map_err(|source| TlsError::BadKey { path: key.0.to_owned(), source })?;
        Ok(Ca { cert: der, issuer: Issuer::new(ca_params(), pair) })
    }
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ca({}, key hidden)", self.digest())
    }
}

/// Parameters of the authority, equal at creation and at load: signing needs only these and the
/// key. Validity is rcgen's default, 1975 to 4096: trust ends by replacing the authority, never by
/// clocks that disagree.
fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, CA_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// The ring provider, named in every use: no process-wide default is installed or relied on.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_authority_survives_a_restart_and_its_key_is_private() {
        let dir = tempfile::tempdir().expect("dir");
        let state = dir.path().join("state");
        let first = Ca::load_or_create(&state).expect("created");
        let again = Ca::load_or_create(&state).expect("loaded");
        assert_eq!(first.digest(), again.digest());
        let mode = std::fs::metadata(state.join(KEY_FILE)).expect("key").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn half_an_authority_is_refused() {
        let dir = tempfile::tempdir().expect("dir");
        Ca::load_or_create(dir.path()).expect("created");
        std::fs::remove_file(dir.path().join(KEY_FILE)).expect("removed");
        assert!(matches!(Ca::load_or_create(dir.path()), Err(TlsError::Half { .. })));
    }

    #[test]
    fn a_name_that_no_certificate_can_hold_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        let ca = Ca::load_or_create(dir.path()).expect("created");
        let error = ca.server_config(&["höst".to_owned()]).expect_err("not ASCII");
        assert!(error.to_string().contains("höst"), "{error}");
    }
}
