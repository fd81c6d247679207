//! Certificate profile checks in addition to those of webpki (RFC 5280, section 4.2; X.509-SVID, sections 2 and 4).

use rustls_pki_types::CertificateDer;
use weft_model::SpiffeId;
use x509_parser::extensions::KeyUsage;
use x509_parser::prelude::FromDer;

use crate::certificate::{CertificateFields, Extension};
use crate::der::{self, DerReader};
use crate::serial::{SERIAL_LIMIT_BYTES, shortest};

const ALTERNATIVE_NAMES: &[u8] = &[0x55, 0x1d, 0x11];
const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
const NAME_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x1e];
const POLICY_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x24];

/// The error for a certificate that is malformed.
pub(crate) const UNREADABLE: &str = "certificate cannot be read";

/// The role in which a peer presents its certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Client = 0,
    Server = 1,
}

impl Purpose {
    pub(crate) fn usage(self) -> webpki::KeyUsage {
        match self {
            Self::Client => webpki::KeyUsage::client_auth(),
            Self::Server => webpki::KeyUsage::server_auth(),
        }
    }
}

/// Checks the profile of a leaf certificate.
///
/// # Errors
/// The certificate cannot be read, its serial number is too long, it has name constraints, or its key usage is not
/// that of a leaf.
pub(crate) fn check_leaf(certificate: &CertificateFields<'_>) -> Result<(), &'static str> {
    let profile = CertificateProfile::read(certificate)?;
    if profile.constrains_names {
        return Err("leaf certificate has name constraints");
    }
    match profile.usage {
        Some(usage) if usage.key_cert_sign() => {
            Err("key usage of the leaf certificate allows certificate signing")
        }
        Some(usage) if !usage.digital_signature() => {
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
pub(crate) fn check_authority(certificate: &CertificateFields<'_>) -> Result<(), &'static str> {
    let profile = CertificateProfile::read(certificate)?;
    if profile.usage.is_some_and(|usage| !usage.key_cert_sign()) {
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

/// The SPIFFE ID of a certificate that the caller has verified.
#[must_use]
pub fn identity_of(verified: &CertificateDer<'_>) -> Option<SpiffeId> {
    identity(verified).ok()?
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
    let fields = CertificateFields::read(certificate);
    let Some(names) = fields.and_then(|fields| fields.extension(ALTERNATIVE_NAMES)) else {
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

#[derive(Default)]
struct CertificateProfile {
    usage: Option<KeyUsage>,
    constrains_names: bool,
    names_are_malformed: bool,
    constrains_policies: bool,
}

impl CertificateProfile {
    /// Reads the extensions and checks the serial number.
    fn read(certificate: &CertificateFields<'_>) -> Result<Self, &'static str> {
        let profile = Self::read_extensions(certificate).ok_or(UNREADABLE)?;
        if shortest(certificate.serial).len() > SERIAL_LIMIT_BYTES {
            return Err("serial number is longer than 20 bytes");
        }
        Ok(profile)
    }

    fn read_extensions(certificate: &CertificateFields<'_>) -> Option<Self> {
        let mut profile = Self::default();
        for extension in certificate.extensions()? {
            let Extension { id, value, .. } = extension?;
            match id {
                KEY_USAGE => profile.usage = Some(KeyUsage::from_der(value).ok()?.1),
                NAME_CONSTRAINTS => {
                    profile.constrains_names = true;
                    profile.names_are_malformed = !name_constraints_are_valid(value);
                }
                POLICY_CONSTRAINTS => profile.constrains_policies = true,
                _ => {}
            }
        }
        Some(profile)
    }
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
