//! Why a TLS handshake with an endpoint failed, as one word of a closed set for logs and metrics.

use std::fmt;
use std::io;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible};
use weft_certs::fault::{self, PeerFault};
use weft_runtime::access::WordInfo;

macro_rules! failures {
    ($($(#[doc = $doc:literal])+ $name:ident: $word:literal;)*) => {
        /// Why a TLS handshake with an endpoint failed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum TlsFailure {
            $($(#[doc = $doc])+ $name,)*
            /// The endpoint sent this alert.
            Alert(AlertDescription),
        }

        /// The words of failures other than received alerts.
        const OWN_WORDS: &[WordInfo] =
            &[$(WordInfo { word: $word, meaning: &[$($doc),+] },)*];

        impl TlsFailure {
            /// The word in logs and metrics.
            pub(crate) fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                    Self::Alert(alert) => alert_word(alert),
                }
            }
        }
    };
}

failures! {
    /// The chain does not end in a configured root, or a signature in it is invalid.
    UnknownIssuer: "unknown_issuer";
    /// A certificate of the chain has expired.
    Expired: "certificate_expired";
    /// A certificate of the chain is not valid yet.
    NotYetValid: "certificate_not_yet_valid";
    /// A CRL lists a certificate of the chain.
    Revoked: "certificate_revoked";
    /// No valid CRL covers a certificate of the chain, and the policy requires one.
    RevocationUnknown: "revocation_unknown";
    /// The certificate does not have the required name or identity.
    WrongName: "wrong_name";
    /// The certificate is not valid for servers (extended key usage).
    WrongPurpose: "wrong_purpose";
    /// The chain is longer than allowed.
    ChainTooLong: "chain_too_long";
    /// A key or signature algorithm of the chain is not accepted.
    UnsupportedCertificate: "unsupported_certificate";
    /// A certificate of the chain cannot be parsed or violates a rule.
    BadCertificate: "bad_certificate";
    /// The endpoint does not have the key of its certificate.
    BadSignature: "bad_signature";
    /// No TLS version is allowed by both sides.
    ProtocolVersion: "protocol_version";
    /// No cipher suite, group or signature scheme is offered by both sides.
    NoCommonCipher: "no_common_cipher";
    /// The endpoint does not support extended master secret with TLS 1.2.
    NoExtendedMasterSecret: "no_extended_master_secret";
    /// No application protocol is offered by both sides.
    NoApplicationProtocol: "no_application_protocol";
    /// The endpoint violates the TLS protocol.
    ProtocolViolation: "protocol_violation";
    /// The first bytes of the endpoint are not TLS.
    NotTls: "not_tls";
    /// The handshake did not complete in time.
    Timeout: "handshake_timeout";
    /// The endpoint closed the connection during the handshake.
    Closed: "closed_in_handshake";
    /// The connection was reset or lost during the handshake.
    Reset: "reset_in_handshake";
    /// The certificate, key or roots that the cluster needs cannot be loaded.
    SecretsMissing: "secrets_missing";
    /// Another error on our side.
    Internal: "internal_error";
}

/// Alerts that servers send, by their names in RFC 8446, section 6.2, and RFC 5246, section 7.2.
const ALERTS: [(AlertDescription, &str); 28] = [
    (AlertDescription::CloseNotify, "alert_close_notify"),
    (AlertDescription::UnexpectedMessage, "alert_unexpected_message"),
    (AlertDescription::BadRecordMac, "alert_bad_record_mac"),
    (AlertDescription::RecordOverflow, "alert_record_overflow"),
    (AlertDescription::HandshakeFailure, "alert_handshake_failure"),
    (AlertDescription::BadCertificate, "alert_bad_certificate"),
    (AlertDescription::UnsupportedCertificate, "alert_unsupported_certificate"),
    (AlertDescription::CertificateRevoked, "alert_certificate_revoked"),
    (AlertDescription::CertificateExpired, "alert_certificate_expired"),
    (AlertDescription::CertificateUnknown, "alert_certificate_unknown"),
    (AlertDescription::IllegalParameter, "alert_illegal_parameter"),
    (AlertDescription::UnknownCA, "alert_unknown_ca"),
    (AlertDescription::AccessDenied, "alert_access_denied"),
    (AlertDescription::DecodeError, "alert_decode_error"),
    (AlertDescription::DecryptError, "alert_decrypt_error"),
    (AlertDescription::ProtocolVersion, "alert_protocol_version"),
    (AlertDescription::InsufficientSecurity, "alert_insufficient_security"),
    (AlertDescription::InternalError, "alert_internal_error"),
    (AlertDescription::InappropriateFallback, "alert_inappropriate_fallback"),
    (AlertDescription::UserCanceled, "alert_user_canceled"),
    (AlertDescription::NoRenegotiation, "alert_no_renegotiation"),
    (AlertDescription::MissingExtension, "alert_missing_extension"),
    (AlertDescription::UnsupportedExtension, "alert_unsupported_extension"),
    (AlertDescription::UnrecognisedName, "alert_unrecognized_name"),
    (AlertDescription::BadCertificateStatusResponse, "alert_bad_certificate_status_response"),
    (AlertDescription::UnknownPSKIdentity, "alert_unknown_psk_identity"),
    (AlertDescription::CertificateRequired, "alert_certificate_required"),
    (AlertDescription::NoApplicationProtocol, "alert_no_application_protocol"),
];

/// The word of other alerts.
const OTHER_ALERT: &str = "alert_other";

fn alert_word(alert: AlertDescription) -> &'static str {
    let known = ALERTS.iter().find(|(known, _)| *known == alert);
    known.map_or(OTHER_ALERT, |(_, word)| word)
}

