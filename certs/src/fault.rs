//! The reasons for rejecting a peer, named as in the connection log of AWS load balancers, with their TLS alerts.
//!
//! A verifier can return only an error of rustls, and the variant of that error is what selects the TLS alert. The one
//! variant that can carry a value of ours, `CertificateError::Other`, always sends `certificate_unknown`. Therefore the
//! verifier keeps its [`PeerRefusal`] in a thread local until the caller of the handshake [takes](take) it.

use std::cell::Cell;
use std::fmt;

use rustls::{CertificateError, Error};
use rustls_pki_types::CertificateDer;

/// Defines the faults from one list.
macro_rules! faults {
    ($($(#[doc = $doc:literal])+ $name:ident: $word:literal;)+) => {
        /// The reason for rejecting a peer.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum PeerFault {
            $($(#[doc = $doc])+ $name,)+
        }

        impl PeerFault {
            /// Every fault.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// The name of the fault in logs and metrics.
            #[must_use]
            pub fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)+ }
            }

            /// The lines of its meaning.
            #[must_use]
            pub fn meaning(self) -> &'static [&'static str] {
                match self { $(Self::$name => &[$($doc),+],)+ }
            }
        }
    };
}

faults! {
    /// The chain has too many certificates.
    MaxChainDepthExceeded: "ClientCertMaxChainDepthExceeded";
    /// The handshake message or the certificate chain is too large.
    MaxSizeExceeded: "ClientCertMaxSizeExceeded";
    /// A CRL revokes a certificate of the chain.
    CrlHit: "ClientCertCrlHit";
    /// A CRL is missing or has expired.
    CrlProcessingError: "ClientCertCrlProcessingError";
    /// The chain does not end in a trusted root, or a signature in the chain is invalid.
    Untrusted: "ClientCertUntrusted";
    /// A certificate of the chain is not valid yet.
    NotYetValid: "ClientCertNotYetValid";
    /// A certificate of the chain has expired.
    Expired: "ClientCertExpired";
    /// The algorithm of a key or signature in the chain is not supported.
    TypeUnsupported: "ClientCertTypeUnsupported";
    /// A certificate of the chain cannot be read or has an invalid profile.
    Invalid: "ClientCertInvalid";
    /// The extended key usage does not allow this use.
    PurposeInvalid: "ClientCertPurposeInvalid";
    /// The names of the peer are not accepted.
    Rejected: "ClientCertRejected";
    /// Any other error.
    Unmapped: "UnmappedConnectionError";
}

impl PeerFault {
    /// The refusal of a peer for this fault.
    pub(crate) fn because(self, detail: &'static str) -> PeerRefusal {
        PeerRefusal { fault: self, detail, certificate: None }
    }

    /// The error for which rustls sends the matching alert (RFC 8446, section 6.2).
    fn error(self, detail: &'static str) -> CertificateError {
        match self {
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
        }
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

/// The refusal of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerRefusal {
    /// The reason.
    pub fault: PeerFault,
    /// A description for logs; empty if the error of the handshake has more detail.
    pub detail: &'static str,
    /// The certificate that was refused.
    pub certificate: Option<CertificateDer<'static>>,
}

impl PeerRefusal {
    /// Keeps the refusal of this certificate for [`take`], and returns the error for rustls.
    pub(crate) fn into_error(mut self, certificate: &CertificateDer<'_>) -> Error {
        let error = self.fault.error(self.detail);
        self.certificate = Some(certificate.clone().into_owned());
        LAST.set(Some(self));
        Error::InvalidCertificate(error)
    }
}

thread_local! {
    static LAST: Cell<Option<PeerRefusal>> = const { Cell::new(None) };
}

/// Takes the refusal of the handshake that has just failed on this thread with `error`.
#[must_use]
pub fn take(error: &Error) -> PeerRefusal {
    let last = LAST.take();
    match error {
        Error::InvalidCertificate(CertificateError::NotValidForName) => {
            PeerFault::Rejected.because("certificate does not have the requested name")
        }
        // rustls itself reports this error in the handshake; the verifier does not.
        Error::InvalidCertificate(CertificateError::BadSignature) => {
            PeerFault::Untrusted.because("peer does not have the private key of its certificate")
        }
        Error::InvalidCertificate(_) => last.unwrap_or_else(|| PeerFault::Invalid.because("")),
        _ => PeerFault::Unmapped.because(""),
    }
}
