//! Strict parser for a CRL (RFC 5280, section 5). Unsupported kinds of CRLs are rejected on load with a reason, and
//! not in a handshake.

use crate::der::{self, DerReader, Element};

const CRL_NUMBER: &[u8] = &[0x55, 0x1d, 0x14];
const REASON: &[u8] = &[0x55, 0x1d, 0x15];
const INVALIDITY_DATE: &[u8] = &[0x55, 0x1d, 0x18];
const DELTA_INDICATOR: &[u8] = &[0x55, 0x1d, 0x1b];
const ISSUING_DISTRIBUTION_POINT: &[u8] = &[0x55, 0x1d, 0x1c];
const CERTIFICATE_ISSUER: &[u8] = &[0x55, 0x1d, 0x1d];
const DISTRIBUTION_POINTS: &[u8] = &[0x55, 0x1d, 0x1f];

/// A number of at most 20 bytes (RFC 5280, section 5.2.3), right-aligned.
pub(super) type Number = [u8; 20];

/// A parsed CRL. Its signature is not verified.
pub(super) struct RawCrl<'a> {
    /// The content of the issuer's name.
    pub(super) issuer: &'a [u8],
    pub(super) this_update: u64,
    pub(super) next_update: u64,
    pub(super) number: Number,
    /// For a delta CRL: the minimum number of its base CRL.
    pub(super) base: Option<Number>,
    pub(super) scope: Scope,
    /// The revoked serial numbers.
    pub(super) revoked: Vec<&'a [u8]>,
    /// For a delta CRL: the serial numbers that it removes from the base CRL.
    pub(super) restored: Vec<&'a [u8]>,
}

/// The certificates of the issuer that a CRL covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scope {
    pub(super) leaves: bool,
    pub(super) authorities: bool,
    /// The names (`GeneralName`, DER) of the distribution point; empty: the CRL is not limited to a distribution
    /// point.
    pub(super) points: Box<[Box<[u8]>]>,
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
        let (mut fields, algorithm) = outer(der).ok_or(MALFORMED)?;
        let version = fields.optional(der::INTEGER);
        if version.is_none_or(|version| version.content != [1]) {
            return Err("only version 2 CRLs are supported".into());
        }
        if fields.expect(der::SEQUENCE).is_none_or(|own| own.content != algorithm) {
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
        let Extensions { number, base, scope } = crl_extensions(extensions)?;
        let number = number.ok_or("CRL number is missing or critical")?;
        let (mut revoked, mut restored) = (Vec::new(), Vec::new());
        let mut entries = DerReader(entries);
        while !entries.is_empty() {
            let (serial, is_restored) = entry(entries.expect(der::SEQUENCE).ok_or(MALFORMED)?)?;
            // `removeFromCRL` has no meaning in a full CRL, so the certificate stays revoked there.
            if is_restored && base.is_some() { &mut restored } else { &mut revoked }.push(serial);
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
        let (mut fields, _) = outer(der)?;
        fields.optional(der::INTEGER);
        fields.expect(der::SEQUENCE)?;
        Some(fields.expect(der::SEQUENCE)?.content)
    }
}

/// The fields of the signed part, and the signature algorithm.
fn outer(list: &[u8]) -> Option<(DerReader<'_>, &[u8])> {
    let mut whole = DerReader(list);
    let mut parts = DerReader(whole.expect(der::SEQUENCE)?.content);
    let fields = DerReader(parts.expect(der::SEQUENCE)?.content);
    let algorithm = parts.expect(der::SEQUENCE)?.content;
    parts.expect(der::BIT_STRING)?;
    (whole.is_empty() && parts.is_empty()).then_some((fields, algorithm))
}

