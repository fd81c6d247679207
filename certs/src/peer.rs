//! The verified peer of a TLS connection.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::CertificateDer;
use weft_model::SpiffeId;

use crate::{profile, text};

/// The peer of a connection, verified by a finished mutual TLS handshake.
///
/// At the time of the handshake, the certificate chain ended in a root of the trust bundle, was within its validity,
/// and was not revoked by a CRL. Code after the handshake takes this type, so it cannot run with an unverified
/// identity.
#[derive(Clone)]
pub struct VerifiedPeer {
    /// The SHA-256 of the certificate.
    digest: [u8; 32],
    identity: Option<SpiffeId>,
    serial: Arc<[u8]>,
}

impl VerifiedPeer {
    /// Creates the peer from the leaf certificate of a finished handshake. None if the certificate cannot be read, or
    /// its SPIFFE ID is invalid: neither is verified.
    ///
    /// The name is easy to search for: outside tests the only caller is the TLS acceptor, and the tidy test enforces
    /// that.
    #[must_use]
    pub fn assertion(leaf: &CertificateDer<'_>) -> Option<Self> {
        let certificate = webpki::EndEntityCert::try_from(leaf).ok()?;
        let identity = profile::identity(leaf).ok()?;
        let serial = certificate.serial().into();
        let sha256 = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, leaf);
        let digest = sha256.as_ref().try_into().ok()?;
        Some(Self { identity, serial, digest })
    }

    /// The SPIFFE ID; none if the certificate has none.
    #[must_use]
    pub fn identity(&self) -> Option<&SpiffeId> {
        self.identity.as_ref()
    }

    /// The serial number as in the certificate: two's complement, big-endian.
    #[must_use]
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// The SHA-256 of the certificate.
    #[must_use]
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// The SHA-256 of the certificate in lower-case hex, the form of `x-forwarded-client-cert`.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        hex(&self.digest)
    }

    /// The serial number in upper-case hex without the sign byte, the form of `x-amzn-mtls-clientcert-serial-number`.
    #[must_use]
    pub fn serial_hex(&self) -> String {
        text::serial_hex(&self.serial)
    }
}

impl fmt::Debug for VerifiedPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifiedPeer")
            .field("identity", &self.identity)
            .field("serial", &self.serial_hex())
            .finish()
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The SHA-256 of bytes in lower-case hex.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref())
}

/// 256 random bits in hex, for a secret that is shown once; none without random numbers.
#[must_use]
pub fn random_token() -> Option<String> {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(hex(&bytes))
}

/// 32 random bits; none without random numbers.
#[must_use]
pub fn random_number() -> Option<u32> {
    let mut bytes = [0; 4];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(u32::from_ne_bytes(bytes))
}

/// The SPIFFE ID of a certificate that the caller has verified.
#[must_use]
pub fn identity_of(verified: &CertificateDer<'_>) -> Option<SpiffeId> {
    profile::identity(verified).ok()?
}

/// The validity of a certificate: its start and its end; none if it cannot be read.
#[must_use]
pub fn validity(certificate: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime)> {
    use x509_parser::prelude::FromDer;
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let at = |seconds: i64| Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).ok()?));
    let validity = parsed.validity();
    Some((at(validity.not_before.timestamp())?, at(validity.not_after.timestamp())?))
}
