//! Text forms of certificate fields: names as in RFC 2253, dates as in ISO 8601.

use std::fmt::Write as _;

use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::certificate::CertificateFields;
use crate::der::{self, DerReader, Element};
use crate::digest::hex;
use crate::profile;
use crate::serial::serial_hex;

/// The fields of a certificate as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateText {
    /// The subject's name (RFC 2253).
    pub subject: String,
    /// The issuer's name (RFC 2253).
    pub issuer: String,
    /// The serial number in upper-case hex, without the sign byte.
    pub serial: String,
    /// Start of the validity, for example `2026-01-31T00:00:00Z`.
    pub not_before: String,
    /// End of the validity.
    pub not_after: String,
}

impl CertificateText {
    /// Reads a certificate; none if it cannot be read. The certificate is not verified.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let fields = CertificateFields::read(certificate)?;
        let [not_before, not_after] = fields.dates()?;
        Some(Self {
            subject: name(fields.subject)?,
            issuer: name(fields.issuer)?,
            serial: serial_hex(fields.serial),
            not_before: date(not_before)?,
            not_after: date(not_after)?,
        })
    }
}

/// The names of the `subjectAltName` extension in their order; empty if they cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CertificateNames {
    /// The URIs.
    pub uris: Vec<String>,
    /// The DNS names.
    pub dns: Vec<String>,
}

impl CertificateNames {
    /// Reads the names of a certificate. They are not verified.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let names = profile::alternative_names(certificate).unwrap_or_default();
        let owned = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect();
        Self { uris: owned(names.uris), dns: owned(names.dns) }
    }
}

fn date(element: Element<'_>) -> Option<String> {
    let seconds = i64::try_from(der::time(element)?.as_secs()).ok()?;
    OffsetDateTime::from_unix_timestamp(seconds).ok()?.format(&Rfc3339).ok()
}

/// Formats a name (RFC 2253, section 2): the last part first.
fn name(content: &[u8]) -> Option<String> {
    const SET: u8 = 0x31;
    let mut sets = DerReader(content);
    let mut parts = Vec::new();
    while !sets.is_empty() {
        let mut attributes = DerReader(sets.expect(SET)?.content);
        let mut values = Vec::new();
        while !attributes.is_empty() {
            values.push(attribute(attributes.expect(der::SEQUENCE)?)?);
        }
        parts.push(values.join("+"));
    }
    parts.reverse();
    Some(parts.join(","))
}

fn attribute(attribute: Element<'_>) -> Option<String> {
    let mut fields = DerReader(attribute.content);
    let id = fields.expect(der::OBJECT_IDENTIFIER)?.content;
    let value = fields.any()?;
    match (short(id), text(value)) {
        (Some(short), Some(text)) => Some(format!("{short}={}", escaped(&text))),
        // Section 2.4: values without a text form, and types without a short name, are printed in hex.
        _ => Some(format!("{}=#{}", dotted(id)?, hex(value.whole))),
    }
}

fn short(id: &[u8]) -> Option<&'static str> {
    Some(match id {
        [0x55, 4, 3] => "CN",
        [0x55, 4, 6] => "C",
        [0x55, 4, 7] => "L",
        [0x55, 4, 8] => "ST",
        [0x55, 4, 9] => "STREET",
        [0x55, 4, 10] => "O",
        [0x55, 4, 11] => "OU",
        [9, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 1] => "UID",
        [9, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 25] => "DC",
        _ => return None,
    })
}

fn text(value: Element<'_>) -> Option<String> {
    const UTF8: u8 = 0x0c;
    const PRINTABLE: u8 = 0x13;
    const TELETEX: u8 = 0x14;
    const IA5: u8 = 0x16;
    const BMP: u8 = 0x1e;
    match value.tag {
        UTF8 => String::from_utf8(value.content.to_vec()).ok(),
        PRINTABLE | IA5 if value.content.is_ascii() => {
            String::from_utf8(value.content.to_vec()).ok()
        }
        TELETEX => Some(value.content.iter().map(|byte| char::from(*byte)).collect()),
        BMP => {
            let units = value.content.chunks(2).map(|pair| match pair {
                [high, low] => Some(u16::from_be_bytes([*high, *low])),
                _ => None,
            });
            String::from_utf16(&units.collect::<Option<Vec<_>>>()?).ok()
        }
        _ => None,
    }
}

