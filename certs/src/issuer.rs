//! Who may sign revocation lists (RFC 5280, section 6.3.3 (f)).
//!
//! A list counts when the authority that numbered the certificates signed it: one of our roots, or
//! an intermediate below one of them, whose certificate is in force and says that it is an
//! authority. Where either names its key's usages, signing lists must be among them. A root's dates
//! do not count, as they do not count in a path.

use std::collections::HashSet;

use rustls_pki_types::{CertificateDer, SubjectPublicKeyInfoDer, UnixTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;

use crate::der::{self, DerReader};
use crate::proof::CertificateFields;
use crate::verify::ALGORITHMS;

/// An authority that we know, whether or not its lists count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Issuer {
    /// The content of its name, as the certificates that it signs carry it.
    pub(crate) name: Vec<u8>,
    /// Its `SubjectPublicKeyInfo`.
    pub(crate) public_key: Vec<u8>,
    /// Why its lists do not count.
    fault: Option<&'static str>,
    /// How many authorities may stand below it, one below the other.
    below: u32,
}

/// The deepest that intermediates stand below a root.
const DEPTH_LIMIT: u32 = 7;
/// The fault of an authority whose time is over, or has not come.
pub(crate) const NOT_IN_FORCE: &str = "its issuer's certificate is not in force";

impl Issuer {
    /// A root, or an authority whose certificate is on a verified path.
    pub(crate) fn of(certificate: &[u8]) -> Option<Self> {
        Self::read(&X509Certificate::from_der(certificate).ok()?.1)
    }

    fn read(certificate: &X509Certificate<'_>) -> Option<Self> {
        let name =
            DerReader(certificate.subject().as_raw()).expect(der::SEQUENCE)?.content.to_vec();
        let public_key = certificate.public_key().raw.to_vec();
        let usage = certificate.key_usage().ok()?.map(|usage| usage.value);
        let fault = usage
            .is_some_and(|usage| !usage.crl_sign())
            .then_some("its issuer's key is not for signing lists");
        let constraints = certificate.basic_constraints().ok()?.map(|found| found.value);
        let longest = constraints.and_then(|found| found.path_len_constraint);
        let below = match usage.is_some_and(|usage| !usage.key_cert_sign()) {
            true => 0,
            false => longest.unwrap_or(DEPTH_LIMIT),
        };
        Some(Self { name, public_key, fault, below })
    }

    /// An intermediate that one of those above signed.
    fn read_intermediate(
        certificate: &CertificateDer<'_>,
        above: &[Self],
        now: UnixTime,
    ) -> Option<Self> {
        // webpki refuses what a path may not hold, such as a critical extension that it ignores.
        let form = webpki::EndEntityCert::try_from(certificate).ok()?;
        let may_sign = |known: &&Self| known.below > 0 && known.name == form.issuer();
        let signer = above.iter().filter(may_sign).find(|known| known.signed(certificate))?;
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let intermediate = Self::read(&certificate)?;
        let at = ASN1Time::from_timestamp(i64::try_from(now.as_secs()).ok()?).ok()?;
        let fault = if certificate.validity().is_valid_at(at) {
            (!certificate.is_ca()).then_some("its issuer is no authority")
        } else {
            Some(NOT_IN_FORCE)
        };
        // Whoever is no authority, or not now, makes nobody one.
        let below = if fault.is_some() { 0 } else { intermediate.below.min(signer.below - 1) };
        Some(Self { fault: fault.or(intermediate.fault), below, ..intermediate })
    }

    /// Whether its lists count.
    pub(crate) fn may_sign_crls(&self) -> Result<(), &'static str> {
        self.fault.map_or(Ok(()), Err)
    }

    /// Whether it signed this certificate or list.
    pub(crate) fn signed(&self, structure: &[u8]) -> bool {
        signed(&self.public_key, structure)
    }
}

/// The certificates of a trust bundle.
#[derive(Debug, Default)]
pub(crate) struct Bundle {
    /// Where a path may end.
    pub(crate) anchors: Vec<CertificateDer<'static>>,
    /// Those that others of the bundle vouch for: a path goes on above them, and they can be revoked.
    pub(crate) intermediates: Vec<CertificateDer<'static>>,
}

