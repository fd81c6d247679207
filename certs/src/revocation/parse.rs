//! A strict parser for CRLs (RFC 5280, section 5). Unsupported kinds of CRLs are rejected on load with a reason, and
//! not in a handshake.

use rustls_pki_types::UnixTime;

use super::crl::{Crl, Number, Scope};
use super::serials::Serials;
use crate::certificate::{Extensions, general_names};
use crate::der::{self, DerReader, Element};
use crate::issuer::CaCertificate;
use crate::signature::SignedStructure;

const CRL_NUMBER: &[u8] = &[0x55, 0x1d, 0x14];
const REASON: &[u8] = &[0x55, 0x1d, 0x15];
const INVALIDITY_DATE: &[u8] = &[0x55, 0x1d, 0x18];
const DELTA_INDICATOR: &[u8] = &[0x55, 0x1d, 0x1b];
const ISSUING_DISTRIBUTION_POINT: &[u8] = &[0x55, 0x1d, 0x1c];
const CERTIFICATE_ISSUER: &[u8] = &[0x55, 0x1d, 0x1d];

/// A parsed CRL. Its signature is not verified.
pub(super) struct RawCrl<'a> {
    /// The content of the issuer's name.
    pub(super) issuer: &'a [u8],
    pub(super) this_update: UnixTime,
    pub(super) next_update: UnixTime,
    pub(super) number: Number,
    /// For a delta CRL: the minimum number of its base CRL.
    pub(super) base: Option<Number>,
    pub(super) scope: Scope,
    /// The revoked serial numbers.
    pub(super) revoked: Vec<&'a [u8]>,
    /// For a delta CRL: the serial numbers that it removes from the base CRL.
    pub(super) restored: Vec<&'a [u8]>,
}

const MALFORMED: &str = "malformed CRL";
const INDIRECT: &str = "indirect CRLs are not supported";
const CRITICAL: &str = "unsupported critical extension";

impl<'a> RawCrl<'a> {
    /// Parses a CRL. The signature is not verified.
    ///
    /// # Errors
    /// The CRL is malformed, of an unsupported kind, or has more than `limit` entries.
    pub(super) fn read(der: &'a [u8], limit: usize) -> Result<Self, String> {
        let signed = SignedStructure::read(der).ok_or(MALFORMED)?;
        let mut fields = fields(&signed).ok_or(MALFORMED)?;
        let version = fields.optional(der::INTEGER);
        if version.is_none_or(|version| version.content != [1]) {
            return Err("only version 2 CRLs are supported".into());
        }
        if fields.expect(der::SEQUENCE).is_none_or(|own| own.content != signed.algorithm) {
            return Err(format!("{MALFORMED}: the two signature algorithms differ"));
        }
        let issuer = fields.expect(der::SEQUENCE).ok_or(MALFORMED)?.content;
        let this_update = fields.any().and_then(der::time);
        let this_update = this_update.ok_or_else(|| format!("{MALFORMED}: thisUpdate"))?;
        let next_update = fields.any().and_then(der::time);
        let next_update = next_update.ok_or_else(|| format!("{MALFORMED}: nextUpdate"))?;
        let entries = fields.optional(der::SEQUENCE).map_or(&[][..], |entries| entries.content);
        let extensions = fields.optional(0xa0).ok_or(MALFORMED)?.content;
        if !fields.is_empty() {
            return Err(MALFORMED.into());
        }
        let CrlExtensions { number, base, scope } = crl_extensions(extensions)?;
        let number = number.ok_or("CRL number is missing or critical")?;
        let mut revoked = Vec::new();
        let mut restored = Vec::new();
        let mut entries = DerReader(entries);
        while !entries.is_empty() {
            let entry = RevokedEntry::read(entries.expect(der::SEQUENCE).ok_or(MALFORMED)?)?;
            // `removeFromCRL` has no meaning in a full CRL, so the certificate stays revoked there.
            let is_restored = entry.is_restored && base.is_some();
            if is_restored { &mut restored } else { &mut revoked }.push(entry.serial);
            if revoked.len() + restored.len() > limit {
                return Err(format!("CRL has more than {limit} entries, which is the limit"));
            }
        }
        Ok(Self { issuer, this_update, next_update, number, base, scope, revoked, restored })
    }
}

