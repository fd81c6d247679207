//! What proves who somebody is, and how a side of a connection asks for it.

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
    /// The roots that the system trusts where the configuration is applied (`system_root_certs`). Roots
    /// only.
    SystemRoots,
}

impl DataSource {
    /// These bytes, which are overwritten when nobody needs them any more: they may be a private key.
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
    /// Where more lists are fetched.
    pub points: Vec<DistributionPoint>,
    /// What the lists decide.
    pub policy: RevocationPolicy,
    /// The URI or DNS names of which the peer must have one; empty: any.
    pub names: Vec<StringMatch>,
}

/// Where a revocation list is offered over HTTP (RFC 5280, section 4.2.1.13).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DistributionPoint {
    /// The list's address. Where it is found the cluster says, and not the host in it.
    pub uri: String,
    /// The cluster that serves it.
    pub cluster: Name,
    /// How often it is asked for at least.
    pub refresh: Duration,
}

/// What revocation lists decide. The default lets in nobody of whom they do not say that it is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RevocationPolicy {
    /// Whether they decide.
    pub mode: RevocationMode,
    /// What becomes of whom only a list that has expired speaks of.
    pub on_expired: ExpiredCrlAction,
    /// Whose certificates are looked up.
    pub depth: RevocationDepth,
    /// How long what a revoked peer has begun may last; zero: it is ended at once.
    pub drain: Duration,
    /// How many authorities may stand above a leaf, the root among them (`max_verify_depth`).
    pub depth_limit: usize,
    /// The most bytes of all lists together.
    pub bytes_limit: usize,
    /// The most revoked certificates of all lists together.
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

/// Whether revocation lists decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevocationMode {
    /// They do not: nobody is refused by them.
    Off,
    /// Whom they name is refused; whom they do not speak of is let in.
    Soft,
    /// Whom they do not speak of is refused as well.
    Strict,
}

/// What becomes of a certificate of which only a list speaks that is past its `nextUpdate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpiredCrlAction {
    /// It is let in.
    Ignore,
    /// It is let in, and that the list has expired is told.
    Warn,
    /// It is refused.
    Deny,
}

/// Whose certificates are looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevocationDepth {
    /// The peer's own.
    Leaf,
    /// The peer's and those of its issuers, but for the root.
    Chain,
}

impl RevocationMode {
    /// Every mode, with its word.
    pub const WORDS: [(&'static str, Self); 3] =
        [("off", Self::Off), ("soft", Self::Soft), ("strict", Self::Strict)];
}

impl ExpiredCrlAction {
    /// Every choice, with its word.
    pub const WORDS: [(&'static str, Self); 3] =
        [("ignore", Self::Ignore), ("warn", Self::Warn), ("deny", Self::Deny)];
}

impl RevocationDepth {
    /// Every choice, with its word.
    pub const WORDS: [(&'static str, Self); 2] = [("leaf", Self::Leaf), ("chain", Self::Chain)];
}

/// A secret in place, or the name it is served under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// It stands in the configuration.
    Inline(Arc<Secret>),
    /// It is a static secret, comes over SDS, or is the workload's own identity.
    Named(Name),
}

impl SecretSource {
    /// Its name; none for a secret in place.
    #[must_use]
    pub fn name(&self) -> Option<&Name> {
        match self {
            Self::Inline(_) => None,
            Self::Named(name) => Some(name),
        }
    }
}

/// How TLS with a client is done (`DownstreamTlsContext`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownstreamTls {
    /// Our certificate.
    pub identity: SecretSource,
    /// What clients show of themselves.
    pub client_certificates: ClientCertificateMode,
    /// The protocols offered, most wanted first.
    pub alpn: Vec<String>,
    /// What handshakes may agree on.
    pub parameters: TlsParameters,
}

/// What a server makes of its clients' certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientCertificateMode {
    /// It asks for none.
    NotRequested,
    /// It lets in whose certificate is good: Verify Mode where everybody needs one.
    Verify {
        /// What a certificate is checked against.
        validation: SecretSource,
        /// Names asked for here, beside those of the validation (`combined_validation_context`).
        names: Vec<StringMatch>,
        /// Whether a client without a certificate is refused (`require_client_certificate`).
        required: bool,
    },
    /// It tells the service whatever is shown, and lets it judge (`trust_chain_verification:
    /// ACCEPT_UNTRUSTED` without `trusted_ca`). The client has the certificate's key; nothing else is proved,
    /// and it is nobody's identity.
    PassThrough {
        /// Whether a client without a certificate is refused.
        required: bool,
    },
}

impl ClientCertificateMode {
    /// What certificates are checked against; none where they are not.
    #[must_use]
    pub fn validation(&self) -> Option<&SecretSource> {
        match self {
            Self::Verify { validation, .. } => Some(validation),
            Self::NotRequested | Self::PassThrough { .. } => None,
        }
    }
}

/// How TLS to an endpoint is done (`UpstreamTlsContext`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamTls {
    /// Our certificate, when the endpoint asks for one.
    pub identity: Option<SecretSource>,
    /// What the endpoint's certificate is checked against. None: any certificate is accepted and
    /// proves nothing, which translation warns of.
    pub validation: Option<SecretSource>,
    /// Names asked for here, beside those of the validation.
    pub names: Vec<StringMatch>,
    /// The server name sent; none sends no SNI.
    pub sni: Option<String>,
    /// The protocols offered.
    pub alpn: Vec<String>,
    /// What handshakes may agree on.
    pub parameters: TlsParameters,
}

/// How two sides agree on keys (RFC 8446, section 4.2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyExchangeGroup {
    /// By X25519 and ML-KEM-768 together, which a quantum computer of the future will not undo.
    X25519MlKem768,
    /// By X25519.
    X25519,
    /// By the curve P-256.
    P256,
    /// By the curve P-384.
    P384,
}

impl KeyExchangeGroup {
    /// All of them, by their names in configurations, in the order of our preference.
    pub const WORDS: [(&'static str, Self); 4] = [
        ("X25519MLKEM768", Self::X25519MlKem768),
        ("X25519", Self::X25519),
        ("P-256", Self::P256),
        ("P-384", Self::P384),
    ];

    /// Those that a quantum computer would undo.
    pub const CLASSICAL: [Self; 3] = [Self::X25519, Self::P256, Self::P384];

    /// The name in configurations.
    #[must_use]
    pub fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, group)| *group == self).map_or("", |(word, _)| word)
    }
}
