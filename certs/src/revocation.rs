//! Which certificates were revoked.
//!
//! A list is read once, when it arrives: its form by webpki, its issuer and signature against the
//! roots, its scope and its age. What remains is a sorted array of serial numbers per issuer, so a
//! handshake pays for a binary search and not for the list.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime};

use crate::der::{self, Elements};
use crate::verify::ALGORITHMS;

/// The most revoked certificates in all lists together.
const ENTRY_LIMIT: usize = 10_000_000;

const CRL_NUMBER: &[u8] = &[0x55, 0x1d, 0x14];
const ISSUING_DISTRIBUTION_POINT: &[u8] = &[0x55, 0x1d, 0x1c];

/// A serial number of at most 20 bytes (RFC 5280, section 4.1.2.2), right-aligned.
type Serial = [u8; 20];

/// What is known of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revocation {
    /// Its issuer's list is in force and does not name it.
    Good,
    /// Its issuer's list names it.
    Revoked,
    /// There is no list of its issuer, or that list does not speak of such certificates.
    Unknown,
    /// Its issuer's list is past its `nextUpdate`.
    Expired,
}

/// What to do when the lists do not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RevocationPolicy {
    /// Whether a certificate passes whose issuer has no list.
    pub allow_unknown: bool,
    /// Whether a certificate passes whose issuer's list has expired.
    pub allow_expired: bool,
}

impl RevocationPolicy {
    /// Fails closed: what is not known to be good is refused.
    pub const STRICT: Self = Self { allow_unknown: false, allow_expired: false };
}

/// What part a certificate plays in a chain. A list may speak of one part only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The end entity.
    Leaf,
    /// An intermediate.
    Authority,
}

/// The revoked serial numbers by issuer. Immutable; replaced whole.
#[derive(Debug, Clone, Default)]
pub struct CrlIndex {
    issuers: BTreeMap<Vec<u8>, Arc<IssuerList>>,
    warnings: Vec<String>,
}

struct IssuerList {
    /// `CRLNumber`, right-aligned; zero when the list has none.
    number: Serial,
    this_update: u64,
    next_update: u64,
    covers_leaves: bool,
    covers_authorities: bool,
    serials: Box<[Serial]>,
}

impl fmt::Debug for IssuerList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} serials, next update {}", self.serials.len(), self.next_update)
    }
}

/// Why a list cannot be used. Its place is its number among the lists, from 0.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("revocation list {index}: {reason}")]
pub struct CrlError {
    /// Which list.
    pub index: usize,
    /// Why.
    pub reason: String,
}