impl RawCrl<'_> {
    /// The content of the issuer's name in a CRL; none if it cannot be read.
    pub(super) fn issuer(der: &[u8]) -> Option<&[u8]> {
        let mut fields = fields(&SignedStructure::read(der)?)?;
        fields.optional(der::INTEGER);
        fields.expect(der::SEQUENCE)?;
        Some(fields.expect(der::SEQUENCE)?.content)
    }
}

/// A parsed CRL; its signature may not be verified yet.
pub(super) struct ParsedCrl {
    /// The index of the CRL in the input.
    pub(super) position: usize,
    /// The content of the issuer's name.
    pub(super) issuer: Vec<u8>,
    pub(super) list: Crl,
    /// For a delta CRL (RFC 5280, section 5.2.4): the changes to its base CRL.
    pub(super) changes: Option<Changes>,
}

pub(super) struct Changes {
    /// The minimum number of the base CRL.
    pub(super) base: Number,
    pub(super) restored: Serials,
}

impl ParsedCrl {
    /// Parses a CRL and sorts its serial numbers.
    ///
    /// # Errors
    /// The same as for [`RawCrl::read`], or a serial number is too long.
    pub(super) fn read(der: &[u8], position: usize, limit: usize) -> Result<Self, String> {
        let RawCrl { issuer, this_update, next_update, number, base, scope, revoked, restored } =
            RawCrl::read(der, limit)?;
        let set =
            |serials| Serials::new(serials).map_err(|_| "serial number is longer than 20 bytes");
        let list = Crl {
            public_key: Vec::new(),
            scope,
            number,
            this_update,
            next_update,
            serials: set(revoked)?,
        };
        let restored = set(restored)?;
        let changes = base.map(|base| Changes { base, restored });
        Ok(Self { position, issuer: issuer.to_vec(), list, changes })
    }

    /// The number of entries.
    pub(super) fn entries(&self) -> usize {
        let restored = self.changes.as_ref().map_or(0, |changes| changes.restored.len());
        self.list.serials.len() + restored
    }

    /// Records the CA that signed the CRL.
    pub(super) fn signed_by(mut self, signer: &CaCertificate) -> Self {
        self.list.public_key.clone_from(&signer.public_key);
        self
    }
}

/// The fields of the signed part.
fn fields<'a>(signed: &SignedStructure<'a>) -> Option<DerReader<'a>> {
    Some(DerReader(DerReader(signed.body).expect(der::SEQUENCE)?.content))
}

/// An entry of a CRL.
struct RevokedEntry<'a> {
    serial: &'a [u8],
    /// Whether the entry removes an earlier one.
    is_restored: bool,
}

impl<'a> RevokedEntry<'a> {
    fn read(entry: Element<'a>) -> Result<Self, String> {
        const REMOVE_FROM_CRL: &[u8] = &[0x0a, 1, 8];
        let mut fields = DerReader(entry.content);
        let serial = fields.expect(der::INTEGER).ok_or(MALFORMED)?.content;
        fields.any().and_then(der::time).ok_or(MALFORMED)?;
        let extensions = fields.optional(der::SEQUENCE).map_or(&[][..], |list| list.content);
        let mut is_restored = false;
        for extension in Extensions::of(extensions) {
            let extension = extension.ok_or(MALFORMED)?;
            match extension.id {
                CERTIFICATE_ISSUER => return Err(INDIRECT.into()),
                REASON => is_restored = extension.value == REMOVE_FROM_CRL,
                INVALIDITY_DATE => {}
                _ if extension.critical => return Err(CRITICAL.into()),
                _ => {}
            }
        }
        if fields.is_empty() && !serial.is_empty() {
            Ok(Self { serial, is_restored })
        } else {
            Err(MALFORMED.into())
        }
    }
}

struct CrlExtensions {
    number: Option<Number>,
    base: Option<Number>,
    scope: Scope,
}

