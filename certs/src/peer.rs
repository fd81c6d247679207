//! The verified peer of a TLS connection.

use std::fmt;
use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use weft_model::SpiffeId;

use crate::digest::{hex, sha256};
use crate::profile;
use crate::serial::serial_hex;

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
        Some(Self { identity, serial, digest: sha256([leaf.as_ref()]) })
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
        serial_hex(&self.serial)
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