impl TlsFailure {
    /// The number of words.
    pub(crate) const COUNT: usize = OWN_WORDS.len() + ALERTS.len() + 1;

    /// The words of failures other than received alerts.
    pub(crate) fn own_words() -> &'static [WordInfo] {
        OWN_WORDS
    }

    /// Every word, in the order of the counters.
    pub(crate) fn words() -> impl Iterator<Item = &'static str> {
        let alerts = ALERTS.iter().map(|(_, word)| *word);
        Self::own_words().iter().map(|own| own.word).chain(alerts).chain([OTHER_ALERT])
    }

    /// The position of its counter.
    pub(crate) fn index(self) -> usize {
        Self::words().position(|word| word == self.word()).unwrap_or(0)
    }

    /// The failure of a handshake that has just failed on this thread. `has_begun` says whether the endpoint has sent a
    /// ServerHello: bytes before it may not be TLS at all.
    pub(super) fn of_handshake(error: &io::Error, has_begun: bool) -> Self {
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
        match (cause, error.kind()) {
            (Some(cause), _) => Self::of_tls(cause, has_begun),
            (None, io::ErrorKind::TimedOut) => Self::Timeout,
            (None, io::ErrorKind::UnexpectedEof) => Self::Closed,
            (None, io::ErrorKind::FileTooLarge) => Self::BadCertificate,
            (None, io::ErrorKind::InvalidData | io::ErrorKind::Other) => Self::Internal,
            (None, _) => Self::Reset,
        }
    }

    /// The failure of a read before the endpoint's first response: in TLS 1.3, a server refuses our certificate only
    /// then. None when the cause is not an alert.
    pub(crate) fn of_read(error: &io::Error) -> Option<Self> {
        match error.get_ref()?.downcast_ref::<Error>()? {
            Error::AlertReceived(alert) => Some(Self::Alert(*alert)),
            _ => None,
        }
    }

    /// The TLS failure of a connection attempt; none when it failed for another reason.
    pub(crate) fn of_attempt(error: &io::Error) -> Option<Self> {
        Some(error.get_ref()?.downcast_ref::<FailedHandshake>()?.failure)
    }

    fn of_tls(error: &Error, has_begun: bool) -> Self {
        match error {
            Error::AlertReceived(alert) => Self::Alert(*alert),
            Error::InvalidCertificate(cause) => Self::of_certificate(error, cause),
            Error::NoApplicationProtocol => Self::NoApplicationProtocol,
            Error::PeerIncompatible(cause) => match cause {
                PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::SupportedVersionsExtensionRequired => Self::ProtocolVersion,
                PeerIncompatible::ExtendedMasterSecretExtensionRequired => {
                    Self::NoExtendedMasterSecret
                }
                _ => Self::NoCommonCipher,
            },
            Error::InvalidMessage(cause) => match cause {
                InvalidMessage::UnsupportedCurveType
                | InvalidMessage::UnsupportedKeyExchangeAlgorithm(_)
                | InvalidMessage::NoSignatureSchemes => Self::NoCommonCipher,
                InvalidMessage::CertificatePayloadTooLarge
                | InvalidMessage::HandshakePayloadTooLarge => Self::BadCertificate,
                _ if !has_begun => Self::NotTls,
                _ => Self::ProtocolViolation,
            },
            // Programs that do not speak TLS send bytes that look like such records.
            Error::InappropriateMessage { .. } | Error::PeerSentOversizedRecord if !has_begun => {
                Self::NotTls
            }
            Error::InappropriateMessage { .. }
            | Error::InappropriateHandshakeMessage { .. }
            | Error::PeerMisbehaved(_)
            | Error::PeerSentOversizedRecord
            | Error::DecryptError => Self::ProtocolViolation,
            _ => Self::Internal,
        }
    }

    fn of_certificate(error: &Error, cause: &CertificateError) -> Self {
        let fault = fault::take(error).fault;
        match (cause, fault) {
            (CertificateError::BadSignature, _) => Self::BadSignature,
            (CertificateError::NotValidForName, _) | (_, PeerFault::Rejected) => Self::WrongName,
            (_, PeerFault::MaxChainDepthExceeded) => Self::ChainTooLong,
            (_, PeerFault::CrlHit) => Self::Revoked,
            (_, PeerFault::CrlProcessingError) => Self::RevocationUnknown,
            (_, PeerFault::Untrusted) => Self::UnknownIssuer,
            (_, PeerFault::NotYetValid) => Self::NotYetValid,
            (_, PeerFault::Expired) => Self::Expired,
            (_, PeerFault::TypeUnsupported) => Self::UnsupportedCertificate,
            (_, PeerFault::PurposeInvalid) => Self::WrongPurpose,
            (_, PeerFault::Invalid | PeerFault::MaxSizeExceeded | PeerFault::Unmapped) => {
                Self::BadCertificate
            }
        }
    }
}