/// Escapes a value (section 2.4). Bytes that are not printable ASCII become `\XX`, so the result fits into an HTTP
/// header.
fn escaped(text: &str) -> String {
    let last = text.len().saturating_sub(1);
    let mut out = String::with_capacity(text.len());
    for (at, byte) in text.bytes().enumerate() {
        let is_edge = at == 0 || at == last;
        match byte {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => {
                out.push('\\');
                out.push(char::from(byte));
            }
            b'#' if at == 0 => out.push_str("\\#"),
            b' ' if is_edge => out.push_str("\\ "),
            0x20..=0x7e => out.push(char::from(byte)),
            other => {
                // Writing to a `String` cannot fail.
                let _infallible = write!(out, "\\{other:02X}");
            }
        }
    }
    out
}

/// Formats an object identifier with dots (X.690, section 8.19).
fn dotted(id: &[u8]) -> Option<String> {
    let mut arcs: Vec<u64> = Vec::new();
    let mut arc: u64 = 0;
    for byte in id {
        arc = arc.checked_mul(128)?.checked_add(u64::from(byte & 0x7f))?;
        if byte & 0x80 == 0 {
            if arcs.is_empty() {
                let first = (arc / 40).min(2);
                arcs.extend([first, arc - first * 40]);
            } else {
                arcs.push(arc);
            }
            arc = 0;
        }
    }
    let arcs: Vec<String> = arcs.iter().map(ToString::to_string).collect();
    Some(arcs.join("."))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, KeyPair};

    use super::*;

    fn subject(parts: &[(DnType, DnValue)]) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in parts {
            params.distinguished_name.push(kind.clone(), value.clone());
        }
        params.serial_number = Some(vec![0x00, 0xa5, 0xb1].into());
        params.not_before = rcgen::date_time_ymd(2023, 9, 21);
        params.not_after = rcgen::date_time_ymd(2050, 9, 20);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let text = CertificateText::of(certificate.der()).unwrap();
        assert_eq!(text.serial, "A5B1");
        assert_eq!(
            (text.not_before.as_str(), text.not_after.as_str()),
            ("2023-09-21T00:00:00Z", "2050-09-20T00:00:00Z")
        );
        assert_eq!(text.issuer, text.subject);
        text.subject
    }

    #[test]
    fn names_are_formatted_as_in_rfc_2253() {
        let utf8 = |text: &str| DnValue::Utf8String(text.into());
        let printable = |text: &str| DnValue::PrintableString(text.try_into().unwrap());
        let example = [
            (DnType::CountryName, printable("US")),
            (DnType::StateOrProvinceName, utf8("Washington")),
            (DnType::LocalityName, utf8("Seattle")),
            (DnType::OrganizationName, utf8("mTLS")),
            (DnType::OrganizationalUnitName, utf8("rootCA")),
            (DnType::CommonName, utf8("rootcamtls.com")),
        ];
        assert_eq!(
            subject(&example),
            "CN=rootcamtls.com,OU=rootCA,O=mTLS,L=Seattle,ST=Washington,C=US"
        );
        let check = |text: &str, expected: &str| {
            assert_eq!(subject(&[(DnType::CommonName, utf8(text))]), format!("CN={expected}"));
        };
        check("a,b+c\"d\\e<f>g;h=i", "a\\,b\\+c\\\"d\\\\e\\<f\\>g\\;h=i");
        check(" # a# ", "\\ # a#\\ ");
        check("#a", "\\#a");
        check("Lučić\n", "Lu\\C4\\8Di\\C4\\87\\0A");
        let serial = DnType::CustomDnType(vec![2, 5, 4, 5]);
        assert_eq!(subject(&[(serial, printable("7"))]), "2.5.4.5=#130137");
        let own = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 311, 1]);
        assert_eq!(subject(&[(own, utf8("x"))]), "1.3.6.1.4.1.311.1=#0c0178");
        assert_eq!(subject(&[]), "");
    }
}
