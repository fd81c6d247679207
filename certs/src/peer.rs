//! The peer at the other end of a connection, proved.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::CertificateDer;
use weft_model::SpiffeId;

use crate::{profile, text};

/// The peer at the other end of a connection, proved by a finished mutual TLS handshake.
///
/// Holding one means: the chain ended in one of our roots, was inside its dates, and was revoked by
/// no list at that moment. Stages behind the handshake take this type, so none of them can be
/// reached with an identity that somebody merely claimed.
#[derive(Clone)]
pub struct VerifiedPeer {
    /// Of the certificate, by SHA-256.
    digest: [u8; 32],
    identity: Option<SpiffeId>,
    serial: Arc<[u8]>,
}

impl VerifiedPeer {
    /// Asserts that a handshake just proved the holder of `leaf`. None when the certificate cannot
    /// be read, or claims a SPIFFE id as none may be claimed: neither is verified.
    ///
    /// Named to be searched for: outside tests it has one caller, the TLS acceptor, and the tidy
    /// test keeps it so.
    #[must_use]
    pub fn assertion(leaf: &CertificateDer<'_>) -> Option<Self> {
        let certificate = webpki::EndEntityCert::try_from(leaf).ok()?;
        let identity = profile::identity(leaf).ok()?;
        let serial = certificate.serial().into();
        let sha256 = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, leaf);
        let digest = sha256.as_ref().try_into().ok()?;
        Some(Self { identity, serial, digest })
    }

    /// The SPIFFE id; none for a certificate that has no such name.
    #[must_use]
    pub fn identity(&self) -> Option<&SpiffeId> {
        self.identity.as_ref()
    }

    /// The serial number as the certificate has it: two's complement, big-endian.
    #[must_use]
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// The SHA-256 of the certificate.
    #[must_use]
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// The SHA-256 of the certificate in lower-case hex, as `x-forwarded-client-cert` wants it.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        hex(&self.digest)
    }

    /// The serial number in upper-case hex, as `x-amzn-mtls-clientcert-serial-number` wants it:
    /// without the zero byte that only keeps a large number positive.
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

/// The SPIFFE id in a certificate. It proves nothing by itself: the caller must have verified the
/// certificate.
#[must_use]
pub fn identity_of(verified: &CertificateDer<'_>) -> Option<SpiffeId> {
    profile::identity(verified).ok()?
}

/// From when and until when a certificate is good; none when it cannot be read.
#[must_use]
pub fn validity(certificate: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime)> {
    use x509_parser::prelude::FromDer;
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let at = |seconds: i64| Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).ok()?));
    let validity = parsed.validity();
    Some((at(validity.not_before.timestamp())?, at(validity.not_after.timestamp())?))
}
