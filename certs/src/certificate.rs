//! The fields and extensions of a certificate (RFC 5280, section 4.1), as slices of its bytes.
//!
//! Verifiers read certificates in each handshake, so reading allocates nothing.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::der::{self, DerReader, Element};
use crate::signature;

const DISTRIBUTION_POINTS: &[u8] = &[0x55, 0x1d, 0x1f];

/// The fields of a certificate.
#[derive(Clone, Copy)]
pub(crate) struct CertificateFields<'a> {
    /// The certificate, DER.
    pub(crate) whole: &'a [u8],
    /// The content of the serial number.
    pub(crate) serial: &'a [u8],
    /// The content of the issuer's name.
    pub(crate) issuer: &'a [u8],
    /// The content of the subject's name.
    pub(crate) subject: &'a [u8],
    /// `SubjectPublicKeyInfo`.
    pub(crate) key: &'a [u8],
    validity: &'a [u8],
    /// What follows the key: two unused fields, then the extensions.
    rest: &'a [u8],
}

/// The time in which a certificate is valid, including both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Validity {
    pub(crate) not_before: UnixTime,
    pub(crate) not_after: UnixTime,
}

impl Validity {
    /// Whether the certificate is valid at this time.
    pub(crate) fn contains(&self, time: UnixTime) -> bool {
        self.not_before.as_secs() <= time.as_secs() && time.as_secs() <= self.not_after.as_secs()
    }

    /// The time in which both certificates are valid.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            not_before: self.not_before.max(other.not_before),
            not_after: self.not_after.min(other.not_after),
        }
    }
}

impl<'a> CertificateFields<'a> {
    /// Reads a certificate. None if a field is missing.
    pub(crate) fn read(certificate: &'a [u8]) -> Option<Self> {
        const VERSION: u8 = 0xa0;
        let mut outer = DerReader(DerReader(certificate).expect(der::SEQUENCE)?.content);
        let mut fields = DerReader(outer.expect(der::SEQUENCE)?.content);
        fields.optional(VERSION);
        let serial = fields.expect(der::INTEGER)?.content;
        // The signature algorithm.
        fields.expect(der::SEQUENCE)?;
        let issuer = fields.expect(der::SEQUENCE)?.content;
        let validity = fields.expect(der::SEQUENCE)?.content;
        let subject = fields.expect(der::SEQUENCE)?.content;
        let key = fields.expect(der::SEQUENCE)?.whole;
        Some(Self { whole: certificate, serial, issuer, subject, key, validity, rest: fields.0 })
    }

    /// The fields of all certificates that can be read.
    pub(crate) fn read_all(certificates: &'a [CertificateDer<'_>]) -> Vec<Self> {
        certificates.iter().filter_map(|certificate| Self::read(certificate)).collect()
    }

    /// `notBefore` and `notAfter` as encoded. None if one is missing.
    pub(crate) fn dates(&self) -> Option<[Element<'a>; 2]> {
        let mut validity = DerReader(self.validity);
        Some([validity.any()?, validity.any()?])
    }

    /// The validity. A start before 1970 is treated as 1970. None if a date is malformed, or the end is before 1970.
    pub(crate) fn validity(&self) -> Option<Validity> {
        let [not_before, not_after] = self.dates()?;
        let not_before =
            der::time(not_before).unwrap_or(UnixTime::since_unix_epoch(Duration::ZERO));
        Some(Validity { not_before, not_after: der::time(not_after)? })
    }

    /// Whether `above` is the named issuer, and its key signed this certificate.
    pub(crate) fn is_signed_by(&self, above: &Self) -> bool {
        self.issuer == above.subject && signature::is_signed(self.whole, above.key)
    }

    /// The extensions in their order. None if the fields before them are malformed.
    pub(crate) fn extensions(&self) -> Option<Extensions<'a>> {
        const EXTENSIONS: u8 = 0xa3;
        let mut rest = DerReader(self.rest);
        while !rest.is_empty() {
            let field = rest.any()?;
            if field.tag == EXTENSIONS {
                return Extensions::read(field.content);
            }
        }
        Some(Extensions(DerReader(&[])))
    }

    /// The value of an extension. None if the certificate does not have it, or an extension before it is malformed.
    pub(crate) fn extension(&self, id: &[u8]) -> Option<&'a [u8]> {
        let mut readable = self.extensions()?.map_while(|extension| extension);
        readable.find(|extension| extension.id == id).map(|extension| extension.value)
    }

    /// The names (`GeneralName`, DER) of the distribution points where the issuer publishes CRLs for all reasons (RFC
    /// 5280, section 4.2.1.13). Empty if the certificate has none, or they cannot be read.
    pub(crate) fn distribution_points(&self) -> Vec<&'a [u8]> {
        let value = self.extension(DISTRIBUTION_POINTS);
        value.and_then(distribution_points).unwrap_or_default()
    }
}

