//! rustls configurations from our own parts.
//!
//! Resumption is off on both sides: a resumed handshake skips the verifier, and with it the
//! revocation lists.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::server::NoServerSessionStorage;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use weft_model::StringMatch;

use crate::TrustStore;
use crate::verify::Verifier;

/// A certificate chain with its private key, checked to belong together.
#[derive(Debug, Clone)]
pub struct Identity(Arc<CertifiedKey>);

/// Why an identity or a configuration cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The chain cannot be read.
    #[error("the certificate chain cannot be read: {0}")]
    Chain(String),
    /// The key cannot be read.
    #[error("the private key cannot be read: {0}")]
    Key(String),
    /// The key is not the certificate's.
    #[error("the private key does not belong to the certificate")]
    Mismatch,
    /// rustls refuses the combination.
    #[error("{0}")]
    Refused(String),
}

/// Whether clients show a certificate.
#[derive(Debug, Clone)]
pub enum ClientAuthentication {
    /// They are not asked.
    None,
    /// They are asked and may decline; what they show must be good.
    Optional(Arc<TrustStore>, Vec<StringMatch>),
    /// They must: Verify Mode.
    Required(Arc<TrustStore>, Vec<StringMatch>),
}

impl Identity {
    /// Reads a PEM chain, leaf first, and the leaf's PEM key.
    ///
    /// # Errors
    /// Which of the two cannot be used, or that they do not belong together.
    pub fn load(chain_pem: &[u8], key_pem: &[u8]) -> Result<Self, TlsError> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(chain_pem)
            .collect::<Result<_, _>>()
            .map_err(|error| TlsError::Chain(error.to_string()))?;
        if chain.is_empty() {
            return Err(TlsError::Chain("it holds no certificate".into()));
        }
        let key = PrivateKeyDer::from_pem_slice(key_pem)
            .map_err(|error| TlsError::Key(error.to_string()))?;
        let certified =
            CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => TlsError::Mismatch,
                other => TlsError::Key(other.to_string()),
            })?;
        Ok(Self(Arc::new(certified)))
    }

    /// The leaf.
    #[must_use]
    pub fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.0.cert.first()
    }
}

/// A server's configuration. `alpn` is in order of preference.
///
/// # Errors
/// When rustls refuses the combination.
pub fn server(
    identity: &Identity,
    clients: ClientAuthentication,
    alpn: &[String],
) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)
        .map_err(|error| TlsError::Refused(error.to_string()))?;
    let builder = match clients {
        ClientAuthentication::None => builder.with_no_client_auth(),
        ClientAuthentication::Optional(trust, names) => {
            builder.with_client_cert_verifier(Arc::new(Verifier::new(trust, names, false)))
        }
        ClientAuthentication::Required(trust, names) => {
            builder.with_client_cert_verifier(Arc::new(Verifier::new(trust, names, true)))
        }
    };
    let mut config = builder
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(identity.0.clone())));
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// A client's configuration. The server must chain to `trust` and have one of `names`.
///
/// # Errors
/// When rustls refuses the combination.
pub fn client(
    identity: Option<&Identity>,
    trust: Arc<TrustStore>,
    names: Vec<StringMatch>,
    alpn: &[String],
) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)
        .map_err(|error| TlsError::Refused(error.to_string()))?
        .with_root_certificates(RootCertStore::empty());
    let mut config = match identity {
        Some(identity) => builder.with_client_cert_resolver(Arc::new(
            rustls::sign::SingleCertAndKey::from(identity.0.clone()),
        )),
        None => builder.with_no_client_auth(),
    };
    config.dangerous().set_certificate_verifier(Arc::new(Verifier::new(trust, names, true)));
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// TLS 1.3 only: no configuration can then ask for less, and none that asks for it gets less.
static VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    static PROVIDER: std::sync::LazyLock<Arc<rustls::crypto::CryptoProvider>> =
        std::sync::LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    PROVIDER.clone()
}
