//! What proves who somebody is, and how a side of a connection asks for it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::{Name, StringMatch};

/// Bytes, or the file that holds them (`envoy.config.core.v3.DataSource`).
#[derive(Clone, PartialEq, Eq)]
pub enum DataSource {
    /// The bytes themselves.
    Inline(Arc<[u8]>),
    /// A file, read when the configuration is applied.
    File(PathBuf),
}

impl fmt::Debug for DataSource {
    /// Never prints inline bytes: they may be a private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(bytes) => write!(f, "<{} bytes inline>", bytes.len()),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A named secret (`envoy.extensions.transport_sockets.tls.v3.Secret`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Secret {
    /// A certificate with its private key.
    Identity(TlsIdentity),
    /// What a peer's certificate is checked against.
    Validation(Validation),
}

/// A certificate chain and its private key, both PEM (`TlsCertificate`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsIdentity {
    /// The leaf first, then its issuers.
    pub chain: DataSource,
    /// The private key of the leaf.
    pub key: DataSource,
}

/// What a peer's certificate is checked against (`CertificateValidationContext`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validation {
    /// The roots, PEM. A chain must end in one of them.
    pub roots: DataSource,
    /// Revocation lists, PEM or DER; none: revocation is not checked.
    pub revocations: Option<DataSource>,
    /// The URI or DNS names of which the peer must have one; empty: any.
    pub names: Vec<StringMatch>,
}

/// A secret in place, or the name it is served under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// It stands in the configuration.
    Inline(Arc<Secret>),
    /// It is a static secret, comes over SDS, or is the workload's own identity.
    Named(Name),
}

/// How TLS with a client is done (`DownstreamTlsContext`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownstreamTls {
    /// Our certificate.
    pub identity: SecretSource,
    /// What the client's certificate is checked against.
    pub validation: Option<SecretSource>,
    /// Names asked for here, beside those of the validation (`combined_validation_context`).
    pub names: Vec<StringMatch>,
    /// Whether a client without a certificate is refused: Verify Mode.
    pub require_client_certificate: bool,
    /// The protocols offered, most wanted first.
    pub alpn: Vec<String>,
}

/// How TLS to an endpoint is done (`UpstreamTlsContext`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamTls {
    /// Our certificate, when the endpoint asks for one.
    pub identity: Option<SecretSource>,
    /// What the endpoint's certificate is checked against. Without it nothing would be proved, so
    /// translation refuses a context that has none.
    pub validation: SecretSource,
    /// Names asked for here, beside those of the validation.
    pub names: Vec<StringMatch>,
    /// The server name sent; none sends no SNI.
    pub sni: Option<String>,
    /// The protocols offered.
    pub alpn: Vec<String>,
}
