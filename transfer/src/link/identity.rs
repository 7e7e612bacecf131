//! Identity of a data-plane listener: a certificate made in memory at its start, named by its digest in the
//! listener's address. Addresses come through the manager's authenticated channel, so a receiver that
//! accepts exactly that certificate knows whom it talks to. There is no other trust: no authority, no
//! names, no dates. Permission to read comes from grants alone.

use std::fmt;
use std::sync::{Arc, Mutex};

use anabranch_proto::address::CertPin;
use anabranch_runtime::CertDigest;
use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, ServerConfig, SignatureScheme,
};

/// The data plane's first wire; tls and quic offer nothing else.
const ALPN: &[u8] = b"abd/1";

/// Stands in the handshake where a name is asked for; nothing compares it.
pub(super) const NAME: &str = "anabranch";

/// A listener's certificate and key.
pub(crate) struct Identity {
    cert: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

/// The listener is another one than the address names.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it shows certificate {sent}, its address names {expected}: it was started again since, or is \
     somebody else; ask the manager for its present address"
)]
pub struct PinMismatch {
    /// Digest that the address names.
    pub expected: CertPin,
    /// Digest of the certificate that was shown.
    pub sent: CertPin,
}

/// Accepts one certificate, and remembers what else was shown.
pub(super) struct Pinned {
    pin: CertPin,
    mismatch: Mutex<Option<PinMismatch>>,
    provider: Arc<CryptoProvider>,
}

// === impl Identity ===

impl Identity {
    pub(crate) fn generate() -> Result<Identity, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![NAME.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, "Anabranch data plane");
        let cert = params.self_signed(&key)?.der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(Identity { cert, key })
    }

    pub(crate) fn pin(&self) -> CertPin {
        CertPin(CertDigest::of(&self.cert).0)
    }

    pub(crate) fn server_config(&self) -> Result<Arc<ServerConfig>, Error> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![self.cert.clone()], self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // Nothing is resumed, and a stream that idles shall have nothing to read.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

// === impl Pinned ===

impl Pinned {
    pub(super) fn new(pin: CertPin) -> Arc<Pinned> {
        Arc::new(Pinned { pin, mismatch: Mutex::default(), provider: provider() })
    }

    pub(super) fn client_config(self: &Arc<Self>) -> Result<ClientConfig, Error> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(self) as Arc<dyn ServerCertVerifier>)
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// The certificate that made the handshake fail, if that was the reason.
    pub(super) fn mismatch(&self) -> Option<PinMismatch> {
        self.mismatch.lock().expect("held only to look and note").clone()
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _rest: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let sent = CertPin(CertDigest::of(leaf).0);
        if sent == self.pin {
            return Ok(ServerCertVerified::assertion());
        }
        let mismatch = PinMismatch { expected: self.pin, sent };
        *self.mismatch.lock().expect("held only to look and note") = Some(mismatch);
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    /// Without this, whoever copied the certificate could pass for its owner.
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, signed, algorithms)
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

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({})", self.pin)
    }
}

/// ring, named: no process-wide default is relied on. AES-128 first: the cheapest where the CPU has it.
fn provider() -> Arc<CryptoProvider> {
    let suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(CryptoProvider { cipher_suites: suites, ..ring::default_provider() })
}

#[cfg(test)]
mod tests {
    use rustls::server::ResolvesServerCert;
    use rustls::sign::CertifiedKey;

    use super::*;

    impl Identity {
        /// A listener's settings with another way to choose its certificate.
        pub(crate) fn server_config_with(
            &self,
            resolver: impl FnOnce(CertificateDer<'static>) -> Arc<dyn ResolvesServerCert>,
        ) -> ServerConfig {
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .expect("TLS 1.3")
                .with_no_client_auth()
                .with_cert_resolver(resolver(self.cert.clone()));
            config.alpn_protocols = vec![ALPN.to_vec()];
            config
        }

        /// This key under any certificate.
        pub(crate) fn certified(&self, cert: CertificateDer<'static>) -> Arc<CertifiedKey> {
            let key = provider().key_provider.load_private_key(self.key.clone_key());
            Arc::new(CertifiedKey::new(vec![cert], key.expect("a key")))
        }
    }

    #[test]
    fn every_listener_is_somebody_else() {
        let pins: Vec<_> = (0..3).map(|_| Identity::generate().expect("made").pin()).collect();
        assert!(pins[0] != pins[1] && pins[1] != pins[2]);
    }
}
