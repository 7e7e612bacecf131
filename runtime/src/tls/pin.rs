//! The client's check of a manager's certificate: the chain must contain the pinned authority, and
//! the authority must have signed the leaf.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore,
    SignatureScheme,
};

use super::provider;
use crate::token::CertDigest;

/// A server of another authority, or of an authority that was made anew since the token was issued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server's chain does not contain the pinned certificate authority {expected}")]
pub struct PinMismatch {
    /// Digest of the authority that the join token names.
    pub expected: CertDigest,
    /// Digests of the certificates that the server sent, leaf first.
    pub sent: Vec<CertDigest>,
}

/// Settings of a gRPC client that trusts the authority with digest `ca` alone. ALPN is h2 only.
pub fn pinned_client_config(ca: CertDigest) -> ClientConfig {
    let provider = provider();
    let verifier = PinnedCa { ca, provider: provider.clone() };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring supports the default TLS versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

#[derive(Debug)]
struct PinnedCa {
    ca: CertDigest,
    provider: Arc<CryptoProvider>,
}

impl PinnedCa {
    fn pinned<'a>(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &'a [CertificateDer<'a>],
    ) -> Result<&'a CertificateDer<'a>, PinMismatch> {
        rest.iter().find(|cert| CertDigest::of(cert) == self.ca).ok_or_else(|| PinMismatch {
            expected: self.ca,
            sent: std::iter::once(leaf).chain(rest).map(|cert| CertDigest::of(cert)).collect(),
        })
    }
}

impl ServerCertVerifier for PinnedCa {
    /// Checks the chain, not the name that was dialled: the authority signs only the manager's own
    /// listeners, so its signature is the identity, and tunnels, NAT and port forwards keep
    /// working.
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = self.pinned(leaf, rest).map_err(|mismatch| {
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(mismatch))))
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(leaf)?,
            &roots,
            &[],
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
