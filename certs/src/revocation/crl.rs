//! A CRL, the question that it answers, and the answer.

use std::fmt;

use rustls_pki_types::UnixTime;

use super::serials::Serials;
use crate::certificate::CertificateFields;
use crate::digest::hex;

/// The revocation status of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevocationStatus {
    /// The CRLs that cover the certificate are in force, and none revokes it.
    Good,
    /// A CRL of the issuer revokes the certificate.
    Revoked,
    /// No CRL of the issuer covers the certificate.
    Unknown,
    /// A CRL that covers the certificate is past its `nextUpdate`.
    Expired,
}

/// The role of a certificate in a chain. A CRL may cover one role only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateRole {
    /// The end entity.
    Leaf,
    /// An intermediate CA.
    Authority,
}

/// A certificate whose revocation status is queried.
#[derive(Debug, Clone, Copy)]
pub struct RevocationQuery<'a> {
    /// The content of the issuer's name, DER.
    pub issuer: &'a [u8],
    /// The issuer's `SubjectPublicKeyInfo`, DER: only CRLs of this key can prove that the certificate is good. None:
    /// CRLs of all keys with the issuer's name count.
    pub issuer_key: Option<&'a [u8]>,
    /// The serial number, two's complement, big-endian.
    pub serial: &'a [u8],
    /// The role in the chain.
    pub role: CertificateRole,
    /// The certificate, DER, for CRLs that cover one distribution point. Empty: such CRLs do not prove that the
    /// certificate is good.
    pub certificate: &'a [u8],
}

/// A number of at most 20 bytes (RFC 5280, section 5.2.3), right-aligned.
pub(super) type Number = [u8; 20];

/// The certificates of the issuer that a CRL covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scope {
    pub(super) leaves: bool,
    pub(super) authorities: bool,
    /// The names (`GeneralName`, DER) of the distribution point; empty: the CRL is not limited to a distribution
    /// point.
    pub(super) points: Box<[Box<[u8]>]>,
}

/// A parsed CRL.
pub(super) struct Crl {
    /// The key that signed the CRL. CRL numbers are per key and scope.
    pub(super) public_key: Vec<u8>,
    pub(super) scope: Scope,
    /// `CRLNumber`.
    pub(super) number: Number,
    pub(super) this_update: UnixTime,
    pub(super) next_update: UnixTime,
    pub(super) serials: Serials,
}

impl fmt::Debug for Crl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} serials, next update {}", self.serials.len(), self.next_update.as_secs())
    }
}

/// An error in loading a CRL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CRL {index}: {reason}")]
pub struct CrlError {
    /// The index of the CRL in the input, from 0.
    pub index: usize,
    /// The reason.
    pub reason: String,
}

impl Crl {
    /// The order of CRLs with the same key and scope.
    pub(super) fn age(&self) -> (&Number, UnixTime) {
        (&self.number, self.this_update)
    }

    /// Whether the newer of the two CRLs replaces the other.
    pub(super) fn has_same_key_and_scope(&self, other: &Self) -> bool {
        self.public_key == other.public_key && self.scope == other.scope
    }

    /// Whether the CRL is in force and not limited to a distribution point.
    pub(super) fn covers_all(&self, now: UnixTime) -> bool {
        self.scope.points.is_empty() && self.next_update > now
    }
}

impl Scope {
    /// Whether a CRL of this scope covers the certificate.
    pub(super) fn covers(&self, asked: &RevocationQuery<'_>) -> bool {
        let named = match asked.role {
            CertificateRole::Leaf => self.leaves,
            CertificateRole::Authority => self.authorities,
        };
        let at_point = |point: &&[u8]| self.points.iter().any(|own| **own == **point);
        let is_at_point = || {
            CertificateFields::read(asked.certificate)
                .is_some_and(|fields| fields.distribution_points().iter().any(at_point))
        };
        named && (self.points.is_empty() || is_at_point())
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.leaves, self.authorities) {
            (true, true) => "all",
            (true, false) => "leaves",
            (false, _) => "authorities",
        })?;
        for point in &self.points {
            write!(f, " at {}", String::from_utf8_lossy(point.get(2..).unwrap_or_default()))?;
        }
        Ok(())
    }
}

/// The longest readable part of a name, for messages.
pub(super) fn name(issuer: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(issuer)
        .chars()
        .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '\u{0}' })
        .collect();
    let longest = text.split('\u{0}').max_by_key(|part| part.len()).unwrap_or_default();
    format!("{longest:?}")
}

/// Formats a number in hex without leading zeros.
pub(super) fn digits(number: &Number) -> String {
    let digits = hex(number);
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() { "0".into() } else { digits.into() }
}
