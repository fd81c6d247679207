//! Secrets (certificates, keys, trust bundles, CRLs) and the TLS settings of clients and servers.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::{Name, StringMatch, TlsParameters};

/// Bytes, or the file that holds them (`envoy.config.core.v3.DataSource`).
#[derive(Clone, PartialEq, Eq)]
pub enum DataSource {
    /// The bytes themselves.
    Inline(Arc<Zeroizing<Vec<u8>>>),
    /// A file, read when the configuration is applied.
    File(PathBuf),
    /// The system's root certificates, on the host that applies the configuration (`system_root_certs`). Only
    /// valid for a trust bundle.
    SystemRoots,
}

impl DataSource {
    /// Inline bytes. They are overwritten with zeros when the last reference is dropped, because they may be a
    /// private key.
    #[must_use]
    pub fn inline(bytes: impl Into<Vec<u8>>) -> Self {
        Self::Inline(Arc::new(Zeroizing::new(bytes.into())))
    }
}

impl fmt::Debug for DataSource {
    /// Never prints inline bytes: they may be a private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(bytes) => write!(f, "<{} bytes inline>", bytes.len()),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::SystemRoots => write!(f, "<system roots>"),
        }
    }
}

/// A named secret (`envoy.extensions.transport_sockets.tls.v3.Secret`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Secret {
    /// A certificate with its private key.
    Identity(TlsIdentity),
    /// How a peer's certificate is verified.
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

/// How a peer's certificate is verified (`CertificateValidationContext`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validation {
    /// The trust bundle: root certificates, PEM. A chain must end in one of them.
    pub roots: DataSource,
    /// CRLs, PEM or DER. With neither these nor distribution points, revocation is not checked.
    pub revocations: Option<DataSource>,
    /// Where more CRLs are fetched from.
    pub points: Vec<DistributionPoint>,
    /// How CRLs are applied.
    pub policy: RevocationPolicy,
    /// URI or DNS names; the peer's certificate must have one of them. Empty: any name.
    pub names: Vec<StringMatch>,
}

/// An HTTP address from which a CRL is fetched (RFC 5280, section 4.2.1.13).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DistributionPoint {
    /// The URI of the CRL. The connection goes to `cluster`, not to the host in the URI.
    pub uri: String,
    /// The cluster that serves the CRL.
    pub cluster: Name,
    /// The longest time between two fetches.
    pub refresh: Duration,
}

/// How CRLs are applied. By default, a certificate that no valid CRL covers is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RevocationPolicy {
    /// Whether CRLs are checked, and whether every certificate must be covered by one.
    pub mode: RevocationMode,
    /// What happens to a certificate that only an expired CRL covers.
    pub on_expired: ExpiredCrlAction,
    /// Which certificates of a chain are checked.
    pub depth: RevocationDepth,
    /// Grace period for requests in flight when their peer is revoked; zero: they are aborted at once.
    pub drain: Duration,
    /// The most CA certificates above a leaf, the root included (`max_verify_depth`).
    pub depth_limit: usize,
    /// The most bytes of all CRLs together.
    pub bytes_limit: usize,
    /// The most revoked certificates in all CRLs together.
    pub entries_limit: usize,
}

impl Default for RevocationPolicy {
    fn default() -> Self {
        Self {
            mode: RevocationMode::Strict,
            on_expired: ExpiredCrlAction::Deny,
            depth: RevocationDepth::Chain,
            drain: Duration::ZERO,
            depth_limit: 4,
            bytes_limit: 50 * 1024 * 1024,
            entries_limit: 500_000,
        }
    }
}

/// Whether CRLs are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevocationMode {
    /// CRLs are not checked.
    Off,
    /// A revoked certificate is refused; one that no CRL covers is accepted.
    Soft,
    /// A revoked certificate is refused, and so is one that no CRL covers.
    Strict,
}

/// What happens to a certificate that is covered only by a CRL past its `nextUpdate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpiredCrlAction {
    /// The certificate is accepted.
    Ignore,
    /// The certificate is accepted, and a warning about the expired CRL is logged.
    Warn,
    /// The certificate is refused.
    Deny,
}

/// Which certificates of a chain are checked against CRLs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevocationDepth {
    /// The leaf only.
    Leaf,
    /// The leaf and its issuers, without the root.
    Chain,
}

impl RevocationMode {
    /// Every mode with its name in configurations.
    pub const WORDS: [(&'static str, Self); 3] =
        [("off", Self::Off), ("soft", Self::Soft), ("strict", Self::Strict)];
}

impl ExpiredCrlAction {
    /// Every choice with its name in configurations.
    pub const WORDS: [(&'static str, Self); 3] =
        [("ignore", Self::Ignore), ("warn", Self::Warn), ("deny", Self::Deny)];
}

impl RevocationDepth {
    /// Every choice with its name in configurations.
    pub const WORDS: [(&'static str, Self); 2] = [("leaf", Self::Leaf), ("chain", Self::Chain)];
}

/// An inline secret, or the name of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// The secret is part of the resource.
    Inline(Arc<Secret>),
    /// The name of a static secret, of a secret from SDS, or of the workload's own identity.
    Named(Name),
}

impl SecretSource {
    /// The secret's name; none for an inline secret.
    #[must_use]
    pub fn name(&self) -> Option<&Name> {
        match self {
            Self::Inline(_) => None,
            Self::Named(name) => Some(name),
        }
    }
}

/// TLS settings towards clients (`DownstreamTlsContext`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownstreamTls {
    /// The server certificate.
    pub identity: SecretSource,
    /// Whether client certificates are requested, and how they are verified.
    pub client_certificates: ClientCertificateMode,
    /// The ALPN protocols offered, most preferred first.
    pub alpn: Vec<String>,
    /// The TLS versions, cipher suites and groups that a handshake may negotiate.
    pub parameters: TlsParameters,
}

/// Whether a server requests client certificates, and how it verifies them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientCertificateMode {
    /// No client certificate is requested.
    NotRequested,
    /// Client certificates are verified; an invalid one fails the handshake.
    Verify {
        /// How a certificate is verified.
        validation: SecretSource,
        /// Names required in addition to those of the validation (`combined_validation_context`).
        names: Vec<StringMatch>,
        /// Whether a client without a certificate is refused (`require_client_certificate`).
        required: bool,
    },
    /// Any client certificate is accepted and forwarded to the service, which must verify it
    /// (`trust_chain_verification: ACCEPT_UNTRUSTED` without `trusted_ca`). The handshake only proves that the
    /// client has the private key; the certificate is not used as an identity.
    PassThrough {
        /// Whether a client without a certificate is refused.
        required: bool,
    },
}

impl ClientCertificateMode {
    /// How client certificates are verified; none where they are not.
    #[must_use]
    pub fn validation(&self) -> Option<&SecretSource> {
        match self {
            Self::Verify { validation, .. } => Some(validation),
            Self::NotRequested | Self::PassThrough { .. } => None,
        }
    }
}

/// TLS settings towards endpoints (`UpstreamTlsContext`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamTls {
    /// The client certificate, sent when the endpoint requests one.
    pub identity: Option<SecretSource>,
    /// How the endpoint's certificate is verified. None: any certificate is accepted; translation adds a warning.
    pub validation: Option<SecretSource>,
    /// Names required in addition to those of the validation.
    pub names: Vec<StringMatch>,
    /// The server name (SNI) sent; none: no SNI.
    pub sni: Option<String>,
    /// The ALPN protocols offered.
    pub alpn: Vec<String>,
    /// The TLS versions, cipher suites and groups that a handshake may negotiate.
    pub parameters: TlsParameters,
}