/// Reads an entry: its serial number, and whether it removes an earlier entry.
fn entry(entry: Element<'_>) -> Result<(&[u8], bool), String> {
    const REMOVE_FROM_CRL: &[u8] = &[0x0a, 1, 8];
    let mut fields = DerReader(entry.content);
    let serial = fields.expect(der::INTEGER).ok_or(MALFORMED)?.content;
    fields.any().and_then(der::time).ok_or(MALFORMED)?;
    let mut extensions =
        DerReader(fields.optional(der::SEQUENCE).map_or(&[][..], |extensions| extensions.content));
    let mut is_restored = false;
    while !extensions.is_empty() {
        let extension = Extension::read(&mut extensions).ok_or(MALFORMED)?;
        match extension.id {
            CERTIFICATE_ISSUER => return Err(INDIRECT.into()),
            REASON => is_restored = extension.value == REMOVE_FROM_CRL,
            INVALIDITY_DATE => {}
            _ if extension.critical => return Err(CRITICAL.into()),
            _ => {}
        }
    }
    if fields.is_empty() && !serial.is_empty() {
        Ok((serial, is_restored))
    } else {
        Err(MALFORMED.into())
    }
}

struct Extension<'a> {
    id: &'a [u8],
    critical: bool,
    value: &'a [u8],
}

impl<'a> Extension<'a> {
    fn read(list: &mut DerReader<'a>) -> Option<Self> {
        let mut fields = DerReader(list.expect(der::SEQUENCE)?.content);
        let id = fields.expect(der::OBJECT_IDENTIFIER)?.content;
        let critical = match fields.optional(der::BOOLEAN) {
            Some(flag) => boolean(flag.content)?,
            None => false,
        };
        let value = fields.expect(der::OCTET_STRING)?.content;
        fields.is_empty().then_some(Self { id, critical, value })
    }
}

struct Extensions {
    number: Option<Number>,
    base: Option<Number>,
    scope: Scope,
}

fn crl_extensions(extensions: &[u8]) -> Result<Extensions, String> {
    let whole = Scope { leaves: true, authorities: true, points: Box::default() };
    let mut found = Extensions { number: None, base: None, scope: whole };
    let mut outer = DerReader(extensions);
    let mut list = DerReader(outer.expect(der::SEQUENCE).ok_or(MALFORMED)?.content);
    let mut seen: Vec<&[u8]> = Vec::new();
    while !list.is_empty() {
        let extension = Extension::read(&mut list).ok_or(MALFORMED)?;
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
    if outer.is_empty() && !seen.is_empty() { Ok(found) } else { Err(MALFORMED.into()) }
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
        let set = || boolean(field.content).ok_or(MALFORMED);
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

/// Each `GeneralName`, DER.
fn general_names(content: &[u8]) -> Option<Vec<&[u8]>> {
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

/// The names of the distribution points where the certificate's issuer publishes CRLs for all reasons (RFC 5280,
/// section 4.2.1.13). Empty if the certificate has none, or cannot be read.
pub(crate) fn distribution_points(certificate: &[u8]) -> Vec<&[u8]> {
    points(certificate).unwrap_or_default()
}

fn points(certificate: &[u8]) -> Option<Vec<&[u8]>> {
    const EXTENSIONS: u8 = 0xa3;
    const POINT: u8 = 0xa0;
    const FULL_NAME: u8 = 0xa0;
    let mut outer = DerReader(DerReader(certificate).expect(der::SEQUENCE)?.content);
    let mut fields = DerReader(outer.expect(der::SEQUENCE)?.content);
    let extensions = loop {
        let field = fields.any()?;
        if field.tag == EXTENSIONS {
            break field.content;
        }
    };
    let mut list = DerReader(DerReader(extensions).expect(der::SEQUENCE)?.content);
    let value = loop {
        let extension = Extension::read(&mut list)?;
        if extension.id == DISTRIBUTION_POINTS {
            break extension.value;
        }
    };
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

/// X.690, section 11.1: DER allows two encodings.
fn boolean(content: &[u8]) -> Option<bool> {
    match content {
        [0] => Some(false),
        [0xff] => Some(true),
        _ => None,
    }
}