impl CrlIndex {
    /// Reads lists in PEM, or one in DER. Certificates of intermediate issuers may stand beside
    /// them; those are used only when one of `roots` signed them. Of several lists of an issuer the
    /// newest wins, also against those in `previous`.
    ///
    /// # Errors
    /// Each list that is malformed, of an unsupported kind, or not signed by an issuer that we trust.
    pub fn load(
        bytes: &[u8],
        roots: &[TrustAnchor<'_>],
        previous: Option<&Self>,
        now: UnixTime,
    ) -> Result<Self, Vec<CrlError>> {
        let lists = split(bytes).map_err(|reason| vec![CrlError { index: 0, reason }])?;
        let issuers = issuers(bytes, roots, now);
        let mut index = Self::default();
        let mut errors = Vec::new();
        let mut entries = 0;
        for (position, list) in lists.iter().enumerate() {
            match read(list, roots, &issuers) {
                Ok((issuer, list)) => {
                    entries += list.serials.len();
                    index.keep_newest(issuer, Arc::new(list), "another list of the same issuer");
                }
                Err(reason) => errors.push(CrlError { index: position, reason }),
            }
        }
        if entries > ENTRY_LIMIT {
            errors.push(CrlError {
                index: 0,
                reason: format!("{entries} entries; at most {ENTRY_LIMIT} are held"),
            });
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        for (issuer, list) in previous.iter().flat_map(|index| &index.issuers) {
            if index.issuers.contains_key(issuer) {
                index.keep_newest(issuer.clone(), list.clone(), "the one in force");
            }
        }
        Ok(index)
    }

    fn keep_newest(&mut self, issuer: Vec<u8>, list: Arc<IssuerList>, other: &str) {
        match self.issuers.get(&issuer) {
            Some(held) if held.age() > list.age() && other.starts_with("another") => {
                self.warnings.push(format!(
                    "a list of {} is older than {other}; the newer one counts",
                    name(&issuer)
                ));
            }
            Some(held) if held.age() >= list.age() => {}
            Some(_) if other.starts_with("the one") => {
                self.warnings.push(format!(
                    "the list of {} is older than {other}, which stays",
                    name(&issuer)
                ));
                self.issuers.insert(issuer, list);
            }
            Some(_) | None => {
                self.issuers.insert(issuer, list);
            }
        }
    }

    /// What is known of the certificate that `issuer` (a name, DER) numbered `serial`.
    #[must_use]
    pub fn status(&self, issuer: &[u8], serial: &[u8], role: Role, now: UnixTime) -> Revocation {
        let Some(list) = self.issuers.get(issuer) else {
            return Revocation::Unknown;
        };
        let covered = match role {
            Role::Leaf => list.covers_leaves,
            Role::Authority => list.covers_authorities,
        };
        if !covered {
            return Revocation::Unknown;
        }
        match aligned(serial) {
            Some(serial) if list.serials.binary_search(&serial).is_ok() => Revocation::Revoked,
            Some(_) if list.next_update <= now.as_secs() => Revocation::Expired,
            Some(_) => Revocation::Good,
            None => Revocation::Unknown,
        }
    }

    /// How many serial numbers are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.issuers.values().map(|list| list.serials.len()).sum()
    }

    /// Whether no list is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.issuers.is_empty()
    }

    /// What an operator should know of the load.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl IssuerList {
    fn age(&self) -> (&Serial, u64) {
        (&self.number, self.this_update)
    }
}

/// The lists in PEM, or the one in DER.
fn split(bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    if bytes.first() == Some(&der::SEQUENCE) {
        return Ok(vec![bytes.to_vec().into()]);
    }
    CertificateRevocationListDer::pem_slice_iter(bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("it is neither DER nor PEM: {error}"))
}

