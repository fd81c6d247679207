//! Certificate profile checks in addition to those of webpki (RFC 5280, section 4.2; X.509-SVID, sections 2 and 4).

use weft_model::SpiffeId;

use crate::der::{self, DerReader};
use crate::proof::shortest;

const ALTERNATIVE_NAMES: &[u8] = &[0x55, 0x1d, 0x11];
const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
const NAME_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x1e];
const POLICY_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x24];

/// The maximum length of a serial number in bytes: 20 (RFC 5280, section 4.1.2.2) and one for the sign. CRL entries
/// have the same limit, so a longer serial number could not be revoked.
const SERIAL_BYTES: usize = 21;

/// Checks the profile of a leaf certificate.
///
/// # Errors
/// The certificate cannot be read, its serial number is too long, it has name constraints, or its key usage is not
/// that of a leaf.
pub(crate) fn check_leaf(certificate: &[u8]) -> Result<(), &'static str> {
    let profile = CertificateProfile::read(certificate).ok_or("certificate cannot be read")?;
    profile.check_serial()?;
    if profile.constrains_names {
        return Err("leaf certificate has name constraints");
    }
    match profile.usage {
        Some(usage) if usage.signs_certificates => {
            Err("key usage of the leaf certificate allows certificate signing")
        }
        Some(usage) if !usage.signs => {
            Err("key usage of the leaf certificate does not allow signatures")
        }
        _ => Ok(()),
    }
}

/// Checks the profile of an intermediate certificate.
///
/// # Errors
/// The certificate cannot be read, its serial number is too long, its key usage does not allow certificate signing,
/// its name constraints are malformed, or it has policy constraints.
pub(crate) fn check_authority(certificate: &[u8]) -> Result<(), &'static str> {
    let profile = CertificateProfile::read(certificate).ok_or("certificate cannot be read")?;
    profile.check_serial()?;
    if profile.usage.is_some_and(|usage| !usage.signs_certificates) {
        return Err("key usage of a CA does not allow certificate signing");
    }
    if profile.names_are_malformed {
        return Err("malformed name constraints of a CA");
    }
    if profile.constrains_policies {
        return Err("unsupported policy constraints of a CA");
    }
    Ok(())
}

/// Returns the SPIFFE ID of a certificate. None if no URI has the `spiffe` scheme.
///
/// # Errors
/// A name cannot be read, a SPIFFE ID is invalid, or there are other URIs besides the SPIFFE ID.
pub(crate) fn identity(certificate: &[u8]) -> Result<Option<SpiffeId>, &'static str> {
    let AlternativeNames { uris, .. } = alternative_names(certificate)?;
    let claims = |name: &&str| {
        name.split(':').next().is_some_and(|scheme| scheme.eq_ignore_ascii_case("spiffe"))
    };
    match uris.as_slice() {
        [only] if claims(only) => SpiffeId::parse(only).map(Some).map_err(|_| "invalid SPIFFE ID"),
        several if several.iter().any(claims) => {
            Err("certificate has another URI besides the SPIFFE ID")
        }
        _ => Ok(None),
    }
}

/// The subject alternative names that can be written into a header (RFC 5280, section 4.2.1.6).
#[derive(Debug, Default)]
pub(crate) struct AlternativeNames<'a> {
    /// All URIs.
    pub(crate) uris: Vec<&'a str>,
    /// The DNS names. Names that are not ASCII are invalid and left out.
    pub(crate) dns: Vec<&'a str>,
}

/// Returns the URIs and DNS names of a certificate in their order.
///
/// # Errors
/// The extension is malformed, or a URI is not UTF-8.
pub(crate) fn alternative_names(certificate: &[u8]) -> Result<AlternativeNames<'_>, &'static str> {
    const DNS: u8 = 0x82;
    const URI: u8 = 0x86;
    let unreadable = "subject alternative names cannot be read";
    let mut found = AlternativeNames::default();
    let Some(names) = extension(certificate, ALTERNATIVE_NAMES) else {
        return Ok(found);
    };
    let mut outer = DerReader(names);
    let names = outer.expect(der::SEQUENCE).filter(|_| outer.is_empty()).ok_or(unreadable)?;
    let mut names = DerReader(names.content);
    while !names.is_empty() {
        let name = names.any().ok_or(unreadable)?;
        let text = std::str::from_utf8(name.content);
        match name.tag {
            URI => found.uris.push(text.map_err(|_| unreadable)?),
            DNS => found.dns.extend(text.ok().filter(|text| text.is_ascii())),
            _ => {}
        }
    }
    Ok(found)
}