/// The validity of a certificate: its start and its end; none if it cannot be read.
#[must_use]
pub fn validity(certificate: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime)> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let at = |seconds: i64| Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).ok()?));
    let validity = parsed.validity();
    Some((at(validity.not_before.timestamp())?, at(validity.not_after.timestamp())?))
}

/// An extension of a certificate, CRL or CRL entry.
pub(crate) struct Extension<'a> {
    /// The content of the object identifier.
    pub(crate) id: &'a [u8],
    pub(crate) critical: bool,
    pub(crate) value: &'a [u8],
}

impl<'a> Extension<'a> {
    fn read(list: &mut DerReader<'a>) -> Option<Self> {
        let mut fields = DerReader(list.expect(der::SEQUENCE)?.content);
        let id = fields.expect(der::OBJECT_IDENTIFIER)?.content;
        let critical = match fields.optional(der::BOOLEAN) {
            Some(flag) => der::boolean(flag.content)?,
            None => false,
        };
        let value = fields.expect(der::OCTET_STRING)?.content;
        fields.is_empty().then_some(Self { id, critical, value })
    }
}

/// Extensions in their order. An item is none if the extension is malformed; the caller must not read on.
pub(crate) struct Extensions<'a>(DerReader<'a>);

impl<'a> Extensions<'a> {
    /// Reads the SEQUENCE of extensions. None if it is malformed, or bytes follow it.
    pub(crate) fn read(sequence: &'a [u8]) -> Option<Self> {
        let mut outer = DerReader(sequence);
        let list = outer.expect(der::SEQUENCE)?.content;
        outer.is_empty().then_some(Self::of(list))
    }

    /// The extensions in the content of their SEQUENCE.
    pub(crate) fn of(list: &'a [u8]) -> Self {
        Self(DerReader(list))
    }
}

impl<'a> Iterator for Extensions<'a> {
    type Item = Option<Extension<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        (!self.0.is_empty()).then(|| Extension::read(&mut self.0))
    }
}

/// Each name (`GeneralName`, DER) of a `GeneralNames`. None if a name is malformed.
pub(crate) fn general_names(content: &[u8]) -> Option<Vec<&[u8]>> {
    // RFC 5280, section 4.2.1.6: nine kinds, of which four are constructed.
    const KINDS: [u8; 9] = [0xa0, 0x81, 0x82, 0xa3, 0xa4, 0xa5, 0x86, 0x87, 0x88];
    let mut list = DerReader(content);
    let mut names = Vec::new();
    while !list.is_empty() {
        let name = list.any().filter(|name| KINDS.contains(&name.tag))?;
        names.push(name.whole);
    }
    Some(names)
}

/// `CRLDistributionPoints`.
fn distribution_points(value: &[u8]) -> Option<Vec<&[u8]>> {
    const POINT: u8 = 0xa0;
    const FULL_NAME: u8 = 0xa0;
    let mut found = Vec::new();
    let mut points = DerReader(DerReader(value).expect(der::SEQUENCE)?.content);
    while !points.is_empty() {
        let mut fields = DerReader(points.expect(der::SEQUENCE)?.content);
        let name = fields.optional(POINT);
        // A point with reasons covers only some revocations, and one with a CRL issuer is another issuer's.
        let Some(name) = name.filter(|_| fields.is_empty()) else {
            continue;
        };
        if let Some(names) = DerReader(name.content).optional(FULL_NAME) {
            found.extend(general_names(names.content)?);
        }
    }
    Some(found)
}