/// The certificates beside the lists that a root vouches for: name and public key.
fn issuers(bytes: &[u8], roots: &[TrustAnchor<'_>], now: UnixTime) -> Vec<(Vec<u8>, Vec<u8>)> {
    CertificateDer::pem_slice_iter(bytes)
        .filter_map(|certificate| {
            let certificate = certificate.ok()?;
            let parsed = webpki::EndEntityCert::try_from(&certificate).ok()?;
            // An authority is no end entity, so its chain is checked by name and signature.
            let root = roots.iter().find(|root| sequence(&root.subject) == parsed.issuer())?;
            signed_by(&certificate, &spki(root)).then_some(())?;
            let _ = now;
            Some((parsed.subject().to_vec(), parsed.subject_public_key_info().to_vec()))
        })
        .collect()
}

/// Whether a signed DER structure (certificate or list) verifies under a public key.
fn signed_by(signed: &[u8], public_key: &[u8]) -> bool {
    parts(signed).is_some_and(|(body, algorithm, signature)| {
        verifies(body, algorithm, signature, public_key)
    })
}

/// The signed bytes, the algorithm, and the signature.
fn parts(signed: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let mut outer = Elements(signed);
    let mut inner = Elements(outer.expect(der::SEQUENCE)?.content);
    let body = inner.expect(der::SEQUENCE)?;
    let algorithm = inner.expect(der::SEQUENCE)?;
    let signature = inner.expect(der::BIT_STRING)?;
    if !inner.is_empty() || !outer.is_empty() {
        return None;
    }
    Some((body.whole, algorithm.content, signature.content.strip_prefix(&[0])?))
}

fn verifies(body: &[u8], algorithm: &[u8], signature: &[u8], public_key: &[u8]) -> bool {
    let key = rustls_pki_types::SubjectPublicKeyInfoDer::from(public_key);
    let Ok(key) = webpki::RawPublicKeyEntity::try_from(&key) else {
        return false;
    };
    ALGORITHMS
        .all
        .iter()
        .filter(|candidate| candidate.signature_alg_id().as_ref() == algorithm)
        .any(|candidate| key.verify_signature(*candidate, body, signature).is_ok())
}

/// Reads one list: who issued it, and what it says.
fn read(
    list: &CertificateRevocationListDer<'_>,
    roots: &[TrustAnchor<'_>],
    issuers: &[(Vec<u8>, Vec<u8>)],
) -> Result<(Vec<u8>, IssuerList), String> {
    webpki::BorrowedCertRevocationList::from_der(list).map_err(|error| explain(&error))?;
    let malformed = || "it is malformed".to_owned();
    let (body, algorithm, signature) = parts(list).ok_or_else(malformed)?;
    let mut fields = Elements(Elements(body).expect(der::SEQUENCE).ok_or_else(malformed)?.content);
    fields.optional(der::INTEGER);
    fields.expect(der::SEQUENCE).ok_or_else(malformed)?;
    let issuer = fields.expect(der::SEQUENCE).ok_or_else(malformed)?;
    let this_update = fields.any().and_then(der::time).ok_or_else(malformed)?;
    let next_update = fields.any().and_then(der::time).ok_or("it has no nextUpdate")?;
    let revoked = fields.optional(der::SEQUENCE).map_or(&[][..], |list| list.content);
    let extensions = extensions(&mut fields).ok_or_else(malformed)?;

    let keys = roots
        .iter()
        .map(|root| (sequence(&root.subject), spki(root)))
        .chain(issuers.iter().cloned())
        .filter(|(name, _)| contents(name) == issuer.content);
    let mut known = false;
    let mut verified = false;
    for (_, key) in keys {
        known = true;
        verified |= verifies(body, algorithm, signature, &key);
    }
    if !known {
        return Err(format!("its issuer {} is none that we trust", name(issuer.content)));
    }
    if !verified {
        return Err(format!("its signature is not by {}", name(issuer.content)));
    }
    let list = IssuerList {
        number: extensions.number,
        this_update,
        next_update,
        covers_leaves: extensions.covers_leaves,
        covers_authorities: extensions.covers_authorities,
        serials: serials(revoked).ok_or_else(malformed)?,
    };
    Ok((issuer.content.to_vec(), list))
}

struct Extensions {
    number: Serial,
    covers_leaves: bool,
    covers_authorities: bool,
}

fn extensions(fields: &mut Elements<'_>) -> Option<Extensions> {
    let mut found = Extensions { number: [0; 20], covers_leaves: true, covers_authorities: true };
    let Some(tagged) = fields.optional(0xa0) else {
        return Some(found);
    };
    let mut list = Elements(Elements(tagged.content).expect(der::SEQUENCE)?.content);
    while !list.is_empty() {
        let mut extension = Elements(list.expect(der::SEQUENCE)?.content);
        let id = extension.expect(der::OBJECT_IDENTIFIER)?;
        extension.optional(der::BOOLEAN);
        let value = extension.expect(der::OCTET_STRING)?;
        if id.content == CRL_NUMBER {
            found.number = aligned(Elements(value.content).expect(der::INTEGER)?.content)?;
        }
        if id.content == ISSUING_DISTRIBUTION_POINT {
            scope(value.content, &mut found)?;
        }
    }
    Some(found)
}

/// `IssuingDistributionPoint` (RFC 5280, section 5.2.5). webpki has refused indirect lists and
/// those for some reasons only.
fn scope(value: &[u8], found: &mut Extensions) -> Option<()> {
    const DISTRIBUTION_POINT: u8 = 0xa0;
    const ONLY_USER_CERTIFICATES: u8 = 0x81;
    const ONLY_AUTHORITY_CERTIFICATES: u8 = 0x82;
    let mut fields = Elements(Elements(value).expect(der::SEQUENCE)?.content);
    while !fields.is_empty() {
        let field = fields.any()?;
        let set = field.content.first().is_some_and(|byte| *byte != 0);
        match field.tag {
            // A partition of the issuer's certificates: which of them, only the certificate says.
            DISTRIBUTION_POINT => {
                found.covers_leaves = false;
                found.covers_authorities = false;
            }
            ONLY_USER_CERTIFICATES if set => found.covers_authorities = false,
            ONLY_AUTHORITY_CERTIFICATES if set => found.covers_leaves = false,
            _ => {}
        }
    }
    Some(())
}

fn serials(revoked: &[u8]) -> Option<Box<[Serial]>> {
    let mut entries = Elements(revoked);
    let mut serials = Vec::new();
    while !entries.is_empty() {
        let mut entry = Elements(entries.expect(der::SEQUENCE)?.content);
        serials.push(aligned(entry.expect(der::INTEGER)?.content)?);
    }
    serials.sort_unstable();
    serials.dedup();
    Some(serials.into_boxed_slice())
}

/// An integer of at most 20 bytes, without its leading zeros, right-aligned.
fn aligned(integer: &[u8]) -> Option<Serial> {
    let digits = integer
        .iter()
        .position(|byte| *byte != 0)
        .and_then(|start| integer.get(start..))
        .unwrap_or(&[]);
    let mut serial = [0; 20];
    let start = serial.len().checked_sub(digits.len())?;
    serial.get_mut(start..)?.copy_from_slice(digits);
    Some(serial)
}

fn spki(anchor: &TrustAnchor<'_>) -> Vec<u8> {
    sequence(&anchor.subject_public_key_info)
}

/// A SEQUENCE around content: trust anchors hold their fields without it.
fn sequence(content: &[u8]) -> Vec<u8> {
    let mut whole = vec![der::SEQUENCE];
    let length = content.len().to_be_bytes();
    let digits = length.iter().position(|b| *b != 0).and_then(|s| length.get(s..)).unwrap_or(&[0]);
    match digits {
        [one] if *one < 0x80 => whole.push(*one),
        _ => {
            whole.push(0x80 | u8::try_from(digits.len()).unwrap_or(0));
            whole.extend_from_slice(digits);
        }
    }
    whole.extend_from_slice(content);
    whole
}

/// The content of a SEQUENCE, or the bytes themselves when they are none.
fn contents(bytes: &[u8]) -> &[u8] {
    let mut elements = Elements(bytes);
    match elements.expect(der::SEQUENCE) {
        Some(element) if elements.is_empty() => element.content,
        _ => bytes,
    }
}

/// The readable parts of a name, for messages.
fn name(issuer: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(issuer)
        .chars()
        .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '\u{0}' })
        .collect();
    let longest = text.split('\u{0}').max_by_key(|part| part.len()).unwrap_or_default();
    format!("{longest:?}")
}

fn explain(error: &webpki::Error) -> String {
    match error {
        webpki::Error::UnsupportedDeltaCrl => "delta lists are not supported".into(),
        webpki::Error::UnsupportedIndirectCrl => "indirect lists are not supported".into(),
        webpki::Error::UnsupportedCrlVersion => "only version 2 lists are supported".into(),
        webpki::Error::UnsupportedCriticalExtension => {
            "it has a critical extension that is not supported".into()
        }
        webpki::Error::UnsupportedRevocationReasonsPartitioning => {
            "lists for some reasons only are not supported".into()
        }
        other => format!("it is malformed: {other:?}"),
    }
}