/// Returns the value of an extension.
fn extension<'a>(certificate: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    const EXTENSIONS: u8 = 0xa3;
    let mut outer = DerReader(DerReader(certificate).expect(der::SEQUENCE)?.content);
    let mut fields = DerReader(outer.expect(der::SEQUENCE)?.content);
    let extensions = loop {
        let field = fields.any()?;
        if field.tag == EXTENSIONS {
            break field.content;
        }
    };
    let mut list = DerReader(DerReader(extensions).expect(der::SEQUENCE)?.content);
    loop {
        let mut extension = DerReader(list.expect(der::SEQUENCE)?.content);
        let id = extension.expect(der::OBJECT_IDENTIFIER)?.content;
        extension.optional(der::BOOLEAN);
        if id == wanted {
            return Some(extension.expect(der::OCTET_STRING)?.content);
        }
    }
}

#[derive(Default)]
struct CertificateProfile<'a> {
    serial: &'a [u8],
    usage: Option<Usage>,
    constrains_names: bool,
    names_are_malformed: bool,
    constrains_policies: bool,
}

#[derive(Clone, Copy)]
struct Usage {
    signs: bool,
    signs_certificates: bool,
}

impl<'a> CertificateProfile<'a> {
    fn read(certificate: &'a [u8]) -> Option<Self> {
        const VERSION: u8 = 0xa0;
        const EXTENSIONS: u8 = 0xa3;
        let mut outer = DerReader(DerReader(certificate).expect(der::SEQUENCE)?.content);
        let mut fields = DerReader(outer.expect(der::SEQUENCE)?.content);
        fields.optional(VERSION);
        let mut profile = Self { serial: fields.expect(der::INTEGER)?.content, ..Self::default() };
        while !fields.is_empty() {
            let field = fields.any()?;
            if field.tag == EXTENSIONS {
                profile.read_extensions(field.content)?;
            }
        }
        Some(profile)
    }

    fn read_extensions(&mut self, extensions: &[u8]) -> Option<()> {
        let mut list = DerReader(DerReader(extensions).expect(der::SEQUENCE)?.content);
        while !list.is_empty() {
            let mut extension = DerReader(list.expect(der::SEQUENCE)?.content);
            let id = extension.expect(der::OBJECT_IDENTIFIER)?.content;
            extension.optional(der::BOOLEAN);
            let value = extension.expect(der::OCTET_STRING)?.content;
            match id {
                KEY_USAGE => self.usage = Some(usage(value)?),
                NAME_CONSTRAINTS => {
                    self.constrains_names = true;
                    self.names_are_malformed = !name_constraints_are_valid(value);
                }
                POLICY_CONSTRAINTS => self.constrains_policies = true,
                _ => {}
            }
        }
        Some(())
    }

    fn check_serial(&self) -> Result<(), &'static str> {
        if shortest(self.serial).len() > SERIAL_BYTES {
            Err("serial number is longer than 20 bytes")
        } else {
            Ok(())
        }
    }
}

/// `KeyUsage` (RFC 5280, section 4.2.1.3): the first bit is the highest.
fn usage(value: &[u8]) -> Option<Usage> {
    let bits = DerReader(value).expect(der::BIT_STRING)?.content;
    let first = bits.get(1).copied().unwrap_or(0);
    Some(Usage { signs: first & 0x80 != 0, signs_certificates: first & 0x04 != 0 })
}

/// Whether `NameConstraints` has at least one subtree in each list, and no DNS name begins with a dot.
fn name_constraints_are_valid(value: &[u8]) -> bool {
    fn read(value: &[u8]) -> Option<bool> {
        const DNS_NAME: u8 = 0x82;
        let mut outer = DerReader(value);
        let mut kinds = DerReader(outer.expect(der::SEQUENCE)?.content);
        let mut good = outer.is_empty() && !kinds.is_empty();
        while !kinds.is_empty() {
            let mut subtrees = DerReader(kinds.any()?.content);
            good &= !subtrees.is_empty();
            while !subtrees.is_empty() {
                let base = DerReader(subtrees.expect(der::SEQUENCE)?.content).any()?;
                good &= base.tag != DNS_NAME || base.content.first() != Some(&b'.');
            }
        }
        Some(good)
    }
    read(value).unwrap_or(false)
}