fn crl_extensions(extensions: &[u8]) -> Result<CrlExtensions, String> {
    let whole = Scope { leaves: true, authorities: true, points: Box::default() };
    let mut found = CrlExtensions { number: None, base: None, scope: whole };
    let mut seen: Vec<&[u8]> = Vec::new();
    for extension in Extensions::read(extensions).ok_or(MALFORMED)? {
        let extension = extension.ok_or(MALFORMED)?;
        if seen.contains(&extension.id) {
            return Err(format!("{MALFORMED}: duplicate extension"));
        }
        seen.push(extension.id);
        match extension.id {
            // RFC 5280, section 5.2.3: "CRLNumber is a non-critical CRL extension".
            CRL_NUMBER if !extension.critical => {
                found.number = Some(number(extension.value).ok_or(MALFORMED)?);
            }
            DELTA_INDICATOR => found.base = Some(number(extension.value).ok_or(MALFORMED)?),
            ISSUING_DISTRIBUTION_POINT => found.scope = scope(extension.value)?,
            CRL_NUMBER => {}
            _ if extension.critical => return Err(CRITICAL.into()),
            _ => {}
        }
    }
    if !seen.is_empty() { Ok(found) } else { Err(MALFORMED.into()) }
}

/// `IssuingDistributionPoint` (RFC 5280, section 5.2.5).
fn scope(value: &[u8]) -> Result<Scope, String> {
    const POINT: u8 = 0xa0;
    const ONLY_USERS: u8 = 0x81;
    const ONLY_AUTHORITIES: u8 = 0x82;
    const ONLY_SOME_REASONS: u8 = 0x83;
    const IS_INDIRECT: u8 = 0x84;
    let mut found = Scope { leaves: true, authorities: true, points: Box::default() };
    let mut outer = DerReader(value);
    let mut fields = DerReader(outer.expect(der::SEQUENCE).ok_or(MALFORMED)?.content);
    let mut last = 0;
    while !fields.is_empty() {
        let field = fields.any().ok_or(MALFORMED)?;
        let kind = field.tag & 0x1f;
        if kind < last {
            return Err(format!("{MALFORMED}: distribution point fields are out of order"));
        }
        last = kind + 1;
        let set = || der::boolean(field.content).ok_or(MALFORMED);
        match field.tag {
            POINT => found.points = full_name(field.content)?,
            ONLY_USERS => found.authorities = !set()?,
            ONLY_AUTHORITIES => found.leaves = !set()?,
            ONLY_SOME_REASONS => {
                return Err("CRLs for some reasons only are not supported".into());
            }
            IS_INDIRECT if set()? => return Err(INDIRECT.into()),
            IS_INDIRECT => {}
            _ => return Err(format!("{MALFORMED}: distribution point")),
        }
    }
    if !outer.is_empty() || !(found.leaves || found.authorities) {
        return Err(format!("{MALFORMED}: distribution point covers no certificates"));
    }
    Ok(found)
}

/// `DistributionPointName`. Only full names are supported: a relative name depends on the CRL issuer.
fn full_name(name: &[u8]) -> Result<Box<[Box<[u8]>]>, String> {
    const FULL_NAME: u8 = 0xa0;
    const RELATIVE_NAME: u8 = 0xa1;
    let names = match DerReader(name).any() {
        Some(names) if names.tag == FULL_NAME => general_names(names.content),
        Some(names) if names.tag == RELATIVE_NAME => {
            return Err("distribution point has no full name, which is not supported".into());
        }
        _ => None,
    };
    let names = names.filter(|names| !names.is_empty());
    let names = names.ok_or_else(|| format!("{MALFORMED}: name of the distribution point"))?;
    Ok(names.into_iter().map(Box::from).collect())
}

/// Reads an integer that is not negative.
fn number(value: &[u8]) -> Option<Number> {
    let mut outer = DerReader(value);
    let digits = outer.expect(der::INTEGER).filter(|_| outer.is_empty())?.content;
    if digits.first()? & 0x80 != 0 {
        return None;
    }
    let digits = digits.strip_prefix(&[0]).unwrap_or(digits);
    let mut number = Number::default();
    let start = number.len().checked_sub(digits.len())?;
    number.get_mut(start..)?.copy_from_slice(digits);
    Some(number)
}