impl Bundle {
    /// A certificate is an intermediate when another of the bundle signed it, but it did not sign itself, and
    /// the way up leads to an anchor. Certificates that sign one another in a circle are anchors.
    pub(crate) fn of(certificates: Vec<CertificateDer<'static>>) -> Self {
        let all = CertificateFields::read_all(&certificates);
        let is_signed = |one: &CertificateFields<'_>| {
            let is_named = |other: &&CertificateFields<'_>| {
                other.subject == one.issuer && other.whole != one.whole
            };
            // Most roots have a name of their own, and cost no signature check.
            let mut named = all.iter().filter(is_named).peekable();
            named.peek().is_some()
                && !one.is_signed_by(one)
                && named.any(|other| one.is_signed_by(other))
        };
        let (signed, anchors) = all.iter().partition(|one| is_signed(one));
        let below: HashSet<_> =
            take_below(anchors, signed, |_, _| true).iter().map(|one| one.whole).collect();
        let is_below: Vec<_> = certificates.iter().map(|one| below.contains(&**one)).collect();
        let mut bundle = Self::default();
        for (certificate, is_below) in certificates.into_iter().zip(is_below) {
            let kind = if is_below { &mut bundle.intermediates } else { &mut bundle.anchors };
            kind.push(certificate);
        }
        bundle
    }
}

/// Those of `rest` that one of `accepted`, or another one taken, has signed, where `is_good` of the certificate and
/// its signer.
pub(crate) fn take_below<'c>(
    mut accepted: Vec<CertificateFields<'c>>,
    mut rest: Vec<CertificateFields<'c>>,
    is_good: impl Fn(&CertificateFields<'c>, &CertificateFields<'c>) -> bool,
) -> Vec<CertificateFields<'c>> {
    let mut taken = Vec::new();
    while !accepted.is_empty() {
        let has_signer = |one: &mut CertificateFields<'c>| {
            accepted.iter().any(|above| one.is_signed_by(above) && is_good(one, above))
        };
        let found: Vec<_> = rest.extract_if(.., has_signer).collect();
        taken.extend(&found);
        accepted = found;
    }
    taken
}

/// Whether the key (`SubjectPublicKeyInfo`) signed this certificate or list.
pub(crate) fn signed(public_key: &[u8], structure: &[u8]) -> bool {
    let key = SubjectPublicKeyInfoDer::from(public_key);
    let Ok(key) = webpki::RawPublicKeyEntity::try_from(&key) else {
        return false;
    };
    parts(structure).is_some_and(|(body, algorithm, signature)| {
        ALGORITHMS
            .all
            .iter()
            .filter(|candidate| candidate.signature_alg_id().as_ref() == algorithm)
            .any(|candidate| key.verify_signature(*candidate, body, signature).is_ok())
    })
}

/// The roots, and those of `beside` that stand below one of them.
pub(crate) fn known(
    roots: &[CertificateDer<'_>],
    beside: &[CertificateDer<'_>],
    now: UnixTime,
) -> Vec<Issuer> {
    let mut known = roots.iter().filter_map(|root| Issuer::of(root)).collect();
    add_below(&mut known, beside.iter().collect(), now);
    known
}

/// Adds the authorities of `rest` that stand below one of `known`, and returns the other certificates.
pub(crate) fn add_below<'c>(
    known: &mut Vec<Issuer>,
    mut rest: Vec<&'c CertificateDer<'c>>,
    now: UnixTime,
) -> Vec<&'c CertificateDer<'c>> {
    for _ in 0..DEPTH_LIMIT {
        let mut found = Vec::new();
        rest.retain(|certificate| match Issuer::read_intermediate(certificate, known, now) {
            Some(intermediate) => {
                found.push(intermediate);
                false
            }
            None => true,
        });
        if found.is_empty() {
            break;
        }
        known.extend(found);
    }
    rest
}

/// The signed bytes, the algorithm, and the signature of a certificate or list.
fn parts(structure: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let mut outer = DerReader(structure);
    let mut inner = DerReader(outer.expect(der::SEQUENCE)?.content);
    let body = inner.expect(der::SEQUENCE)?;
    let algorithm = inner.expect(der::SEQUENCE)?;
    let signature = inner.expect(der::BIT_STRING)?;
    if !inner.is_empty() || !outer.is_empty() {
        return None;
    }
    Some((body.whole, algorithm.content, signature.content.strip_prefix(&[0])?))
}