/// A failed handshake, as the cause of an `io::Error`. Displays like `error`.
#[derive(Debug)]
pub(crate) struct FailedHandshake {
    failure: TlsFailure,
    error: io::Error,
}

impl FailedHandshake {
    /// Wraps an error, keeping its kind and text.
    pub(super) fn wrap(error: io::Error, failure: TlsFailure) -> io::Error {
        io::Error::new(error.kind(), Self { failure, error })
    }
}

impl fmt::Display for FailedHandshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for FailedHandshake {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_failure_has_its_own_word_and_counter() {
        let words: Vec<_> = TlsFailure::words().collect();
        assert_eq!(words.len(), TlsFailure::COUNT);
        assert_eq!(words.iter().collect::<HashSet<_>>().len(), words.len());
        let check = |failure: TlsFailure, word: &str| {
            assert_eq!(failure.word(), word);
            assert_eq!(words.get(failure.index()), Some(&word));
        };
        check(TlsFailure::UnknownIssuer, "unknown_issuer");
        check(TlsFailure::Internal, "internal_error");
        check(
            TlsFailure::Alert(AlertDescription::CertificateRequired),
            "alert_certificate_required",
        );
        check(TlsFailure::Alert(AlertDescription::Unknown(200)), "alert_other");
    }

    #[test]
    fn non_tls_bytes_are_distinguished_from_protocol_violations() {
        let failure = |error: Error, has_begun| {
            TlsFailure::of_handshake(&io::Error::new(io::ErrorKind::InvalidData, error), has_begun)
        };
        let content = || Error::InvalidMessage(InvalidMessage::InvalidContentType);
        assert_eq!(failure(content(), false), TlsFailure::NotTls);
        assert_eq!(failure(content(), true), TlsFailure::ProtocolViolation);
        let version = PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig;
        assert_eq!(failure(version.into(), true), TlsFailure::ProtocolVersion);
        let closed = io::Error::from(io::ErrorKind::UnexpectedEof);
        assert_eq!(TlsFailure::of_handshake(&closed, false), TlsFailure::Closed);
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        assert_eq!(TlsFailure::of_handshake(&reset, true), TlsFailure::Reset);
    }
}
