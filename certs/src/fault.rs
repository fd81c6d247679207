//! The reasons for rejecting a peer, named as in the connection log of AWS load balancers, with their TLS alerts.

use std::cell::Cell;
use std::fmt;

use rustls::{CertificateError, Error};
use rustls_pki_types::CertificateDer;

/// The reason for rejecting a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerFault {
    /// It shows a longer chain than is looked at.
    MaxChainDepthExceeded,
    /// What it sends is larger than a handshake may be.
    MaxSizeExceeded,
    /// A revocation list names one of its certificates.
    CrlHit,
    /// The revocation lists do not say that it is good.
    CrlProcessingError,
    /// Its chain ends in none of our roots, or a signature in it is wrong.
    Untrusted,
    /// A certificate of it is not good yet.
    NotYetValid,
    /// A certificate of it is good no longer.
    Expired,
    /// Its key, or a signature of its chain, is of a kind that is not taken.
    TypeUnsupported,
    /// One of its certificates is none, or not as it must be.
    Invalid,
    /// Its certificate is for something else.
    PurposeInvalid,
    /// The names of the peer are not accepted.
    Rejected,
    /// Something else.
    Unmapped,
}

impl PeerFault {
    /// Every fault.
    pub const ALL: [Self; 12] = [
        Self::MaxChainDepthExceeded,
        Self::MaxSizeExceeded,
        Self::CrlHit,
        Self::CrlProcessingError,
        Self::Untrusted,
        Self::NotYetValid,
        Self::Expired,
        Self::TypeUnsupported,
        Self::Invalid,
        Self::PurposeInvalid,
        Self::Rejected,
        Self::Unmapped,
    ];

    /// Its word in logs and metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::MaxChainDepthExceeded => "ClientCertMaxChainDepthExceeded",
            Self::MaxSizeExceeded => "ClientCertMaxSizeExceeded",
            Self::CrlHit => "ClientCertCrlHit",
            Self::CrlProcessingError => "ClientCertCrlProcessingError",
            Self::Untrusted => "ClientCertUntrusted",
            Self::NotYetValid => "ClientCertNotYetValid",
            Self::Expired => "ClientCertExpired",
            Self::TypeUnsupported => "ClientCertTypeUnsupported",
            Self::Invalid => "ClientCertInvalid",
            Self::PurposeInvalid => "ClientCertPurposeInvalid",
            Self::Rejected => "ClientCertRejected",
            Self::Unmapped => "UnmappedConnectionError",
        }
    }

    /// The error that has rustls send the right alert (RFC 8446, section 6.2). What exactly was wrong stays
    /// with [`last`].
    pub(crate) fn refuse(self, detail: &'static str) -> Error {
        LAST.set(Some((self, detail)));
        Error::InvalidCertificate(match self {
            // bad_certificate.
            Self::MaxChainDepthExceeded | Self::MaxSizeExceeded | Self::Invalid => {
                CertificateError::BadEncoding
            }
            // certificate_revoked.
            Self::CrlHit => CertificateError::Revoked,
            // certificate_expired.
            Self::NotYetValid => CertificateError::NotValidYet,
            Self::Expired => CertificateError::Expired,
            // unsupported_certificate.
            Self::TypeUnsupported | Self::PurposeInvalid => CertificateError::InvalidPurpose,
            // access_denied.
            Self::Rejected => CertificateError::ApplicationVerificationFailure,
            // certificate_unknown.
            Self::CrlProcessingError | Self::Untrusted | Self::Unmapped => {
                CertificateError::Other(rustls::OtherError(std::sync::Arc::new(Unknown(detail))))
            }
        })
    }
}

impl fmt::Display for PeerFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The detail of a fault that has no TLS alert of its own.
#[derive(Debug)]
struct Unknown(&'static str);

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Unknown {}

thread_local! {
    static LAST: Cell<Option<(PeerFault, &'static str)>> = const { Cell::new(None) };
    static SHOWN: Cell<Option<CertificateDer<'static>>> = const { Cell::new(None) };
}

/// Remembers the certificate of a peer that is refused.
pub(crate) fn note(certificate: &CertificateDer<'_>) {
    SHOWN.set(Some(certificate.clone().into_owned()));
}

/// The certificate of the peer whose fault [`last`] returned.
#[must_use]
pub fn refused_certificate() -> Option<CertificateDer<'static>> {
    SHOWN.take()
}

/// Why the peer was refused whose handshake has just failed on this thread with `error`, and what exactly was
/// wrong. A verifier can hand nothing but an alert through rustls, so the rest goes round it.
#[must_use]
pub fn last(error: &Error) -> (PeerFault, &'static str) {
    let last = LAST.take();
    if !matches!(error, Error::InvalidCertificate(_)) {
        SHOWN.set(None);
    }
    match error {
        Error::InvalidCertificate(CertificateError::NotValidForName) => {
            (PeerFault::Rejected, "it has not the name that it was called by")
        }
        // Of the handshake itself: no verifier of ours says so.
        Error::InvalidCertificate(CertificateError::BadSignature) => {
            (PeerFault::Untrusted, "it has not the key of its certificate")
        }
        Error::InvalidCertificate(_) => last.unwrap_or((PeerFault::Invalid, "")),
        _ => (PeerFault::Unmapped, ""),
    }
}
